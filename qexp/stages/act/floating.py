"""Quantize inputs to small floats in blocks of neighbouring channels, with scales taken when the token passes.

e8m0: a power of two for each block (MX); e4m3: e4m3(a / (top t)) t with one t for a token (NVFP4); float32: the largest
magnitude of a block, or of a token (group -1), on the largest value (FP8).

Source: OCP Microscaling Formats v1.0; methods/fp_formats.md section 3. Differs: NVFP4's t is that of each token, so
that a token does not depend on others; serving stacks take it from calibration, or from the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.small_floats import check_floats
from qexp.core.words import FULL_BITS, Params
from qexp.kernels.floats import fake_quantize_floats


@dataclass(frozen=True, kw_only=True)
class FloatingAct:
    """The quantizer. ``elements`` by bits; ``group`` channels share a scale, -1 the whole token; ``rule`` is e8m0's."""

    bits: int
    group: int
    elements: Mapping[int, str]
    scale: str
    rule: str

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        check_floats("act", self, ("float32", "e8m0", "e4m3"))
        if self.group < 1 and self.group != -1:
            raise UserError(f"act.group={self.group}", "a number of channels, or -1", "method.act.group=32")

    def check(self, inputs: int) -> None:
        """Raise UserError if the block does not divide an input of this width."""
        if self.group > 0 and inputs % self.group:
            got = f"act.group={self.group} does not divide an input of {inputs} channels"
            raise UserError(got, f"a divisor of {inputs}", "method.act.group=-1")

    def fit(self, low_I: Tensor, high_I: Tensor) -> Params:
        """Keep nothing: ranges are the passing token's."""
        return {}

    def freeze(self, kept: Params) -> Callable[[Tensor], Tensor]:
        """Return x [..., I] -> x̂ [..., I], same dtype; it looks at nothing but the token itself."""
        if self.bits >= FULL_BITS:
            return lambda x: x
        name = self.elements[self.bits]
        return partial(fake_quantize_floats, name=name, group=self.group, scale=self.scale, rule=self.rule)
