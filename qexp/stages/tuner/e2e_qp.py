"""Train the steps of all quantized weights end to end, codes and zero points frozen (EfficientQAT's E2E-QP).

    ŵ = s (q - z),  dŵ/ds = q - z
down the next token's loss of the whole model. It follows any solver that leaves a uniform grid's codes.

Source: arXiv:2407.11062 section 3.3, code 78fd3fb, methods/efficientqat.md.
Differs: AdamW in float32 and not bitsandbytes'; one block's graph at a time in place of checkpointing inside the model;
the state is chosen on held-out sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.minimise import Knobs
from qexp.core.ranges import Uniform
from qexp.core.spacing import Spacing
from qexp.core.stages import Grid
from qexp.core.straight import slices
from qexp.core.training import Training
from qexp.core.words import Quantized


@dataclass(frozen=True, kw_only=True)
class E2eQp:
    """``rate`` of the steps; at 2 bits ``low_bit_factor`` times as much."""

    rate: float
    low_bit_factor: float
    training: Training

    version: ClassVar[int] = 1

    def decoding(self, quantized: Quantized, grid: Grid) -> Steps:
        """Return the steps of one weight. Raises: UserError for a grid that is not uniform."""
        if not isinstance(grid, Uniform):
            raise UserError(f"e2e_qp on a {type(grid).__name__}", "a uniform grid", "method/tuner=[]")
        return Steps(quantized, grid, self.rate * (self.low_bit_factor if grid.bits == 2 else 1.0))


class Steps:
    """The steps of one weight, whose codes stay."""

    def __init__(self, quantized: Quantized, grid: Grid, rate: float) -> None:
        self.codes = quantized.codes
        self.spacing = Spacing(cast("Uniform", grid), *cast("Uniform", grid).spacing(quantized.params))
        self.scale = self.spacing.scale.clone().requires_grad_()
        self.knobs: Sequence[Knobs] = [Knobs("steps", [self.scale], rate)]

    def rounded(self) -> Tensor:
        """Return the weight [O, I]."""
        met = self.spacing.met(self.scale)
        levels = slices(self.codes.to(met), met.shape[1]) - self.spacing.zero[..., None]
        return (levels * met[..., None]).flatten(1)

    def quantized(self) -> Quantized:
        """Return the codes as they were, and the steps."""
        return Quantized(self.codes, self.spacing.params(self.scale, self.spacing.zero, len(self.codes)))

    def project(self) -> None:
        """The floor is in the forward pass."""
