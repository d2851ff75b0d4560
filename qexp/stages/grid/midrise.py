"""2^b equally spaced levels around zero, none of them zero, with a range of a few standard deviations (QuIP).

w ≈ Δ (q - (2^b - 1) / 2), q = 0 .. 2^b - 1, Δ = 2 r / (2^b - 1), r = ratio * RMS of the slice. It serves weights that
look like Gaussian noise, as random rotations make them: the best r follows from the bits. QuIP has one range for the
whole weight (group 0). ``ratio: auto`` takes 1.5, 2.1, 2.4 at 2, 3, 4 bits (best for targets that are not clamped,
methods/quip.md section 3); the official code has 2.4 at every width, on clamped targets.

Source: arXiv:2307.13304 section 4 and its code (qfn b); ratios: methods/quip.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.words import Format, Layer, Params
from qexp.stages.grid import _shared as common
from qexp.stages.grid import _shared_scale as scales

SILENT = 2.0**-24  # the least of float16: the step of a slice of zeros, where one is to be learned
AUTO = {2: 1.5, 3: 2.1, 4: 2.4, 5: 2.8, 6: 3.2, 7: 3.6, 8: 4.0}


@dataclass(frozen=True, kw_only=True)
class Midrise:
    """The grid. Params: ``scale`` [O, G], 0 for slices of zeros. ``ratio`` is the range in units of the RMS, or "auto".

    ``group`` columns share a scale; -1 is the whole row, 0 the whole weight (stored for every row, counted once).
    """

    bits: int
    group: int
    ratio: float | str

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    dim: ClassVar[int] = 1
    formats: ClassVar[Mapping[str, Format]] = {"scale": "float16"}

    @property
    def shared(self) -> frozenset[str]:
        """Return the scale, where the whole weight has one."""
        return frozenset({"scale"} if self.group == 0 else ())

    def for_layer(self, layer: Layer, bits: int) -> Midrise:
        """Return this grid at ``bits``."""
        return replace(self, bits=bits)

    def check(self, layer: Layer) -> None:
        """Raise UserError for settings that mean nothing or a shape that does not fit."""
        common.check_shape(self.bits, self.group, layer)
        if self.ratio != "auto" and not (isinstance(self.ratio, (int, float)) and self.ratio > 0):
            raise UserError(f"grid.ratio={self.ratio}", "a positive number, or auto", "method.grid.ratio=auto")

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return the scales [O, G]. Raises: NumericalError for weights that are not finite."""
        common.check_finite(W_OJ)
        ratio = AUTO[self.bits] if self.ratio == "auto" else float(self.ratio)
        rms = common.slices(W_OJ, self.group).double().pow(2).mean(-1).sqrt()
        scale = scales.stored_scale((2 * ratio / self._top * rms).to(W_OJ.dtype), "float16")
        scale = torch.where(rms == 0, 0, scale)
        scales.check_scale(scale[rms > 0], "float16")
        return {"scale": scale.expand(len(W_OJ), -1).contiguous()}

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return the nearest codes, uint8 [O, J]."""
        scale = params["scale"]
        W = W_OJ.reshape(*scale.shape, -1) / torch.where(scale == 0, 1, scale)[..., None]
        return W.add_(self._top / 2).round_().clamp_(0, self._top).to(torch.uint8).reshape(W_OJ.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return Δ (q - (2^b - 1) / 2) [O, J] in the dtype of the scale."""
        scale = params["scale"]
        levels = codes.to(scale.dtype).reshape(*scale.shape, -1).sub_(self._top / 2)
        return levels.mul_(scale[..., None]).reshape(codes.shape)

    @property
    def top(self) -> int:
        """Return the largest code."""
        return self._top

    def spacing(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return scale and zero [O, G]; no scale is 0."""
        scale = params["scale"]
        return torch.where(scale == 0, SILENT, scale), torch.full_like(scale, self._top / 2)

    def stored(self, scale: Tensor, zero: Tensor) -> Params:
        """Return the parameters that keep a scale."""
        return {"scale": scales.stored_scale(scale, "float16")}

    def cost(self, outputs: int, inputs: int) -> float:
        """Return bits per weight: the code, and per slice its scale."""
        return self.bits + scales.SCALE_BITS["float16"] / common.columns(self, outputs, inputs)

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1
