"""Text sampled from the model itself: calibration and evaluation without a data set.

Exact sampling: temperature 1, no truncation of the distribution, end-of-text is a token like any other, so every
sequence has full length. Then the cross-entropy of a quantized model on the float model's samples is, in expectation,
the float model's entropy plus KL(float || quantized): nothing about the data enters.
The loop is ours rather than ``model.generate``: sample i takes its uniforms from row i of one private table, so the
text depends neither on the global random state nor on the batch size. A sequence starts with BOS, or with a uniformly
drawn token where the tokenizer has none. Source: design.md section 5.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.core.cache import kept
from qexp.core.rng import generator

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]
VERSION = 1
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample; ``stream`` keeps the texts of two purposes apart when their seeds are the same number."""

    samples: int
    tokens: int
    seed: int
    stream: str
    bos: bool


def generated(
    model: Any, tokenizer: Any, request: Request, cache: Path, model_identity: str, progress: Progress
) -> Tensor:
    """Return int64 [samples, tokens] from the cache, or sample and cache them by ``model_identity`` and settings."""
    first = first_token(tokenizer) if request.bos else None
    weight = next(model.parameters())
    key = {
        **asdict(request),
        "first": first,
        "model": model_identity,
        "version": VERSION,
        "dtype": str(weight.dtype),
        "device": weight.device.type,
    }
    path = cache / "generated" / f"{digest(key)}.safetensors"
    return stored(path, "tokens", lambda: {"tokens": sample(model, request, first, BATCH, progress)})


def short_sample(model: Any, tokenizer: Any, seed: int) -> Tensor:
    """Return int64 [16, 256]: a little of the model's own text, for measuring its activations."""
    tokens = min(256, max_positions(model) or 256)
    request = Request(samples=16, tokens=tokens, seed=seed, stream="short", bos=True)
    return sample(model, request, first_token(tokenizer), request.samples, silent)


def sample(model: Any, request: Request, first: int | None, batch: int, progress: Progress) -> Tensor:
    """Sample int64 [samples, tokens] (on the CPU) with the model's key-value cache; float32 softmax, float64 sums."""
    rng = generator(request.seed, "generated", request.stream)
    uniforms = torch.rand(request.samples, request.tokens, generator=rng, dtype=torch.float64)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    rows = []
    for start in range(0, request.samples, batch):
        here = uniforms[start : start + batch]
        steps = progress(
            f"sampling text {start + 1} to {min(start + batch, request.samples)} of {request.samples}, tokens",
            range(1, request.tokens),
        )
        rows.append(_sample_batch(model, here, first, vocabulary, steps))
    return torch.cat(rows)


@torch.no_grad()
def _sample_batch(model: Any, uniforms: Tensor, first: int | None, vocabulary: int, steps: Iterable[int]) -> Tensor:
    """Sample one batch; uniforms float64 [B, S] -> int64 [B, S]; column 0 draws the first token where it is free."""
    device = model.get_input_embeddings().weight.device
    uniforms = uniforms.to(device)
    free = (uniforms[:, 0] * vocabulary).long()
    tokens = [torch.full_like(free, first) if first is not None else free]
    past = None
    for step in steps:
        out = model(input_ids=tokens[-1][:, None], past_key_values=past, use_cache=True)
        past = out.past_key_values
        tokens.append(draw(out.logits[:, -1], uniforms[:, step]))
    return torch.stack(tokens, dim=1).cpu()


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: logits [B, V], uniforms float64 [B] in [0, 1) -> int64 [B]."""
    mass = torch.softmax(logits.float(), dim=-1).double().cumsum(dim=-1)
    places = torch.searchsorted(mass, (uniforms * mass[:, -1])[:, None], right=True).squeeze(1)
    return places.clamp(max=mass.shape[1] - 1)


def first_token(tokenizer: Any) -> int | None:
    """Return the id of the tokenizer's BOS token, if it has one."""
    return None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def max_positions(model: Any) -> int | None:
    """Return the longest sequence the model's configuration admits, if it says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def digest(key: Any) -> str:
    """Return 24 hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def stored(path: Path, name: str, make: Callable[[], dict[str, Tensor]]) -> Tensor:
    """Return tensor ``name`` of the file ``path``; if it does not exist, make all of it, once for all processes."""
    from safetensors import safe_open

    with safe_open(kept(path, make), framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor


def silent(_label: str, items: Iterable[Any]) -> Iterable[Any]:
    """Show no progress."""
    return items
