"""What transforms share: the sites that a recipe may name, and random orthogonal matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qexp.core.errors import choose

PLACES = ("attn_in", "value", "attn_out", "mlp_in", "mlp_mid")


def check_places(member: str, places: Sequence[str]) -> None:
    """Raise UserError for a kind of site that there is not, or that no statistics are taken of."""
    for place in places:
        choose(f"transform.{member}.places", place, PLACES, f"method.transform.{member}.places")


def smaller_side(size: int) -> int:
    """Return the largest divisor p of ``size`` with p <= size / p: the smaller side of a Kronecker product."""
    return max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)


def random_orthogonal(size: int, rng: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float64, uniformly distributed: Q of a Gaussian matrix, signs fixed."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))
    turn: Tensor = q * r.diagonal().sign()
    return turn.contiguous()
