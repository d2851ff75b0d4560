"""Uniform integer grid: w ≈ s (q - z) with q in 0 .. 2^b - 1 and one (s, z) per tensor, row or group of columns.

Codes are always unsigned; conventions of s and z are those of ``_shared_scale.py``.
Range rules: minmax; mse (GPTQ's search, sum |e|^2.4); diag_h (sum H_jj e²); output (AWQ's clip, e H_gg eᵀ).

Source: methods/rtn.md section 3; arXiv:2210.17323 (grid and search of its code); arXiv:2306.00978 (clip search).
Differs: half_step takes lo = -hi for rows without a negative weight too, where GPTQ's code loses half the range; AWQ's
clip is measured with the Hessian of all tokens instead of 512 of them, on a range that contains zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError, choose
from qexp.core.words import Format, Layer, Params
from qexp.stages.grid import _shared as common
from qexp.stages.grid import _shared_scale as scales
from qexp.stages.grid import _shared_search as search
from qexp.stages.grid._shared_sweep import sweep


@dataclass(frozen=True, kw_only=True)
class Integer:
    """The grid. Params: ``scale`` [O, G] in the dtype of the weight, and ``zero`` [O, G] uint8 if asymmetric.

    Scales are rounded to ``scale_dtype`` before any code is derived; float32 rounds nothing. Layers of ``minmax_roles``
    keep the plain range, times ``clip``; ``shrink_steps`` candidates 1 - i / ``shrink_grid`` are searched.
    """

    bits: int
    group: int
    symmetry: str
    range: str
    clip: float
    shrink_grid: int
    shrink_steps: int
    exponent: float
    scale_dtype: str
    minmax_roles: Sequence[str]

    version: ClassVar[int] = 1
    dim: ClassVar[int] = 1

    @property
    def needs(self) -> frozenset[str]:
        """Return "activations" if the range rule weighs errors with the Hessian."""
        return frozenset({"activations"} if self.range in ("diag_h", "output") else ())

    @property
    def formats(self) -> Mapping[str, Format]:
        """Return dtypes, and the bits of zero points."""
        return {"scale": self.scale_dtype, "zero": self.bits}

    @property
    def shared(self) -> frozenset[str]:
        """Return all parameters, where the whole weight has one range."""
        return frozenset({"scale", "zero"} if self.group == 0 else ())

    def for_layer(self, layer: Layer, bits: int) -> Integer:
        """Return this grid at ``bits`` for ``layer``, with the plain range where its role asks for it."""
        return replace(self, bits=bits, range="minmax" if layer.role in self.minmax_roles else self.range)

    def check(self, layer: Layer) -> None:
        """Raise UserError if a setting is unknown or the layer's shape does not fit."""
        scales.check_settings(self.symmetry, self.clip, self.scale_dtype)
        choose("grid.range", self.range, search.RANGES, "method.grid.range")
        common.check_shape(self.bits, self.group, layer)
        if self.group == 0 and self.range == "output":
            raise UserError("grid.range=output with group=0", "a row or group to measure", "bits.group=-1")

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return scale [O, G] (and zero). Raises: NumericalError for a weight not finite, or a scale that overflows."""
        common.check_finite(W_OJ)
        params = self._params(self._range(W_OJ, H_JJ))
        scales.check_scale(params["scale"], self.scale_dtype)
        return {name: p.expand(len(W_OJ), -1).contiguous() for name, p in params.items()}

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return the nearest codes, uint8 [O, J]; J is one column or more of one group, or G whole groups."""
        W, scale, zero = self._grouped(W_OJ, params)
        return self._codes(W, scale, zero).to(torch.uint8).reshape(W_OJ.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return s (q - z) [O, J] in the dtype of the scale."""
        levels, scale, zero = self._grouped(codes.to(params["scale"].dtype), params)
        return levels.sub_(zero).mul_(scale).reshape(codes.shape)

    def sweep(self, T_JO: Tensor, E_JO: Tensor, M_JJ: Tensor, params: Params) -> Tensor:
        """Round columns in turn, errors fed forward: see ``kernels.sweep``."""
        return sweep(T_JO, E_JO, M_JJ, params, self.bits)

    def imitate(self, W_OI: Tensor, ratios: Tensor | None = None) -> Tensor:
        """Return the weight rounded by its plain ranges, differentiable: what learned members see of this grid."""
        return scales.Imitation(self.bits, self.group, self.symmetry, self.clip, self.scale_dtype)(W_OI, ratios)

    @property
    def top(self) -> int:
        """Return the largest code."""
        return (1 << self.bits) - 1

    def spacing(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return scale and zero [O, G] in the dtype of the scale."""
        scale = params["scale"]
        return scale, params["zero"].to(scale) if "zero" in params else torch.full_like(scale, 1 << (self.bits - 1))

    def stored(self, scale: Tensor, zero: Tensor) -> Params:
        """Return the parameters that keep a scale and, where the grid has its own, a zero."""
        own = {"zero": zero.round().clamp(0, self.top).to(torch.uint8)} if self.symmetry == "asymmetric" else {}
        return {"scale": scales.stored_scale(scale, self.scale_dtype), **own}

    def cost(self, outputs: int, inputs: int) -> float:
        """Return bits per weight: the code, and per slice its scale and, packed at b bits, its zero point."""
        zero_bits = self.bits if self.symmetry == "asymmetric" else 0
        return self.bits + (scales.SCALE_BITS[self.scale_dtype] + zero_bits) / common.columns(self, outputs, inputs)

    def _grouped(self, X_OJ: Tensor, params: Params) -> tuple[Tensor, Tensor, Tensor | int]:
        """Return X, scale and zero in shapes that broadcast: as they are for one group, else with an axis of groups."""
        scale, zero = params["scale"], params.get("zero", 1 << (self.bits - 1))
        if scale.shape[1] == 1:
            return X_OJ, scale, zero
        return X_OJ.reshape(*scale.shape, -1), scale[..., None], zero[..., None] if isinstance(zero, Tensor) else zero

    def _codes(self, W: Tensor, scale: Tensor, zero: Tensor | int) -> Tensor:
        """Return the nearest codes, still in floating point."""
        return torch.div(W, scale).round_().add_(zero).clamp_(0, (1 << self.bits) - 1)

    def _quantize(self, W_OGg: Tensor, ends: search.Range) -> Tensor:
        """Return slices rounded to the grid of this range."""
        W, scale, zero = self._grouped(W_OGg.flatten(1), self._params(ends))
        return self._codes(W, scale, zero).sub_(zero).mul_(scale).view(W_OGg.shape)

    def _range(self, W_OJ: Tensor, H_JJ: Tensor | None) -> search.Range:
        """Return the range of every slice by this grid's rule."""
        W_OGg, rule = common.slices(W_OJ, self.group), self.range if H_JJ is not None else search.BLIND[self.range]
        if rule == "minmax":
            return search.shrink(search.extremes(W_OGg), self.clip)
        measure = search.measure_of(rule, H_JJ, self.exponent, len(W_OJ), self.group, W_OJ.dtype)
        tried = search.candidates(rule, self.shrink_grid, self.shrink_steps)
        return search.search_range(W_OGg, tried, self._quantize, measure)

    def _params(self, ends: search.Range) -> Params:
        """Return scale and zero [O, G] as they are stored; slices of zeros get scale 1."""
        scale = scales.stored_scale(scales.exact_scale(ends, self.bits, self.symmetry), self.scale_dtype)
        return self.stored(scale, -ends[0] / scale)
