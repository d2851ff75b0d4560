"""Train all of a block: weights, steps and zero points, through plain straight-through rounding (Block-AP).

    ŵ = s (clamp(round(w / s) + round(z), 0, 2^b - 1) - round(z)),  w, s, z learned, z within [0, 2^b - 1]
No rounding or clipping parameters: the weight itself moves. Starts as plain rounding. Inside the range dŵ/dw = 1 and
dŵ/ds = round(w/s) - w/s; a clipped weight has dŵ/dz = -s and pulls s by -z or 2^b - 1 - z. The norms of the block are
learned along, at the rate of the weights (code; the paper names w, s and z only).

Source: arXiv:2407.11062 section 3.2, code 78fd3fb, methods/efficientqat.md.
Differs: a scale's floor is relative to its start (the code's 1e-4 kills small weights); the best state is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.minimise import Knobs
from qexp.core.stages import Grid
from qexp.core.straight import on_grid, rounded, straight
from qexp.core.training import Training
from qexp.core.words import Quantized, Stats
from qexp.stages.solver._shared_uniform import Start, start


@dataclass(frozen=True, kw_only=True)
class BlockAp:
    """``rate`` of the weights, ``step_rate`` of steps and zero points.

    At 2 bits weights and norms take ``low_bit_factor`` times their rate. ``norm_rate`` 0 leaves the norms.
    """

    rate: float
    step_rate: float
    norm_rate: float
    low_bit_factor: float
    training: Training

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return where learning starts: plain rounding."""
        return self.rounding(W_OI, stats, grid, rng).quantized()

    def rounding(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Everything:
        """Return the rounding of one weight at its start."""
        return Everything(start(W_OI, stats, grid), self.rate * self._factor(grid.bits), self.step_rate)

    def norms_rate(self, bits: int) -> float:
        """Return the rate of the block's norms."""
        return self.norm_rate * self._factor(bits)

    def _factor(self, bits: int) -> float:
        return self.low_bit_factor if bits == 2 else 1.0


class Everything:
    """One weight, its steps and its zero points."""

    def __init__(self, begun: Start, rate: float, step_rate: float) -> None:
        self.begun = begun
        self.W = begun.W.clone().requires_grad_()
        self.scale, self.zero = (t.clone().requires_grad_() for t in (begun.scale, begun.zero))
        steps = [self.scale, self.zero] if begun.own_zero else [self.scale]
        self.knobs: Sequence[Knobs] = [Knobs("weights", [self.W], rate), Knobs("steps", steps, step_rate)]

    def rounded(self) -> Tensor:
        """Return the rounded weight [O, I]."""
        return self._on_grid()[0]

    def quantized(self) -> Quantized:
        """Return the codes of the trained weight, with the trained spacing."""
        with torch.no_grad():
            return self.begun.quantized(self._on_grid()[1], self.scale, self._zero())

    def project(self) -> None:
        """Bounds are in the forward pass, where gradients go straight through them."""

    def _zero(self) -> Tensor:
        if not self.begun.own_zero:
            return self.begun.zero
        whole = rounded(self.zero)
        return straight(whole, whole.detach().clamp(0, self.begun.top))

    def _on_grid(self) -> tuple[Tensor, Tensor]:
        scale = self.begun.met(self.scale)
        return on_grid(self.W / scale[..., None], scale, self._zero(), self.begun.top)
