"""The attention door: where queries, keys and values arrive after RoPE, and are rotated and quantized.

transformers lets a model choose a registered attention function; ours is its scaled-dot-product attention
with an optional step in front. A module without a ``door`` computes exactly what "sdpa" computes. Where a query reads
some keys exactly and others quantized, attention is written out (``plain_attention``).
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

from qexp.core.errors import UserError
from qexp.core.kv_forms import ResidualKv, early
from qexp.core.maps import LinearMap
from qexp.core.stages import Kv
from qexp.models.plain_attention import Seen, exactly, plain_attention

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


@dataclass
class EarlyKeys:
    """A forward hook behind the keys' projection or norm: rounds them, if what the door holds does so before RoPE."""

    door: Door
    head_size: int

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        """Return keys [..., A E] or [..., E] quantized head by head, or None to leave them."""
        kv = early(self.door.kv)
        return None if kv is None else kv.round_keys(output.unflatten(-1, (-1, self.head_size))).flatten(-2)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output [B, S, A, E] for q [B, A, S, E] and k, v [B, A_kv, S, E]."""
    door = getattr(module, "door", None)
    seen = exactly(key, value)
    if door is not None and door.kv is not None:
        query, seen = _through(door, door.kv, query, seen)
        if isinstance(door.kv, ResidualKv):
            _check_positions(module, query, seen, attention_mask)
    if seen.exact is not None or kwargs.get("softcap") is not None:
        return plain_attention(query, seen, attention_mask, kwargs.get("scaling"), kwargs.get("softcap")), None
    answer: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, seen.key, seen.value, attention_mask, **kwargs
    )
    return answer


def _through(door: Door, kv: Kv, query: Tensor, given: Seen) -> tuple[Tensor, Seen]:
    """Return q, and k and v rotated and quantized; what comes out of a packed cache has only its query rotated.

    Keys that were rounded before RoPE are not rotated, nor are their queries.
    """
    rotation = None if early(kv) else door.rotation
    decoded, door.decoded = door.decoded() if door.decoded else None, None
    if decoded is not None and decoded is not given.key:
        raise RuntimeError("the keys of a packed cache were changed on their way to attention; use another cache")
    if rotation is not None:
        query = rotation.dual(query)
    if decoded is not None:
        return query, given
    key, value = given.key if rotation is None else rotation.apply(given.key), given.value
    rounded_key, rounded_value = kv(key, value)
    sizes = query.shape[-2], key.shape[-2]
    exact = kv.exact(*sizes, key.device) if isinstance(kv, ResidualKv) else None
    if exact is None:
        return query, exactly(rounded_key, rounded_value)
    return query, Seen(key, value, rounded_key, rounded_value, exact)


def _check_positions(module: nn.Module, query: Tensor, seen: Seen, mask: Tensor | None) -> None:
    """Raise UserError where groups of tokens cannot be counted: behind padding, or where a cache has dropped keys."""
    keys, window = seen.key.shape[-2], getattr(module, "sliding_window", None)
    short = window is None or keys <= window
    if mask is not None and short and not _sees_the_first(mask):
        raise UserError(
            "a KV quantizer over groups of tokens on a batch padded on the left",
            "padding on the right, or prompts of equal length",
            "method/kv=per_head",
        )
    if seen.exact is not None and window is not None and query.shape[-2] < keys >= window:
        raise UserError(
            "a KV quantizer over groups of tokens, decoding behind a cache with sliding windows",
            "a cache that keeps every position (PackedModel.new_cache), or one forward without a cache",
            "method/kv=per_head",
        )


def _sees_the_first(mask: Tensor) -> bool:
    """Return whether the last query of every sequence sees the first key; mask bool or additive, [B, A or 1, S, K]."""
    last = mask[:, :, -1, 0]
    return bool((last if last.dtype == torch.bool else last == 0).all())


def install(model: PreTrainedModel) -> bool:
    """Switch ``model`` to our attention and return True, or False where the architecture has no such door."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, NotImplementedError):
        return False
    return bool(model.config._attn_implementation == NAME)
