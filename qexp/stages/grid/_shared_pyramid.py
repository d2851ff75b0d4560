"""The pyramid: integer points y of D dimensions with sum |y_i| = K. How many there are, their numbers, the nearest one.

N(d, k) = N(d-1, k) + N(d-1, k-1) + N(d, k-1) points have d dimensions and k pulses. Points are numbered coordinate by
coordinate, smaller magnitudes first (0, +1, -1, +2, ...). With F(m) = N(d, m) - N(d-1, m) = 2 sum over j < m of
N(d-1, j), the points whose first magnitude is below a > 0 are N(d, k) - F(k - a + 1): a number takes two look-ups for
each coordinate, and going back one binary search in F, which rises.

Source: Fischer 1986 (IEEE Trans. IT 32(4), recurrence and enumeration); methods/pvq.md section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice, takewhile

import torch
from torch import Tensor

ENCODERS = ("greedy", "project")
SLACK = 2.0**-16  # relative: a point of the lattice, computed a little too short, still rounds down to itself


def count_columns(dim: int) -> Iterator[list[int]]:
    """Yield N(0, k) .. N(dim, k) for k = 0, 1, ..."""
    column = [1] * (dim + 1)
    while True:
        yield column
        before, column = column, [0]
        for d in range(1, dim + 1):
            column.append(column[-1] + before[d - 1] + before[d])


@cache
def most_pulses(dim: int, bits: int) -> int:
    """Return the largest K whose points a number of ``bits`` bits can tell apart; ``dim`` is 2 or more."""
    return sum(1 for _ in takewhile(lambda column: column[-1] <= 1 << bits, count_columns(dim))) - 1


@cache
def number_bits(dim: int, pulses: int) -> int:
    """Return the bits of a point's number, the least integer not below log2 N(dim, pulses)."""
    column = next(islice(count_columns(dim), pulses, None))
    return (column[-1] - 1).bit_length()


@cache
def counts(dim: int, pulses: int) -> Tensor:
    """Return N as int64 [dim + 1, pulses + 1], which N(dim, pulses) must fit."""
    return torch.tensor(list(islice(count_columns(dim), pulses + 1))).T.contiguous()


def numbers(y_MD: Tensor, pulses: int) -> Tensor:
    """Return the numbers, int64 [M], of points [M, D]."""
    N = counts(y_MD.shape[1], pulses).to(y_MD.device)
    left = torch.full_like(y_MD[:, 0], pulses, dtype=torch.int64)
    number = torch.zeros_like(left)
    for d, column in zip(range(y_MD.shape[1], 0, -1), y_MD.unbind(1), strict=True):
        v = column.long()
        m = left + 1 - v.abs().clamp(min=1)
        smaller = N[d, left] - N[d, m] + N[d - 1, m]
        left = left - v.abs()
        number += torch.where(v == 0, 0, smaller + (v < 0) * N[d - 1, left])
    return number


def points(number_M: Tensor, dim: int, pulses: int) -> Tensor:
    """Return the points [M, D], int16, of numbers [M]: what undoes :func:`numbers`."""
    N = counts(dim, pulses).to(number_M.device)
    number, left, y = number_M, torch.full_like(number_M, pulses), []
    for d in range(dim, 0, -1):
        smaller = N[d] - N[d - 1]  # F
        zero = number < N[d - 1, left]
        m = torch.searchsorted(smaller, N[d, left] - number).clamp_(1, pulses)
        rest = number - (N[d, left] - smaller[m])
        negative = rest >= N[d - 1, m - 1]
        magnitude = torch.where(zero, 0, left + 1 - m)
        number = torch.where(zero, number, rest - negative * N[d - 1, m - 1])
        left = left - magnitude
        y.append(torch.where(negative, -magnitude, magnitude).short())
    return torch.stack(y, 1)


def nearest(T_MD: Tensor, pulses: int, encoder: str) -> tuple[Tensor, Tensor]:
    """Return points y [M, D] near the directions of T, in its dtype, and the best lengths <t, y> / |y| [M].

    Both encoders round K |t| / sum |t| down. greedy then adds the pulses that are missing one by one where the cosine
    gains most, project to the largest remainders; the lowest coordinate wins ties. Zeros have no direction: the first.
    """
    largest_M1 = T_MD.abs().amax(1, keepdim=True)
    a_MD = T_MD.abs() / torch.where(largest_M1 == 0, 1, largest_M1)
    a_MD[:, :1] += largest_M1 == 0
    exact_MD = a_MD * (pulses * (1 + SLACK) / a_MD.sum(1, keepdim=True))
    y_MD = exact_MD.floor()
    missing_M1 = pulses - y_MD.sum(1, keepdim=True)
    if encoder == "greedy":
        _add_greedily(a_MD, y_MD, missing_M1)
    else:
        order = (exact_MD - y_MD).argsort(dim=1, descending=True, stable=True)
        few = torch.arange(y_MD.shape[1], device=y_MD.device) < missing_M1
        y_MD.scatter_add_(1, order, few.to(y_MD))
    length_M = (a_MD * y_MD).sum(1) / y_MD.square().sum(1).sqrt()
    return torch.where(T_MD < 0, -y_MD, y_MD), length_M * largest_M1[:, 0]


def _add_greedily(a_MD: Tensor, y_MD: Tensor, missing_M1: Tensor) -> None:
    """Add pulses to y, each to the coordinate that maximises the cosine <a, y> / |y|."""
    dot, energy = (a_MD * y_MD).sum(1, keepdim=True), y_MD.square().sum(1, keepdim=True)
    for _ in range(int(missing_M1.max())):
        best = (dot + a_MD).square_().div_((energy + 1) + 2 * y_MD).argmax(1, keepdim=True)
        pulse = (missing_M1 > 0).to(y_MD)
        dot += pulse * a_MD.gather(1, best)
        energy += pulse * (2 * y_MD.gather(1, best) + 1)
        y_MD.scatter_add_(1, best, pulse)
        missing_M1 -= pulse
