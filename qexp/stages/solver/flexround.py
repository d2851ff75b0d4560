"""Learn which grid point each weight takes by dividing it: every weight has a positive factor of its own (FlexRound).

    q = clamp(round(w / exp(D)) + z, 0, 2^b - 1),  ŵ = s (q - z),  D = log s + S + r
with the step s of a row (or group), S [O, I] and r [O, 1] learned in the log domain, z fixed. S and r start at zero:
plain rounding on the start grid. A weight's pull is proportional to its size, so large ones may cross several grid
points. LRQ writes S as L U + c: a factor for each weight from far fewer numbers, which overfits less.

Source: arXiv:2306.00317 (FlexRound), arXiv:2407.11534 eq. 2 (LRQ), code 59d4665; methods/lrq.md.
Differs: the loss is a mean, not a sum over tokens (Adam hardly notices); the best state is kept; scales are met as they
are stored. LRQ is low-rank in every layer, as the paper counts it; the code falls back to the full S in many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.minimise import Knobs
from qexp.core.stages import Grid
from qexp.core.straight import on_grid
from qexp.core.training import Training
from qexp.core.words import Quantized, Stats
from qexp.stages.solver._shared_uniform import Start, start


@dataclass(frozen=True, kw_only=True)
class FlexRound:
    """``rank`` of L U, 0 for the full S; never above half of the smaller side. ``rate`` of everything learned."""

    rank: int
    rate: float
    training: Training

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def norms_rate(self, bits: int) -> float:
        """Return 0: norms stay."""
        return 0.0

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return where learning starts: plain rounding."""
        return self.rounding(W_OI, stats, grid, rng).quantized()

    def rounding(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Division:
        """Return the rounding of one weight at its start."""
        begun = start(W_OI, stats, grid)
        if not self.rank:
            return Division(begun, self.rate, {"S": torch.zeros_like(W_OI)})
        outputs, inputs = W_OI.shape
        rank = max(1, min(self.rank, min(outputs, inputs) // 2))
        U = (2 * torch.rand(rank, inputs, generator=rng) - 1) / inputs**0.5  # Kaiming uniform with a = sqrt 5
        factors = {"L": W_OI.new_zeros(outputs, rank), "U": U.to(W_OI), "c": W_OI.new_zeros(1, inputs)}
        return Division(begun, self.rate, factors)


class Division:
    """One weight divided by learned factors."""

    def __init__(self, begun: Start, rate: float, factors: dict[str, Tensor]) -> None:
        self.begun, self.factors = begun, {name: t.requires_grad_() for name, t in factors.items()}
        self.step = torch.zeros_like(begun.scale).requires_grad_()  # log s - log s at the start
        self.row = begun.scale.new_zeros(len(begun.W), 1).requires_grad_()
        self.knobs: Sequence[Knobs] = [Knobs("division", [self.step, self.row, *self.factors.values()], rate)]

    def rounded(self) -> Tensor:
        """Return the rounded weight [O, I]."""
        return self._on_grid()[0]

    def quantized(self) -> Quantized:
        """Return the codes and the learned step."""
        with torch.no_grad():
            return self.begun.quantized(self._on_grid()[1], self._scale(), self.begun.zero)

    def project(self) -> None:
        """Nothing is out of bounds in the log domain."""

    def log_factors(self) -> Tensor:
        """Return S, or L U + c, plus r: [O, I]."""
        known = self.factors
        return (known["S"] if "S" in known else known["L"] @ known["U"] + known["c"]) + self.row

    def _scale(self) -> Tensor:
        return self.begun.scale * self.step.exp()

    def _on_grid(self) -> tuple[Tensor, Tensor]:
        begun, scale = self.begun, self.begun.met(self._scale())
        levels = begun.W / (scale[..., None] * self.log_factors().exp().view_as(begun.W))
        return on_grid(levels, scale, begun.zero, begun.top)
