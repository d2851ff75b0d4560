"""Small floats with a scale for each block of columns: FP8, MXFP4/6/8, NVFP4, NF4.

w ≈ s v, v one of the element's values. Scales by ``scale``:
    float32, float16   s = a / top                                 FP8 per channel, NF4 (a = largest magnitude)
    e8m0               s = 2^e, e by ``rule``                      MX: blocks of 32
    e4m3               s = e4m3(a G / top) / G, G = 448 top / A    NVFP4: blocks of 16, A of all that is fitted at once
Floats are denser near zero: they take heavy tails better than integers, and Gaussian (rotated) weights worse.

Source: OCP Microscaling Formats v1.0 section 6; arXiv:2209.05433; NVFP4: methods/fp_formats.md; NF4: arXiv:2305.14314.
Differs: a block scale of zero in e4m3 becomes the least above it, not 0.125 (compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from qexp.core.small_floats import check_floats
from qexp.core.words import Format, Layer, Params
from qexp.kernels.floats import Element, absmax_scale, element, mx_scale, round_scales
from qexp.stages.grid import _shared as common
from qexp.stages.grid._shared_scale import check_scale, stored_scale

SCALES = {"float32": 32, "float16": 16, "e8m0": 8, "e4m3": 8}
DTYPES = {"e8m0": "float8_e8m0fnu", "e4m3": "float8_e4m3fn"}


@dataclass(frozen=True, kw_only=True)
class Floating:
    """The grid. ``elements`` by bits; ``group`` columns share a scale (-1 the whole row); ``rule`` is for e8m0 alone.

    Params: ``scale`` [O, G], and with e4m3 ``tensor`` [O, G], the same 1 / G everywhere, stored once.
    """

    bits: int
    group: int
    elements: Mapping[int, str]
    scale: str
    rule: str

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    dim: ClassVar[int] = 1

    @property
    def formats(self) -> Mapping[str, Format]:
        """Return the dtypes of scales."""
        whole: dict[str, Format] = {"tensor": "float32"} if self.scale == "e4m3" else {}
        return {"scale": DTYPES.get(self.scale, self.scale), **whole}

    @property
    def shared(self) -> frozenset[str]:
        """Return the parameter that all blocks of a weight share."""
        return frozenset({"tensor"} if self.scale == "e4m3" else ())

    def for_layer(self, layer: Layer, bits: int) -> Floating:
        """Return this grid at ``bits``."""
        return replace(self, bits=bits)

    def check(self, layer: Layer) -> None:
        """Raise UserError for settings that mean nothing or a shape that does not fit."""
        check_floats("grid", self, SCALES)
        common.check_sliced(self.bits, self.group, layer, key="method.grid.group")

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return the scales. Raises: NumericalError for a weight that is not finite."""
        common.check_finite(W_OJ)
        W_OGg = common.slices(W_OJ, self.group)
        if self.scale == "e8m0":
            return {"scale": mx_scale(W_OGg, self._element, self.rule)}
        absmax = W_OGg.abs().amax(-1)
        if self.scale == "e4m3":
            return self._two_levels(absmax)
        scale = stored_scale(absmax_scale(absmax, self._element), self.scale)
        check_scale(scale, self.scale)
        return {"scale": scale}

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return the nearest codes, uint8 [O, J]: bit patterns of the element."""
        scale = self._scales(params)
        return self._element.encode(W_OJ.reshape(*scale.shape, -1) / scale[..., None]).reshape(W_OJ.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return s v [O, J] in the dtype of the scale."""
        scale = self._scales(params)
        values = self._element.decode(codes, scale.dtype).reshape(*scale.shape, -1)
        return values.mul_(scale[..., None]).reshape(codes.shape)

    def cost(self, outputs: int, inputs: int) -> float:
        """Return bits per weight: the code, each block's scale and, with e4m3, the weight's own."""
        whole = 32 / (outputs * inputs) if self.scale == "e4m3" else 0
        return self.bits + SCALES[self.scale] / common.columns(self, outputs, inputs) + whole

    @property
    def _element(self) -> Element:
        return element(self.elements[self.bits])

    def _scales(self, params: Params) -> Tensor:
        """Return the scales [O, G] as weights are multiplied with them."""
        return params["scale"] * params["tensor"] if "tensor" in params else params["scale"]

    def _two_levels(self, absmax_OG: Tensor) -> Params:
        """Return scales in e4m3 and what multiplies all of them, so that the largest is 448."""
        tensor = (absmax_scale(absmax_OG.amax(), self._element) / element("e4m3").top).float().to(absmax_OG)
        kept = round_scales(absmax_OG / (self._element.top * tensor))
        return {"scale": kept, "tensor": tensor.expand_as(kept).contiguous()}
