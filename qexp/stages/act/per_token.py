"""Quantize each token by itself, with a range taken from that token when it passes.

symmetric: s = clip max|x| / (2^(b-1) - 1), codes -2^(b-1) .. 2^(b-1) - 1;
asymmetric: s = clip (hi - lo) / (2^b - 1) on a range that contains zero, z = round(-clip lo / s), codes 0 .. 2^b - 1.

Source: arXiv:2404.00456 section 4 (methods/quarot.md 3.7); methods/rtn.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from qexp.core.words import FULL_BITS, Params
from qexp.kernels.quantize import fake_quantize_per_token
from qexp.stages.act._shared import check_settings


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """The quantizer. ``clip`` in (0, 1] multiplies the range."""

    bits: int
    symmetric: bool
    clip: float

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Raise UserError for a width or clip that means nothing."""
        check_settings(self.bits, self.clip)

    def check(self, inputs: int) -> None:
        """Take inputs of any width."""

    def fit(self, low_I: Tensor, high_I: Tensor) -> Params:
        """Keep nothing: the range is the passing token's."""
        return {}

    def freeze(self, kept: Params) -> Callable[[Tensor], Tensor]:
        """Return x [..., I] -> x̂ [..., I], same dtype; it looks at nothing but the token itself."""
        if self.bits >= FULL_BITS:
            return lambda x: x
        clip = kept.get("clip", self.clip)
        return partial(fake_quantize_per_token, bits=self.bits, symmetric=self.symmetric, clip=clip)
