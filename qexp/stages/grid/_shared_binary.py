"""All binary codes whose levels are integers of a finer uniform grid, and which of them suits a slice (GPTQT).

A code is (base, d_1 <= ... <= d_m): its 2^m levels are base plus sums of the d, all distinct and inside 0 .. 2^n - 1.
All codes are tried at the cost of two matrix products: a slice's weights fall into 2^n cells, whose moments decide.

Source: methods/gptqt.md section 3.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor


@cache
def codes(fine_bits: int, bits: int) -> Tensor:
    """Return all codes, int64 [B, 1 + m]."""
    top, found = (1 << fine_bits) - 1, []
    for gaps in itertools.combinations_with_replacement(range(1, top + 1), bits):
        if sum(gaps) > top:
            continue
        sums = {sum(chosen) for count in range(bits + 1) for chosen in itertools.combinations(gaps, count)}
        if len(sums) == 1 << bits:
            found += [(base, *gaps) for base in range(top - sum(gaps) + 1)]
    return torch.tensor(found)


def patterns(bits: int, like: Tensor) -> Tensor:
    """Return the bits of all codes [2^m, m] as 0 and 1."""
    code = torch.arange(1 << bits, device=like.device)
    return ((code[:, None] >> torch.arange(bits, device=like.device)) & 1).to(like)


def snapped(codes_Bm: Tensor, fine_bits: int) -> Tensor:
    """Return the nearest level [B, 2^n] of each code to each integer of the fine grid; the lower one at ties."""
    levels = codes_Bm[:, :1] + codes_Bm[:, 1:] @ patterns(codes_Bm.shape[1] - 1, codes_Bm).T
    levels = levels.sort(1).values
    integers = torch.arange(1 << fine_bits, device=levels.device).to(levels).expand(len(levels), -1).contiguous()
    between = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    return levels.gather(1, torch.searchsorted(between, integers))


def errors(u_Ng: Tensor, h_Ng: Tensor, levels_BV: Tensor) -> Tensor:
    """Return sum h (u - level)² [N, B] for numbers u in units of the fine grid, each at the level of its cell."""
    cells = levels_BV.shape[1]
    cell = u_Ng.round().clamp(0, cells - 1).long()
    sums = [u_Ng.new_zeros(len(u_Ng), cells).scatter_add_(1, cell, h_Ng * u_Ng**p) for p in range(3)]
    found: Tensor = sums[2].sum(1, keepdim=True) - 2 * sums[1] @ levels_BV.T + sums[0] @ levels_BV.square().T
    return found
