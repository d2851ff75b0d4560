"""Quantize groups of neighbouring channels of each token by themselves, with ranges taken when the token passes.

The range of a group is its own (not widened to contain zero, as a whole token's is): s = clip (hi - lo) / (2^b - 1).
Finer than per token, and dearer to run: a product must rescale between groups.

Source: arXiv:2310.19102 (Atom) section 4.2; methods/kv_cache.md 3.2 for the group formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.words import FULL_BITS, Params
from qexp.kernels.quantize import fake_quantize_groups
from qexp.stages.act._shared import check_settings


@dataclass(frozen=True, kw_only=True)
class PerGroup:
    """The quantizer. ``group`` channels share a range; ``clip`` in (0, 1] multiplies it."""

    bits: int
    symmetric: bool
    clip: float
    group: int

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        check_settings(self.bits, self.clip)
        if self.group < 1:
            raise UserError(f"act.group={self.group}", "a number of channels", "method.act.group=32")

    def check(self, inputs: int) -> None:
        """Raise UserError if the group does not divide an input of this width."""
        if inputs % self.group:
            got = f"act.group={self.group} does not divide an input of {inputs} channels"
            raise UserError(got, f"a divisor of {inputs}", "method.act.group=32")

    def fit(self, low_I: Tensor, high_I: Tensor) -> Params:
        """Keep nothing: ranges are the passing token's."""
        return {}

    def freeze(self, kept: Params) -> Callable[[Tensor], Tensor]:
        """Return x [..., I] -> x̂ [..., I], same dtype; it looks at nothing but the token itself."""
        if self.bits >= FULL_BITS:
            return lambda x: x
        clip = kept.get("clip", self.clip)
        return partial(fake_quantize_groups, bits=self.bits, group=self.group, symmetric=self.symmetric, clip=clip)
