"""The attention door: where queries, keys and values arrive after RoPE, and are rotated and quantized.

transformers lets a model choose a registered attention function; ours is its scaled-dot-product attention
with an optional step in front. A module without a ``door`` computes exactly what "sdpa" computes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qexp.core.maps import LinearMap
from qexp.core.placed import wide
from qexp.core.stages import Kv

NAME = "qexp"


@dataclass
class Door:
    """What one attention module does to q, k, v; ``rotation`` (R3) acts only where keys are quantized.

    ``decoded`` points to the keys that a packed cache has just handed out, rotated and quantized already; weakly, so
    that a forward which fails in between leaves nothing behind.
    """

    rotation: LinearMap | None = None
    kv: Kv | None = None
    decoded: weakref.ref[Tensor] | None = None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output [B, S, A, E] for q [B, A, S, E] and k, v [B, A_kv, S, E]."""
    door = getattr(module, "door", None)
    if door is not None and door.kv is not None:
        query, key, value = _through(door, door.kv, query, key, value)
    if kwargs.get("softcap") is not None:
        return _softcapped(query, key, value, attention_mask, kwargs), None
    answer: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return answer


def _through(door: Door, kv: Kv, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v rotated and quantized; what comes out of a packed cache has only its query rotated."""
    decoded, door.decoded = door.decoded() if door.decoded else None, None
    if decoded is not None and decoded is not key:
        raise RuntimeError("the keys of a packed cache were changed on their way to attention; use another cache")
    if door.rotation is not None:
        query = door.rotation.dual(query)
    if decoded is not None:
        return query, key, value
    if door.rotation is not None:
        key = door.rotation.apply(key)
    return query, *kv(key, value)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Return attention with capped scores (Gemma 2), which "sdpa" refuses; scores at least in float32."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    scores = wide(query @ key.transpose(-1, -2)) * scaling
    scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    if mask is None:
        S, K = scores.shape[-2:]
        mask = torch.ones(S, K, dtype=torch.bool, device=scores.device).tril(K - S)
    lowest = torch.finfo(scores.dtype).min  # finite: a row of padding sees nothing, and must not become NaN
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    mixed: Tensor = scores.softmax(-1).to(value.dtype) @ value
    return mixed.transpose(1, 2).contiguous()


def install(model: PreTrainedModel) -> bool:
    """Switch ``model`` to our attention and return True, or False where the architecture has no such door."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, NotImplementedError):
        return False
    return bool(model.config._attn_implementation == NAME)
