"""Binary coding whose levels are integers of a finer uniform grid: quantized twice, stored once (GPTQT).

w ≈ c + sum over i = 1..m of ±a_i. First a uniform grid of n = ``fine_bits`` bits per slice, step s = ratio (hi - lo) /
(2^n - 1), centred on the range; then, of all binary codes (base, d_1 <= ... <= d_m) on that grid's integers, the one
with the least error; the ratio is searched along, since the code changes the range that is covered. Merged:
a_i = s d_i / 2, c = s (base + sum d_i / 2 - z): no trace of n is stored. Errors are weighed by diag H (``weights``).

Source: arXiv:2407.02891 (abstract; no code is public); settings and search: methods/gptqt.md; format: arXiv:2206.09557.
Differs: rounds to the nearest level at once, where the paper rounds to n bits first, which is never nearer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError, choose
from qexp.core.words import FULL_BITS, Format, Layer, Params
from qexp.stages.grid import _shared as common
from qexp.stages.grid import _shared_binary as binary
from qexp.stages.grid._shared_levels import nearest, take

MOST_BITS, MOST_FINE_BITS = 4, 6
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class BinaryCoding:
    """The grid. Params: ``offset`` c [O, G] and ``plane`` a_i [O, G, m], rising; code bit i says the sign of a_i.

    Ratios from ``least_ratio`` to ``most_ratio`` are tried in steps of ``ratio_step``.
    """

    bits: int
    group: int
    fine_bits: int
    weights: str
    least_ratio: float
    most_ratio: float
    ratio_step: float

    version: ClassVar[int] = 1
    dim: ClassVar[int] = 1
    shared: ClassVar[frozenset[str]] = frozenset()
    formats: ClassVar[Mapping[str, Format]] = {"offset": "float16", "plane": "float16"}

    @property
    def needs(self) -> frozenset[str]:
        """Return "activations" if errors are weighed with the Hessian."""
        return frozenset({"activations"} if self.weights == "hessian" else ())

    def for_layer(self, layer: Layer, bits: int) -> BinaryCoding:
        """Return this grid at ``bits``."""
        return replace(self, bits=bits)

    def check(self, layer: Layer) -> None:
        """Raise UserError for settings that mean nothing or a shape that does not fit."""
        choose("grid.weights", self.weights, ("hessian", "none"), "method.grid.weights")
        common.check_sliced(self.bits, self.group, layer)
        common.check_ratios(self.least_ratio, self.most_ratio, self.ratio_step)
        if self.bits == FULL_BITS:
            return
        if self.bits > MOST_BITS:
            raise UserError(f"binary coding with {self.bits} bits", f"2 to {MOST_BITS}", f"bits.weight={MOST_BITS}")
        if not self.bits <= self.fine_bits <= MOST_FINE_BITS:
            got, need = f"grid.fine_bits={self.fine_bits} at {self.bits} bits", f"{self.bits} to {MOST_FINE_BITS}"
            raise UserError(got, need, "method.grid.fine_bits=5")

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return offsets and planes. Raises: NumericalError for a weight that is not finite."""
        common.check_finite(W_OJ)
        W_OGg = common.slices(W_OJ, self.group)
        h_J = common.diagonal(H_JJ if self.weights == "hessian" else None, W_OJ)
        x_Ng, h_Ng = W_OGg.flatten(0, 1), common.slices(h_J[None], self.group).expand_as(W_OGg).flatten(0, 1)
        rows = max(1, CHUNK_ELEMENTS // max(len(binary.codes(self.fine_bits, self.bits)), x_Ng.shape[1]))
        found = binary.codes(self.fine_bits, self.bits).to(x_Ng.device, torch.float64)
        levels, parts = binary.snapped(found, self.fine_bits), zip(x_Ng.split(rows), h_Ng.split(rows), strict=True)
        made = [self._search(x.double(), h.double(), found, levels) for x, h in parts]
        offset, plane = (torch.cat(parts).half().to(W_OJ) for parts in zip(*made, strict=True))
        return {"offset": offset.view(W_OGg.shape[:2]), "plane": plane.view(*W_OGg.shape[:2], -1)}

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return the nearest codes, uint8 [O, J]."""
        levels, codes = self._levels(params).sort(-1)
        return take(codes, nearest(W_OJ, levels)).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return c + sum ±a_i [O, J] in the dtype of the parameters."""
        return take(self._levels(params), codes)

    def cost(self, outputs: int, inputs: int) -> float:
        """Return bits per weight: the planes, and for each slice its offset and magnitudes."""
        return self.bits + 16 * (self.bits + 1) / common.columns(self, outputs, inputs)

    def _levels(self, params: Params) -> Tensor:
        """Return the levels [O, G, 2^m] by code."""
        plane = params["plane"]
        signs = binary.patterns(plane.shape[-1], plane) * 2 - 1
        return params["offset"][..., None] + (plane[..., None, :] * signs).sum(-1)

    def _search(self, x_Ng: Tensor, h_Ng: Tensor, candidates: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the offset [N] and planes [N, m] of the best code of each slice, at the best of all ratios."""
        top, low, high = (1 << self.fine_bits) - 1, x_Ng.amin(1).clamp(max=0), x_Ng.amax(1).clamp(min=0)
        plain = torch.where(high > low, (high - low) / top, 1)
        least, best = torch.full_like(plain, torch.inf), x_Ng.new_zeros(len(x_Ng), candidates.shape[1])
        for ratio in common.ratios(self.least_ratio, self.most_ratio, self.ratio_step):
            s = plain * ratio
            z = (top / 2 - (high + low) / (2 * s)).round()
            cost = s.square()[:, None] * binary.errors(x_Ng / s[:, None] + z[:, None], h_Ng, levels)
            error, at = cost.min(1)
            code, better = candidates[at], error < least
            planes = code[:, 1:] * s[:, None] / 2
            offset = s * (code[:, 0] - z) + planes.sum(1)
            least = torch.where(better, error, least)
            best = torch.where(better[:, None], torch.cat([offset[:, None], planes], dim=1), best)
        return best[:, 0], best[:, 1:]
