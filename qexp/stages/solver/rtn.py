"""Round every weight to the nearest point of its grid: the baseline of every paper.

Source: methods/rtn.md. The range search, where there is one, belongs to the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.stages import Grid
from qexp.core.words import Quantized, Stats


@dataclass(frozen=True, kw_only=True)
class Rtn:
    """Round to nearest; statistics only where the grid asks for them."""

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return the nearest codes [O, I/D] of a float32 weight."""
        params = grid.fit(W_OI, stats.H_II if stats is not None and grid.needs else None)
        return Quantized(grid.encode(W_OI, params), params)
