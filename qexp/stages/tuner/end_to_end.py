"""Train what decodes the codes of all layers end to end, codes frozen, on any grid whose scales are floats.

Codebooks, tables, planes, or scales, down the next token's loss of the whole quantized model: AQLM's last phase, and
what E2E-QP is for uniform grids (method/tuner=[e2e_qp], which knows their zero points).

Source: arXiv:2401.06118 appendix (end-to-end tuning); arXiv:2407.11062 section 3.3; methods/aqlm.md section 3.
Differs: the loss of the text, where AQLM takes the divergence from the float model; codes never change, as PV-Tuning's
do; the state is chosen on held-out sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qexp.core.stages import Grid
from qexp.core.training import Training
from qexp.core.words import Quantized
from qexp.stages.tuner._shared_values import Values, check_learnable


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """``rate`` of what decodes, or of factors of what was found (``relative``)."""

    rate: float
    relative: bool
    training: Training

    version: ClassVar[int] = 1

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid that has nothing to learn."""
        check_learnable(grid)

    def decoding(self, quantized: Quantized, grid: Grid) -> Values:
        """Return the values of one weight. Raises: UserError for a grid that has none to learn."""
        self.check(grid)
        return Values(quantized, grid, self.rate, self.relative)
