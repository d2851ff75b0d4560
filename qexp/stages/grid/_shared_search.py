"""The search of a slice's range: candidate ranges are tried, and the one with the least error is kept.

The strictly smallest error wins, so that ties keep the wider range. It is vectorised over rows in chunks: the peak is a
few chunks, never a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from qexp.stages.grid._shared import slices

Range = tuple[Tensor, Tensor]
"""The lower and upper end of every slice, each [O, G], with zero between them."""

RANGES = ("minmax", "mse", "diag_h", "output")
BLIND = {"minmax": "minmax", "mse": "mse", "diag_h": "mse", "output": "minmax"}
"""What stands for a rule without a Hessian: in a search that rounds candidates; a solver gets one (``needs``)."""

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}  # stays in a core's cache; fills a GPU without filling its memory


def extremes(W_OGg: Tensor) -> Range:
    """Return the range of every slice, widened to contain zero."""
    lo, hi = torch.aminmax(W_OGg, dim=-1)
    return lo.clamp_(max=0), hi.clamp_(min=0)


def shrink(ends: Range, ratio: float) -> Range:
    """Return the range with both ends times ``ratio``."""
    return ends[0] * ratio, ends[1] * ratio


def clip(ends: Range, ratio: float) -> Range:
    """Return the range cut at ``ratio`` times its larger magnitude on both sides (AWQ's clip)."""
    limit = torch.maximum(-ends[0], ends[1]) * ratio
    return torch.maximum(ends[0], -limit), torch.minimum(ends[1], limit)


def candidates(rule: str, grid: int, steps: int) -> list[Callable[[Range], Range]]:
    """Return the changes of a range that a rule searches: times 1 - i / ``grid``, i below ``steps``."""
    change = clip if rule == "output" else shrink
    return [partial(change, ratio=1 - i / grid) for i in range(steps)]


def search_range(
    W_OGg: Tensor,
    candidates: Iterable[Callable[[Range], Range]],
    quantize: Callable[[Tensor, Range], Tensor],
    measure: Callable[[Tensor], Tensor],
) -> Range:
    """Return per slice the candidate range with the least error.

    ``quantize`` maps (weights, range) to a new tensor of quantized weights, ``measure`` maps a difference
    [o, G, g] of some rows to errors [o, G]. A candidate whose error is not finite is never taken.
    """
    candidates = list(candidates)
    rows = max(1, CHUNK_ELEMENTS.get(W_OGg.device.type, 1 << 18) // W_OGg[0].numel())
    best = [_search_rows(W, candidates, quantize, measure) for W in torch.split(W_OGg, rows)]
    return torch.cat([lo for lo, _ in best]), torch.cat([hi for _, hi in best])


def _search_rows(
    W_OGg: Tensor,
    candidates: Iterable[Callable[[Range], Range]],
    quantize: Callable[[Tensor, Range], Tensor],
    measure: Callable[[Tensor], Tensor],
) -> Range:
    """Search the ranges of one chunk of rows."""
    full = best = extremes(W_OGg)
    least = torch.full_like(full[0], torch.inf)
    for candidate in candidates:
        ends = candidate(full)
        error = measure(quantize(W_OGg, ends).sub_(W_OGg))
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, ends[0], best[0]), torch.where(better, ends[1], best[1])
    return best


def measure_of(
    rule: str, H_JJ: Tensor | None, exponent: float, outputs: int, group: int, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Return what a rounding error costs by a rule: mse, diag_h or output."""
    if H_JJ is None or rule == "mse":
        return power_error(exponent)
    H_JJ = H_JJ.to(dtype)
    return weighted_error(H_JJ.diagonal(), outputs, group) if rule == "diag_h" else output_error(H_JJ, group)


def power_error(exponent: float) -> Callable[[Tensor], Tensor]:
    """Return the measure sum |difference| ** exponent over a slice."""
    return lambda E_OGg: E_OGg.abs_().pow_(exponent).sum(-1)


def weighted_error(h_J: Tensor, outputs: int, group: int) -> Callable[[Tensor], Tensor]:
    """Return the measure sum_j h_j difference_j² over a slice: the output error if inputs were uncorrelated."""
    h_1Gg = h_J.repeat(outputs).view(1, 1, -1) if group == 0 else slices(h_J[None], group)
    return lambda E_OGg: E_OGg.square_().mul_(h_1Gg).sum(-1)


def output_error(H_JJ: Tensor, group: int) -> Callable[[Tensor], Tensor]:
    """Return the measure e H_gg eᵀ over a slice: the mean squared output error if other groups were exact."""
    width = len(H_JJ) if group == -1 else group
    H_Ggg = H_JJ.view(-1, width, len(H_JJ) // width, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def measure(E_OGg: Tensor) -> Tensor:
        E_GOg = E_OGg.transpose(0, 1)
        return (E_GOg @ H_Ggg).mul_(E_GOg).sum(-1).T

    return measure
