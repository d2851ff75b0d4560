"""Perplexity over fixed windows: exp of the mean over windows of the mean token loss.

Windows do not overlap, the tail is dropped, the first token of a window is not predicted (S - 1 predictions), logits
are float32 and sums float64. A window's logits are never held at once (a 262k vocabulary would need gigabytes): a
``Reader`` runs the decoder to its last hidden state and applies the output embedding to pieces of it.
Source: methods/evaluation.md section 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qexp.core.errors import UserError
from qexp.data.generated import Progress

log = logging.getLogger(__name__)

CHUNK_LOGITS = 2**25  # 128 MiB of float32: 128 tokens of Gemma's vocabulary, enough to fill the head's product
RESAMPLES = 10_000


@dataclass(frozen=True)
class Reader:
    """A causal LM in two steps, so that logits can be made piece by piece: ids [B, S] -> hidden [B, S, C] -> [T, V]."""

    run: Callable[[Tensor], Tensor]
    head: nn.Module
    softcap: float | None
    vocabulary: int

    def logits(self, hidden_TC: Tensor) -> Tensor:
        """Return float32 logits [T, V]; a fresh buffer keeps the arithmetic independent of where the piece lay."""
        logits: Tensor = self.head(hidden_TC.clone()).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def chunk(self) -> int:
        """Return how many tokens' logits to hold at once."""
        return max(1, CHUNK_LOGITS // self.vocabulary)


@dataclass(frozen=True)
class Loop:
    """How to go over windows: how many at a time, on which device, and how to show it."""

    batch: int
    device: torch.device
    progress: Progress


@torch.no_grad()
def reader(model: Any, sample_ids: Tensor) -> Reader:
    """Split ``model`` into decoder and output embedding, checked against ``model(...)`` on ``sample_ids`` [1, S].

    A model that does something else between the two (a logit scale, say) is read whole instead, with a warning.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    ids = sample_ids[:, :32].to(device_of(model))
    whole = model(input_ids=ids, use_cache=False).logits[0].float()
    if head is not None:
        split = Reader(
            lambda x: model.base_model(input_ids=x, use_cache=False).last_hidden_state,
            head,
            getattr(config, "final_logit_softcapping", None),
            whole.shape[-1],
        )
        off, tolerance = _deviation(split, ids, whole), max(1e-4, 4 * torch.finfo(head_dtype(model)).eps)
        if off <= tolerance or not bool(torch.isfinite(whole).all()):
            return split
        log.warning("logits in pieces differ from the model's by %.1e (relative); using whole logits: more memory", off)
    return Reader(lambda x: model(input_ids=x, use_cache=False).logits, nn.Identity(), None, whole.shape[-1])


def _deviation(split: Reader, ids: Tensor, whole: Tensor) -> float:
    """Return the largest difference from the logits ``whole`` [S, V], relative to their largest size."""
    pieces = split.logits(split.run(ids)[0])
    if pieces.shape != whole.shape:
        return math.inf
    return float((pieces - whole).abs().max() / whole.abs().max().clamp(min=1e-30))


def device_of(model: Any) -> torch.device:
    """Return the device that token ids go to."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def head_dtype(model: Any) -> torch.dtype:
    """Return the floating dtype of the model's arithmetic (the embedding's; heads may be quantized)."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def windows(ids: Tensor, size: int, bos: int | None, name: str) -> Tensor:
    """Cut int64 [N] into int64 [W, size], dropping the tail; ``bos`` (every_window) takes the first place of each.

    Raises: UserError if the text ``name`` does not fill one window.
    """
    body = size - (bos is not None)
    count = len(ids) // body
    if count == 0:
        raise UserError(
            f"the text of {name} has {len(ids)} tokens",
            f"one window of {size}",
            "eval.window_tokens=<fewer> or a longer text",
        )
    rows = ids[: count * body].view(count, body)
    return rows if bos is None else torch.cat([torch.full((count, 1), bos), rows], dim=1)


@torch.no_grad()
def hidden_states(source: Reader, windows_WS: Tensor, loop: Loop, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids [S], hidden [S, C]) window after window, on the device, running ``loop.batch`` of them at a time."""
    for start in loop.progress(label, range(0, len(windows_WS), loop.batch)):
        ids = windows_WS[start : start + loop.batch].to(loop.device)
        yield from zip(ids, source.run(ids), strict=True)


def perplexity(losses: Sequence[float]) -> float:
    """Return exp(mean of the window losses); infinity if it overflows, nan if a loss is."""
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.nan if math.isnan(mean) else math.inf


def interval(losses: Sequence[float], seed: int) -> list[float]:
    """Return the 95 % percentile-bootstrap interval [low, high] of the perplexity over windows, seeded."""
    import numpy

    values = numpy.asarray(losses, dtype=numpy.float64)
    picks = numpy.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    with numpy.errstate(over="ignore"):
        low, high = numpy.exp(numpy.quantile(values[picks].mean(axis=1), [0.025, 0.975]))
    return [float(low), float(high)]
