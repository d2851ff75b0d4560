"""Powers of two, or sums of them, times a scale: a product with such a weight is a shift.

Levels, mirrored for sign, largest 1:
    zero      0 and 2^-i, i = 0 .. 2^(b-1) - 2                 2^b - 1 values; one pattern, -0, is not used
    nozero    2^-i, i = 0 .. 2^(b-1) - 1                       2^b values
    additive  sums of one power of each of several sets         2^b - 1 values (APoT)
The scale puts the largest level on ratio * max|w| of a slice; the ratio with the least error is searched, by ``range``:
mse, or diag_h (errors weighed by diag H). ``pow2`` rounds the scale to a power of two: nothing but shifts is left.

Source: arXiv:2203.05025; additive: arXiv:1909.13144 section 2; scale search: methods/power_of_two.md section 3.
Differs: nearest in the linear domain (midpoint 1.5 * 2^e), not of log2 (1.41), which is 3 % worse in squared error;
weights are not normalised inside the forward as APoT's code does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError, choose
from qexp.core.words import Format, Layer, Params
from qexp.kernels.floats import Element, signed
from qexp.stages.grid import _shared as common
from qexp.stages.grid import _shared_search as search
from qexp.stages.grid._shared_scale import check_scale, stored_scale

LEVELS = ("zero", "nozero", "additive")
RANGES = ("mse", "diag_h")


@dataclass(frozen=True, kw_only=True)
class PowerOfTwo:
    """The grid. Params: ``scale`` [O, G]: the magnitude of the largest level; 0 for slices of zeros.

    Ratios from ``least_ratio`` to ``most_ratio`` are tried in steps of ``ratio_step``.
    """

    bits: int
    group: int
    levels: str
    range: str
    pow2: bool
    least_ratio: float
    most_ratio: float
    ratio_step: float

    version: ClassVar[int] = 1
    dim: ClassVar[int] = 1
    shared: ClassVar[frozenset[str]] = frozenset()
    formats: ClassVar[Mapping[str, Format]] = {"scale": "float16"}

    @property
    def needs(self) -> frozenset[str]:
        """Return "activations" if the search weighs errors with the Hessian."""
        return frozenset({"activations"} if self.range == "diag_h" else ())

    @property
    def settled(self) -> bool:
        """Return whether scales are powers of two: no number between them will do."""
        return self.pow2

    def for_layer(self, layer: Layer, bits: int) -> PowerOfTwo:
        """Return this grid at ``bits``."""
        return replace(self, bits=bits)

    def check(self, layer: Layer) -> None:
        """Raise UserError for settings that mean nothing or a shape that does not fit."""
        choose("grid.levels", self.levels, LEVELS, "method.grid.levels")
        choose("grid.range", self.range, RANGES, "method.grid.range")
        common.check_sliced(self.bits, self.group, layer)
        common.check_ratios(self.least_ratio, self.most_ratio, self.ratio_step)
        if self.levels == "additive" and self.bits < 3:
            raise UserError("sums of powers of two in 2 bits", "3 bits or more", "method.grid.levels=nozero")

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return the scales. Raises: NumericalError for a weight that is not finite, or a scale that overflows."""
        common.check_finite(W_OJ)
        rule = self.range if H_JJ is not None else "mse"
        measure = search.measure_of(rule, H_JJ, 2.0, len(W_OJ), self.group, W_OJ.dtype)
        ratios = common.ratios(self.least_ratio, self.most_ratio, self.ratio_step)
        tried = [partial(search.shrink, ratio=ratio) for ratio in reversed(ratios)]
        ends = search.search_range(common.slices(W_OJ, self.group), tried, self._rounded, measure)
        scale = self._scale(ends)
        check_scale(scale[scale > 0], "float16")
        return {"scale": scale}

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return the nearest codes, uint8 [O, J]: the sign, then the number of the magnitude."""
        scale = torch.where(params["scale"] == 0, 1, params["scale"])
        return self._element.encode(W_OJ.reshape(*scale.shape, -1) / scale[..., None]).reshape(W_OJ.shape)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return scale times level [O, J] in the dtype of the scale."""
        scale = params["scale"]
        levels = self._element.decode(codes, scale.dtype).reshape(*scale.shape, -1)
        return (levels * scale[..., None]).reshape(codes.shape)

    def cost(self, outputs: int, inputs: int) -> float:
        """Return bits per weight: the code, and the scale of its slice."""
        return self.bits + 16 / common.columns(self, outputs, inputs)

    @property
    def _element(self) -> Element:
        return element(self.levels, self.bits)

    def _rounded(self, W_OGg: Tensor, ends: search.Range) -> Tensor:
        """Return slices rounded to the levels of these ranges."""
        W, params = W_OGg.flatten(1), {"scale": self._scale(ends)}
        return self.decode(self.encode(W, params), params).view(W_OGg.shape)

    def _scale(self, ends: search.Range) -> Tensor:
        top = torch.maximum(-ends[0], ends[1])
        scale = stored_scale(torch.exp2(torch.log2(top).round()) if self.pow2 else top, "float16")
        return torch.where(top == 0, 0, scale)


@cache
def element(kind: str, bits: int) -> Element:
    """Return the levels of a kind, the largest 1; zero counts as positive where it is none of them."""
    return signed(torch.tensor(sorted(_magnitudes(kind, bits)), dtype=torch.float64), bits)


def _magnitudes(kind: str, bits: int) -> list[float]:
    """Return the magnitudes, the largest 1."""
    count = 1 << (bits - 1)
    if kind == "nozero":
        return [2.0**-i for i in range(count)]
    if kind == "zero":
        return [0.0, *(2.0**-i for i in range(count - 1))]
    sums = [sum(terms) for terms in itertools.product(*_term_sets(bits - 1))]
    return [each / max(sums) for each in sums]


def _term_sets(bits: int) -> list[list[float]]:
    """Return the sets of which additive magnitudes of so many bits take one power, or none, each.

    Exponents go round the sets of two bits three times; a set of one bit, if bits are odd, comes in the third round.
    """
    terms, odd = bits // 2, bits % 2
    sets = [[0.0, *(2.0 ** -(j + 1 + terms * i + (odd if i == 2 else 0)) for i in range(3))] for j in range(terms)]
    return sets + [[0.0, 2.0 ** -(2 * terms + 1)]] * odd
