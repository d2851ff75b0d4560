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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.decoding import learnable
from qexp.core.errors import UserError
from qexp.core.minimise import Knobs
from qexp.core.stages import Grid
from qexp.core.straight import straight
from qexp.core.training import Training
from qexp.core.words import Params, Quantized


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
        if not learnable(grid):
            got = f"learned values of {type(grid).__name__}, whose scales are no free floating-point numbers"
            raise UserError(got, "another grid, or no such tuner", "method/tuner=[]")

    def values(self, quantized: Quantized, grid: Grid) -> Values:
        """Return the values of one weight. Raises: UserError for a grid that has none to learn."""
        self.check(grid)
        return Values(quantized, grid, self.rate, self.relative)


class Values:
    """The parameters of one weight, whose codes stay; one for all rows is learned as one."""

    def __init__(self, quantized: Quantized, grid: Grid, rate: float, relative: bool) -> None:
        self.start, self.grid, self.relative = quantized, grid, relative
        begun = {name: quantized.params[name] for name in learnable(grid)}
        self.begun = {name: value[:1, :1] if name in grid.shared else value for name, value in begun.items()}
        first = {name: torch.zeros_like(v) if relative else v.detach().clone() for name, v in self.begun.items()}
        self.learned = {name: value.requires_grad_() for name, value in first.items()}
        self.knobs: Sequence[Knobs] = [Knobs("values", list(self.learned.values()), rate)]

    def rounded(self) -> Tensor:
        """Return the weight [O, I]; what all rows share is one row here, or its gradient would have all of them."""
        return self.grid.decode(self.start.codes, {**self.start.params, **self._met()})

    def quantized(self) -> Quantized:
        """Return the codes as they were, and the parameters as they are stored."""
        with torch.no_grad():
            own = {name: value.expand_as(self.start.params[name]) for name, value in self._met().items()}
        return Quantized(self.start.codes, {**self.start.params, **own}, self.start.kept)

    def project(self) -> None:
        """Nothing has bounds."""

    def _met(self) -> Params:
        """Return what is learned, rounded as it is stored, with the gradient of what is learned."""
        exact = {n: self.begun[n] * (1 + v) if self.relative else v for n, v in self.learned.items()}
        kinds = {name: getattr(torch, str(self.grid.formats[name])) for name in exact}
        return {name: straight(t, t.detach().to(kinds[name]).to(t)) for name, t in exact.items()}
