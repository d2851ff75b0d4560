"""The spacing of a uniform grid while it is learned: in float32, and met as it will be stored.

So the block that trains is the block that is kept. Source: methods/block_reconstruction.md section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qexp.core.ranges import Uniform
from qexp.core.straight import straight
from qexp.core.words import Params

FLOOR = 1e-6  # of a scale, as a share of its start: never zero, never of another sign


@dataclass(frozen=True)
class Spacing:
    """Where the scale and zero [O, G] of a grid start ([1, 1] where one scale serves the whole weight)."""

    grid: Uniform
    scale: Tensor
    zero: Tensor

    def met(self, scale: Tensor) -> Tensor:
        """Return a learned scale as it is stored, with the gradient of the learned one."""
        return straight(scale, self.grid.spacing(self.grid.stored(self._floored(scale), self.zero))[0])

    def params(self, scale: Tensor, zero: Tensor, rows: int) -> Params:
        """Return the parameters that keep a learned spacing, for ``rows`` rows."""
        params = self.grid.stored(self._floored(scale), zero.detach())
        return {name: p.expand(rows, -1).contiguous() for name, p in params.items()}

    def _floored(self, scale: Tensor) -> Tensor:
        return (scale.detach() / self.scale).clamp(min=FLOOR) * self.scale
