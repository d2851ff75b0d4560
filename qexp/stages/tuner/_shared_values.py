"""What tuners of decoding share: the floats that decode the codes of one weight, learned while codes stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qexp.core.decoding import learnable
from qexp.core.errors import UserError
from qexp.core.minimise import Knobs
from qexp.core.stages import Grid
from qexp.core.straight import straight
from qexp.core.words import Params, Quantized


def check_learnable(grid: Grid) -> None:
    """Raise UserError for a grid that has nothing to learn."""
    if not learnable(grid):
        got = f"learned values of {type(grid).__name__}, whose scales are no free floating-point numbers"
        raise UserError(got, "another grid, or no such tuner", "method/tuner=[]")


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
