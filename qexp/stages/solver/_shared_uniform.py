"""What solvers that learn share: a uniform grid's start, its spacing as it is stored, and codes.

Source: methods/block_reconstruction.md section 4. A scale is learned in float32 and met as it will be stored, so that
the block that trains is the block that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.ranges import Uniform, bare
from qexp.core.stages import Grid
from qexp.core.straight import slices, straight
from qexp.core.words import Params, Quantized, Stats

FLOOR = 1e-6  # of a scale, as a share of its start: never zero


@dataclass(frozen=True)
class Start:
    """A weight on its fitted grid: slices [O, G, g], scale and zero [O, G] (of its own or the grid's), largest code.

    [1, 1] where one scale serves the whole weight.
    """

    W: Tensor
    scale: Tensor
    zero: Tensor
    top: int
    grid: Uniform
    own_zero: bool

    def met(self, scale: Tensor) -> Tensor:
        """Return a learned scale as it is stored, with the gradient of the learned one."""
        return straight(scale, self.grid.spacing(self.grid.stored(self._kept(scale), self.zero))[0])

    def quantized(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Quantized:
        """Return codes [O, G, g] and the spacing as they are kept."""
        params = self.grid.stored(self._kept(scale), zero.detach())
        params = {name: p.expand(len(self.W), -1).contiguous() for name, p in params.items()}
        return Quantized(codes.detach().round().to(torch.uint8).flatten(1), params)

    def _kept(self, scale: Tensor) -> Tensor:
        """Return a scale at least the floor's size, of the sign it began with."""
        return (scale.detach() / self.scale).clamp(min=FLOOR) * self.scale


def start(W_OI: Tensor, stats: Stats | None, grid: Grid) -> Start:
    """Return the weight on the grid that is fitted to it. Raises: UserError for a grid that is not uniform."""
    uniform = bare(grid)
    if not isinstance(uniform, Uniform):
        got = f"a solver that learns on the values of {type(uniform).__name__}"
        raise UserError(got, "a uniform grid", "method/grid=integer")
    params: Params = grid.fit(W_OI, stats.H_II if stats is not None and grid.needs else None)
    scale, zero = uniform.spacing(params)
    if grid.group == 0:
        scale, zero = scale[:1], zero[:1]
    return Start(slices(W_OI, scale.shape[1]), scale, zero, uniform.top, cast("Uniform", uniform), "zero" in params)
