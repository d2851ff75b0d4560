"""Learn an offset before rounding for every weight, and how far each range goes, by the sign of gradients (SignRound).

    ŵ = s (clamp(round(w / s + V) + z, 0, 2^b - 1) - z),  V in [-1/2, 1/2]
with s and z of the range [low * min W, high * max W], low and high in [0, 1] learned along. V starts at 0: plain
rounding. Signed steps that shrink linearly let every V cross half a step within the budget.

Source: arXiv:2309.05516 eq. 3-5 and Algorithm 1, intel/auto-round; methods/block_reconstruction.md section 10.
Differs: the state is chosen on held-out sequences, not by the loss of a single batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.minimise import Knobs
from qexp.core.stages import Grid
from qexp.core.straight import on_grid
from qexp.core.training import Training
from qexp.core.words import Quantized, Stats
from qexp.stages.solver._shared_uniform import Start, start


@dataclass(frozen=True, kw_only=True)
class SignRound:
    """``rate`` of offsets and ranges; 0 takes 1 / steps, twice that at 3 bits or less and 1000 steps or more."""

    rate: float
    training: Training

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Raise UserError where the rate would follow from a number of steps that is not given."""
        if not self.rate and not self.training.steps:
            key = "method.solver"
            raise UserError(f"{key}.rate=0, which takes 1 / steps, with steps=0", "either", f"{key}.training.steps=200")

    def norms_rate(self, bits: int) -> float:
        """Return 0: norms stay."""
        return 0.0

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return where learning starts: plain rounding."""
        return self.rounding(W_OI, stats, grid, rng).quantized()

    def rounding(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Offsets:
        """Return the rounding of one weight at its start."""
        steps = self.training.steps
        auto = (2.0 if grid.bits <= 3 and steps >= 1000 else 1.0) / max(1, steps)
        return Offsets(start(W_OI, stats, grid), self.rate or auto)


class Offsets:
    """One weight with learned offsets and ranges."""

    def __init__(self, begun: Start, rate: float) -> None:
        self.begun, self.own_zero = begun, begun.own_zero
        self.V = torch.zeros_like(begun.W).requires_grad_()
        self.low, self.high = (torch.ones_like(begun.scale).requires_grad_() for _ in range(2))
        self.knobs: Sequence[Knobs] = [Knobs("offsets", [self.V, self.low, self.high], rate)]

    def rounded(self) -> Tensor:
        """Return the rounded weight [O, I]."""
        return self._on_grid()[0]

    def quantized(self) -> Quantized:
        """Return the codes and the learned range."""
        with torch.no_grad():
            scale, zero = self._spacing()
            return self.begun.quantized(self._on_grid()[1], scale, zero)

    @torch.no_grad()
    def project(self) -> None:
        """Keep offsets within half a step and ranges within the start's."""
        self.V.clamp_(-0.5, 0.5)
        self.low.clamp_(0, 1)
        self.high.clamp_(0, 1)

    def _spacing(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero [O, G] of the cut range; where the grid has no zero of its own it stays."""
        b = self.begun
        below, above = b.zero * self.low, (b.top - b.zero) * self.high  # in steps of the start
        if not self.own_zero:
            return b.scale * torch.maximum(self.low, self.high), b.zero
        width = (below + above).clamp(min=1e-3)
        return b.scale * width / b.top, (below * b.top / width).detach().round()

    def _on_grid(self) -> tuple[Tensor, Tensor]:
        scale, zero = self._spacing()
        scale = self.begun.met(scale)
        return on_grid(self.begun.W / scale[..., None] + self.V, scale, zero, self.begun.top)
