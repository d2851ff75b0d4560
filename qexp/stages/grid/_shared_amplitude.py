"""Levels for the length of D of n coordinates of a point that is uniform on a sphere: r²  D / n ~ Beta(D/2, (n - D)/2).

Lengths are in units of their root mean square, so that the squares have mean 1 whatever the row. The last level stands
apart: errors fed forward make targets longer than the law says.

Source: methods/pvq.md section 3 (quantile and Lloyd-Max rules) and 5 (head-room); Lloyd 1982. Centroids are closed
forms: r times the density of Beta(a, b) is a multiple of that of Beta(a + 1/2, b).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

Law = tuple[float, float]
"""The two parameters of a Beta distribution."""

HEAD_ROOM = 1.3  # the last level, in units of ...
RARE = 0.999  # ... this quantile
ITERATIONS, SETTLED = 3000, 1e-9  # of Lloyd's algorithm: 6 bits end within 1e-3 of the least error
STEP = 2.0**-16  # levels are its multiples: the same on every machine, and exact in float32


@cache
def levels(dim: int, columns: int, bits: int, rule: str) -> tuple[float, ...]:
    """Return 2^bits rising levels for ``dim`` of ``columns`` coordinates."""
    from scipy.special import betaincinv

    law, unit = law_of(dim, columns), (columns / dim) ** 0.5
    inner = unit * RULES[rule](law, (1 << bits) - 1)
    last = HEAD_ROOM * unit * betaincinv(*law, RARE) ** 0.5
    return tuple(((np.append(inner, last) / STEP).round() * STEP).tolist())


def law_of(dim: int, columns: int) -> Law:
    """Return the law of the squared length, in units of the squared norm of the row."""
    return dim / 2, max(columns - dim, 1) / 2  # alone in its row, a group has length 1: next to nothing is left over


def beta_quantile(law: Law, count: int) -> np.ndarray:
    """Return lengths in the middle of ``count`` equally probable ranges."""
    from scipy.special import betaincinv

    lengths: np.ndarray = np.sqrt(betaincinv(*law, (np.arange(count) + 0.5) / count))
    return lengths


def beta_lloyd(law: Law, count: int) -> np.ndarray:
    """Return the ``count`` lengths of least mean squared error, from those of equal probability on."""
    from scipy.special import beta, betainc

    (a, b), lengths = law, beta_quantile(law, count)
    mean = beta(a + 0.5, b) / beta(a, b)
    for _ in range(ITERATIONS):
        cuts = np.concatenate([[0], (lengths[1:] + lengths[:-1]) / 2, [1]]) ** 2
        before, lengths = lengths, mean * np.diff(betainc(a + 0.5, b, cuts)) / np.diff(betainc(a, b, cuts))
        if np.abs(lengths - before).max() < SETTLED:
            break
    return lengths


RULES: dict[str, Callable[[Law, int], np.ndarray]] = {"beta_lloyd": beta_lloyd, "beta_quantile": beta_quantile}
