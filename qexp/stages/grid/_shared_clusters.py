"""Weighted clustering of numbers: the least sum of f (x - level)² with L levels for each slice, by dynamic programming.

Sorted numbers are cut into cells (all numbers apart where a slice is short), the best union of cells into L segments is
found exactly, and a few of Lloyd's steps on the numbers themselves follow. All slices go at once, in chunks.

Source: methods/squeezellm.md section 3 (better k-means); 1-D k-means by dynamic programming: Wang and Song 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_CELLS = 128  # as many of equal weight (of its root) as of equal width
LLOYD_STEPS = 20
CHUNK_ELEMENTS = 1 << 23  # of the cost matrices


def cluster(x_Ng: Tensor, f_Ng: Tensor, levels: int) -> Tensor:
    """Return the levels [N, L] of slices x with weights f >= 0, rising; a slice without weight counts all alike."""
    cells = min(x_Ng.shape[1], 2 * HALF_CELLS + levels) + 1
    rows = max(1, CHUNK_ELEMENTS // (cells * cells))
    parts = zip(x_Ng.split(rows), f_Ng.split(rows), strict=True)
    return torch.cat([_cluster(x.double(), f.double(), levels) for x, f in parts]).to(x_Ng)


def _cluster(x_Ng: Tensor, f_Ng: Tensor, levels: int) -> Tensor:
    total = f_Ng.sum(1, keepdim=True)
    f_Ng = torch.where(total > 0, f_Ng / total.clamp(min=1e-300), 1 / x_Ng.shape[1])
    x_Ng, order = x_Ng.sort(1)
    f_Ng = f_Ng.gather(1, order)
    middle = x_Ng.mean(1, keepdim=True)  # sums of squares are taken around it, so that they cancel little
    sums = _sums(x_Ng - middle, f_Ng)
    edges = _edges(x_Ng, f_Ng, levels)
    cuts = _best_cuts(sums.gather(2, edges.expand(3, -1, -1)), levels)
    found = _means(sums, edges.gather(1, cuts), x_Ng - middle)
    for _ in range(LLOYD_STEPS):
        found = _lloyd(x_Ng - middle, sums, found)
    return (found + middle).sort(1).values


def _sums(x: Tensor, f: Tensor) -> Tensor:
    """Return the running sums of f, f x and f x², [3, N, g + 1]."""
    return torch.nn.functional.pad(torch.stack([f, f * x, f * x * x]).cumsum(-1), (1, 0))


def _edges(x: Tensor, f: Tensor, levels: int) -> Tensor:
    """Return where cells begin and end, int64 [N, C + 1] rising: positions in the sorted slice.

    The widest gaps are among them: numbers of at most L kinds are told apart.
    """
    count = x.shape[1]
    if count <= 2 * HALF_CELLS + levels:
        return torch.arange(count + 1, device=x.device).expand(len(x), -1)
    share = torch.arange(1, HALF_CELLS, device=x.device, dtype=x.dtype) / HALF_CELLS
    mass = f.sqrt().cumsum(1)
    by_mass = torch.searchsorted(mass, mass[:, -1:] * share)
    by_value = torch.searchsorted(x, x[:, :1] + (x[:, -1:] - x[:, :1]) * share)
    gaps = x.diff().topk(levels - 1, dim=1).indices + 1
    ends = x.new_tensor([0, count], dtype=torch.long).expand(len(x), 2)
    return torch.cat([by_mass, by_value, gaps, ends], dim=1).clamp(0, count).sort(1).values


def _best_cuts(sums: Tensor, levels: int) -> Tensor:
    """Return the ends of the best L segments, int64 [N, L + 1]: numbers of edges, whose ``sums`` are [3, N, C + 1]."""
    zero, one, two = (s[:, None, :] - s[:, :, None] for s in sums)  # from edge i (rows) to edge j (columns)
    cost = two - one.square() / zero.clamp(min=1e-300)
    cost = torch.where(zero > 0, cost.clamp(min=0), 0).float()
    later = torch.ones(cost.shape[1:], dtype=torch.bool, device=cost.device).tril(-1)
    cost.masked_fill_(later, torch.inf)
    best, came = cost[:, 0], []
    for _ in range(levels - 1):
        best, at = (best[:, :, None] + cost).min(1)
        came.append(at)
    last = torch.full((len(best), 1), best.shape[1] - 1, device=best.device)
    cuts = [last]
    for at in reversed(came):
        cuts.append(at.gather(1, cuts[-1]))
    return torch.cat([*cuts, torch.zeros_like(last)], dim=1).flip(1)


def _means(sums: Tensor, ends: Tensor, x: Tensor, empty: Tensor | None = None) -> Tensor:
    """Return the weighted means [N, L] of the segments between ``ends`` [N, L + 1]; of ``empty`` ones what is given."""
    at = sums[:2].gather(2, ends.expand(2, -1, -1)).diff()
    first = x.gather(1, ends[:, :-1].clamp(max=x.shape[1] - 1)) if empty is None else empty
    return torch.where(at[0] > 0, at[1] / at[0].clamp(min=1e-300), first)


def _lloyd(x: Tensor, sums: Tensor, found: Tensor) -> Tensor:
    """Return the means of what is nearest to each level."""
    found = found.sort(1).values
    inner = torch.searchsorted(x, ((found[:, 1:] + found[:, :-1]) / 2).contiguous(), right=True)
    ends = torch.nn.functional.pad(inner, (1, 1))
    ends[:, -1] = x.shape[1]
    return _means(sums, ends, x, found)
