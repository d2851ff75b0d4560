"""Round toward zero: of the two grid points around a weight take the one with the smaller magnitude.

A member of a package that is not qexp: it needs qexp.core, and nothing of qexp knows of it.

Source: IEEE 754-2019 section 4.3.2, roundTowardZero.
Differs: rounds to the points of any scalar grid, not to binary fractions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.stages import Grid
from qexp.core.words import Quantized, Stats


@dataclass(frozen=True, kw_only=True)
class TowardZero:
    """``share`` of the rows, from the first, is rounded toward zero, the rest to nearest."""

    share: float

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Raise UserError for a share outside [0, 1]."""
        if not 0 <= self.share <= 1:
            raise UserError(f"share={self.share}", "a number from 0 to 1", "method.solver.share=1")

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return codes and parameters of W_OI (float32, unchanged). Raises: UserError for a grid of vectors."""
        if grid.dim != 1:
            raise UserError(
                f"TowardZero on a grid of {grid.dim} columns per code", "a scalar grid", "method/grid=integer"
            )
        params = grid.fit(W_OI, None)
        codes = grid.encode(W_OI, params)
        nearest = grid.decode(codes, params)
        too_far = nearest.abs() > W_OI.abs()
        too_far[round(self.share * len(W_OI)) :] = False
        back = torch.where(too_far, nearest.sign(), 0.0).to(torch.int16)
        return Quantized((codes.to(torch.int16) - back).to(torch.uint8), params)
