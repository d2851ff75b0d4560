"""What solvers that learn share: the weight on the grid that is fitted to it, and codes.

Source: methods/block_reconstruction.md section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.ranges import Uniform, bare
from qexp.core.spacing import Spacing
from qexp.core.stages import Grid
from qexp.core.straight import slices
from qexp.core.words import Quantized, Stats


@dataclass(frozen=True)
class Start:
    """A weight on its fitted grid: slices [O, G, g], the spacing, the largest code; ``own_zero``: zeros are stored."""

    W: Tensor
    spacing: Spacing
    top: int
    own_zero: bool

    @property
    def scale(self) -> Tensor:
        """Return the scale [O, G] at the start."""
        return self.spacing.scale

    @property
    def zero(self) -> Tensor:
        """Return the zero [O, G] at the start."""
        return self.spacing.zero

    def met(self, scale: Tensor) -> Tensor:
        """Return a learned scale as it is stored, with the gradient of the learned one."""
        return self.spacing.met(scale)

    def quantized(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Quantized:
        """Return codes [O, G, g] and the spacing as they are stored."""
        params = self.spacing.params(scale, zero, len(self.W))
        return Quantized(codes.detach().round().to(torch.uint8).flatten(1), params)


def start(W_OI: Tensor, stats: Stats | None, grid: Grid) -> Start:
    """Return the weight on the grid that is fitted to it. Raises: UserError for a grid that is not uniform."""
    uniform = bare(grid)
    if not isinstance(uniform, Uniform):
        got = f"a solver that learns on the values of {type(uniform).__name__}"
        raise UserError(got, "a uniform grid", "method/grid=integer")
    params = grid.fit(W_OI, stats.H_II if stats is not None and grid.needs else None)
    scale, zero = uniform.spacing(params)
    if grid.group == 0:
        scale, zero = scale[:1], zero[:1]
    spacing = Spacing(cast("Uniform", uniform), scale, zero)
    return Start(slices(W_OI, scale.shape[1]), spacing, uniform.top, "zero" in params)
