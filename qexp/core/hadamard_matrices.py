"""Hadamard matrices of small order, constructed (no tables), and the cheapest way to compose a large one.

A matrix of order K has entries +-1 and H H^T = K I. Orders come from Sylvester (2^k), Paley I (q + 1, q = 3 mod 4),
Paley II (2 (q + 1), q = 1 mod 4) over any prime-power field, and Williamson (92, 172). A size n is served by
H_K1 (x) H_K2 (x) ... (x) S_{2^power}; where none exists an orthonormal DCT-II of the odd part stands in.

Source: methods/hadamard.md sections 3, 5, 7. Paley, J. Math. Phys. 12 (1933); Williamson, Duke Math. J. 11 (1944).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qexp.core.finite_field import character, differences, prime_power
from qexp.kernels.graphs import constant
from qexp.kernels.hadamard import sylvester


@dataclass(frozen=True, kw_only=True)
class Orbits:
    """Four symmetric circulant sign rows of length m, each +1 at 0 and constant on the orbits of a multiplier group."""

    length: int
    multipliers: tuple[int, ...]
    representatives: tuple[int, ...]
    rows: tuple[str, str, str, str]

    def row(self, signs: str) -> Tensor:
        """Return the first row of one circulant, int8 [m]."""
        first = torch.ones(self.length, dtype=torch.int8)
        for representative, sign in zip(self.representatives, signs, strict=True):
            orbit = {s * representative * u % self.length for u in self.multipliers for s in (1, -1)}
            first[sorted(orbit)] = 1 if sign == "+" else -1
        return first


# Found by hashing pair sums of squared spectra (spec section 3); the unit tests prove H H^T = K I.
WILLIAMSON = {
    92: Orbits(
        length=23,
        multipliers=(1,),
        representatives=tuple(range(1, 12)),
        rows=("++-++--+-+-", "+-++--+++--", "+++--+-+-++", "-+++-----+-"),
    ),
    172: Orbits(
        length=43,
        multipliers=(1, 6, 36),
        representatives=(1, 2, 3, 4, 5, 9, 10),
        rows=("++++---", "++----+", "+-+-+-+", "-++--++"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Factorization:
    """How size n = prod(orders) * odd * 2^power is composed; odd > 1 means a DCT, for want of a Hadamard matrix."""

    orders: tuple[int, ...]
    odd: int
    power: int

    def __str__(self) -> str:
        """Return e.g. ``12 x 20 x 2^4`` or ``DCT_7 x 2^1``."""
        return " x ".join([*map(str, self.orders), *([f"DCT_{self.odd}"] if self.odd > 1 else []), f"2^{self.power}"])


def paley_one(q: int) -> Tensor:
    """Return I + S of order q + 1 with S = [[0, 1], [-1, Q]] skew, int8; q is a prime power = 3 mod 4."""
    return _bordered(q, corner=-1) + torch.eye(q + 1, dtype=torch.int8)


def paley_two(q: int) -> Tensor:
    """Return the symmetric matrix of order 2 (q + 1) from a conference matrix, int8; q is a prime power = 1 mod 4."""
    conference = _bordered(q, corner=1)
    outer = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, outer) + torch.kron(torch.eye(q + 1, dtype=torch.int8), diagonal)


def williamson(orbits: Orbits) -> Tensor:
    """Return the Williamson array of four symmetric circulants, int8 [4m, 4m]."""
    index = torch.arange(orbits.length)
    shift = (index[None, :] - index[:, None]) % orbits.length
    a, b, c, d = (orbits.row(signs)[shift] for signs in orbits.rows)
    rows = [(a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a)]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


@cache
def small_hadamard(order: int) -> Tensor:
    """Return the Hadamard matrix of an order of :func:`constructible`, int8 [order, order]; do not write to it."""
    if order & (order - 1) == 0:
        return sylvester(order.bit_length() - 1)
    if order in WILLIAMSON:
        return williamson(WILLIAMSON[order])
    return paley_one(order - 1) if _is_paley_one(order) else paley_two(order // 2 - 1)


@cache
def constructible(order: int) -> bool:
    """Tell whether one of Paley I, Paley II or a stored Williamson gives this order."""
    return order in WILLIAMSON or _is_paley_one(order) or _is_paley_two(order)


def dct(size: int) -> Tensor:
    """Return sqrt(size) times the orthonormal DCT-II, float64 [size, size]: entries at most sqrt(2) in magnitude."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2) * torch.cos(math.pi / size * k[:, None] * (k[None, :] + 0.5))
    matrix[0] = 1.0
    return matrix


@cache
@constant
def factorize(size: int) -> Factorization:
    """Return the composition of least work per element, sum of orders + number of twos.

    Raises: ValueError if size is below 1.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    power = (size & -size).bit_length() - 1
    odd = size >> power
    found = min(_splits(odd, power, 3), key=_work, default=None)
    return found or Factorization(orders=(), odd=odd, power=power)


def _bordered(q: int, corner: int) -> Tensor:
    """Border Q[i, j] = chi(a_i - a_j) with a row of 1 and a column of ``corner``, int8 [q + 1, q + 1]."""
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8)
    matrix[1:, 0] = corner
    matrix[0, 0] = 0
    chi = character(q)
    for i in range(q):  # row by row: the index of a whole matrix would take eight times its memory
        matrix[1 + i, 1:] = chi[differences(q, i)]
    return matrix


def _is_paley_one(order: int) -> bool:
    return order % 4 == 0 and prime_power(order - 1) is not None


def _is_paley_two(order: int) -> bool:
    return order % 8 == 4 and prime_power(order // 2 - 1) is not None


def _splits(odd: int, twos: int, least: int) -> Iterator[Factorization]:
    """Yield every product of constructible orders 2^t f (t >= 2, f >= least ascending, f > 1) that uses up ``odd``."""
    if odd == 1:
        yield Factorization(orders=(), odd=1, power=twos)
        return
    for factor in (f for f in range(least, odd + 1, 2) if odd % f == 0):
        for t in range(2, twos + 1):
            if not constructible(factor << t):
                continue
            for rest in _splits(odd // factor, twos - t, factor):
                yield Factorization(orders=(factor << t, *rest.orders), odd=1, power=rest.power)


def _work(found: Factorization) -> tuple[int, tuple[int, ...]]:
    return sum(found.orders) + found.power, found.orders
