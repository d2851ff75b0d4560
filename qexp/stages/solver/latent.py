"""Train weights through rounding on any grid of levels times a scale: powers of two, NF4, FP8, MXFP4 (latent weights).

    ŵ = s v,  v the level nearest to w / s;  w is trained, and s = s0 e^t with it where scales are stored as floats
Gradients go straight through the rounding: dŵ/dw = 1 from the least level to the largest, else 0, and dŵ/ds = v - w/s,
of a weight that is cut v. Starts as plain rounding. What is kept is what the last forward pass had, bit for bit.

Source: arXiv:1909.13144 section 2.2 (clip, gradients), methods/power_of_two.md section 3.
Differs: block by block against the float block, not end to end on the loss of the language; t, a factor, is learned,
so that a rate means the same for small and large scales; weights are not normalised in the forward pass (APoT's code).
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
from qexp.core.words import Params, Quantized, Stats


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Rates: ``rate`` of weights, ``scale_rate`` of log-scales, ``norm_rate`` of norms; 0 leaves what it is of."""

    rate: float
    scale_rate: float
    norm_rate: float
    training: Training

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid that has more than a scale, or words of several weights."""
        if grid.dim != 1 or set(grid.formats) != {"scale"}:
            got = f"a solver that trains weights under the levels of {type(grid).__name__}"
            raise UserError(got, "a grid of levels times a scale", "method/grid=power_of_two")

    def norms_rate(self, bits: int) -> float:
        """Return the rate of the block's norms."""
        return self.norm_rate

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return where learning starts: plain rounding."""
        return self.rounding(W_OI, stats, grid, rng).quantized()

    def rounding(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Trained:
        """Return the rounding of one weight at its start. Raises: UserError for a grid that it does not take."""
        self.check(grid)
        params = grid.fit(W_OI, stats.H_II if stats is not None and grid.needs else None)
        return Trained(W_OI, params, grid, self.rate, self.scale_rate)


class Trained:
    """One weight, and the logarithms of how far its scales moved."""

    def __init__(self, W_OI: Tensor, params: Params, grid: Grid, rate: float, scale_rate: float) -> None:
        self.grid, self.begun = grid, params["scale"]
        self.W = W_OI.clone().requires_grad_()
        self.moved = torch.zeros_like(self.begun[:1, :1] if "scale" in grid.shared else self.begun).requires_grad_()
        self.knobs: Sequence[Knobs] = [Knobs("weights", [self.W], rate)]
        if "scale" in learnable(grid):
            self.knobs = [*self.knobs, Knobs("scales", [self.moved], scale_rate)]
        codes = torch.arange(1 << grid.bits, dtype=torch.uint8)[None].to(W_OI.device)
        levels = grid.decode(codes, {"scale": self.begun.new_ones(1, 1)})
        numbers = levels[levels.isfinite()]  # some patterns of FP8 are none
        self.least, self.largest = float(numbers.min()), float(numbers.max())

    def rounded(self) -> Tensor:
        """Return the rounded weight [O, I]: the nearest values, with gradients straight through."""
        scale = self._met()
        with torch.no_grad():
            kept = self.quantized()
            nearest = self.grid.decode(kept.codes, kept.params)
            W, values = (t.reshape(*scale.shape, -1) for t in (self.W, nearest))
            safe = torch.where(scale == 0, 1, scale)[..., None]
            inside = (self.least * safe <= W) & (self.largest * safe >= W)
            pull = values / safe - inside * W / safe
        trained = inside * self.W.reshape_as(inside) + pull * scale[..., None]
        return straight(trained.reshape_as(self.W), nearest)

    def quantized(self) -> Quantized:
        """Return the codes of the trained weight, and its scales as they are stored."""
        params = {"scale": self._met().detach()}
        return Quantized(self.grid.encode(self.W.detach(), params), params)

    def project(self) -> None:
        """Nothing has bounds: what is out of range is cut, and gets no gradient."""

    def _met(self) -> Tensor:
        """Return the scales rounded as they are stored, with the gradient of what is learned."""
        if len(self.knobs) == 1:
            return self.begun
        exact = self.begun * self.moved.exp()
        return straight(exact, exact.detach().to(getattr(torch, str(self.grid.formats["scale"]))).to(exact))
