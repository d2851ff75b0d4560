"""Learn what decodes the codes of a finished block, and its norms, against the float block; codes stay.

After the layers of a block are quantized, all floating-point parameters that its grid's ``decode`` passes gradients to
(codebooks, tables, planes, scales) and the norms in front of the layers are trained together:
    L = D(B(X_q), Q(X_q)),   B the float block, Q the quantized one, X_q behind the blocks quantized before.
Parameters are met as they are stored. They are learned themselves (AQLM's block fine-tuning), or as factors 1 + γ of
what the solver found (PoT-PTQ's second step), whose rate means the same for small scales and large ones.

Source: arXiv:2401.06118 section 3 (phase 3) and appendix C, code e79a896; factors: arXiv:2507.11959 as methods/
power_of_two.md section 3 tells it. Differs: the state is chosen on held-out sequences, start included, which stands for
the penalty on γ; exponents of powers of two are not taken again; biases of linears stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qexp.core.stages import Grid
from qexp.core.training import Training
from qexp.core.words import Quantized
from qexp.stages.tuner._shared_values import Values, check_learnable


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """``rate`` of what decodes, or of its factors (``relative``); ``norm_rate`` of norms (0: they stay)."""

    rate: float
    norm_rate: float
    relative: bool
    training: Training

    version: ClassVar[int] = 1

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid that has nothing to learn."""
        check_learnable(grid)

    def values(self, quantized: Quantized, grid: Grid) -> Values:
        """Return the values of one weight. Raises: UserError for a grid that has none to learn."""
        self.check(grid)
        return Values(quantized, grid, self.rate, self.relative)
