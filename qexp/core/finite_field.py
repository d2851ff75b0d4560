"""The little of GF(p^k) that Paley matrices need: differences of elements and which of them are squares.

Element number e of GF(p^k) is the polynomial whose coefficients are the base-p digits of e, lowest first.

Source: methods/hadamard.md section 3.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

Polynomial = tuple[int, ...]


def prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def character(q: int) -> Tensor:
    """Return the quadratic character of GF(q), int8 [q]: 0 at 0, 1 at non-zero squares, -1 elsewhere.

    Raises: ValueError if q is not an odd prime power.
    """
    p, k = _field(q)
    modulus = irreducible(p, k)
    squares = {_number(_remainder(_product(e, e, p), modulus, p), p) for e in _elements(p, k)}
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[sorted(squares)] = 1
    chi[0] = 0
    return chi


def differences(q: int, minuend: int) -> Tensor:
    """Return the element numbers of a_minuend - a_j for all j, int64 [q]; coefficients subtract mod p."""
    p, k = _field(q)
    j, total = torch.arange(q), torch.zeros(q, dtype=torch.int64)
    for place in (p**i for i in range(k)):
        total += (minuend // place - j // place) % p * place
    return total


def irreducible(p: int, k: int) -> Polynomial:
    """Return the first monic polynomial of degree k over Z/p that no monic polynomial of lower degree divides."""
    smaller = [(*low, 1) for degree in range(1, k // 2 + 1) for low in _elements(p, degree)]
    monic = ((*low, 1) for low in _elements(p, k))
    return next(f for f in monic if all(any(_remainder(f, g, p)) for g in smaller))


def _field(q: int) -> tuple[int, int]:
    found = prime_power(q)
    if found is None or q % 2 == 0:
        raise ValueError(f"q={q} is not an odd prime power")
    return found


def _elements(p: int, k: int) -> itertools.product[Polynomial]:
    return itertools.product(range(p), repeat=k)


def _number(f: Polynomial, p: int) -> int:
    return sum(c * p**i for i, c in enumerate(f))


def _product(f: Polynomial, g: Polynomial, p: int) -> Polynomial:
    total = [0] * (len(f) + len(g) - 1)
    for (i, a), (j, b) in itertools.product(enumerate(f), enumerate(g)):
        total[i + j] = (total[i + j] + a * b) % p
    return tuple(total)


def _remainder(f: Polynomial, monic: Polynomial, p: int) -> Polynomial:
    """Return f modulo a monic polynomial, as many coefficients as its degree."""
    left, degree = list(f), len(monic) - 1
    while len(left) > degree:
        lead = left.pop()
        for i, c in enumerate(monic[:-1]):
            at = len(left) - degree + i
            left[at] = (left[at] - lead * c) % p
    return tuple(left)
