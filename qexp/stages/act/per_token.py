"""Quantize each token by itself, with a range taken from that token when it passes.

symmetric: s = clip max|x| / (2^(b-1) - 1), codes -2^(b-1) .. 2^(b-1) - 1;
asymmetric: s = clip (hi - lo) / (2^b - 1) on a range that contains zero, z = round(-lo / s), codes 0 .. 2^b - 1.

Source: arXiv:2404.00456 section 4 (methods/quarot.md 3.7); methods/rtn.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.words import FULL_BITS, Stats
from qexp.kernels.quantize import fake_quantize_per_token


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """The quantizer. ``clip`` in (0, 1] multiplies the range."""

    bits: int
    symmetric: bool
    clip: float

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Raise UserError for a width or clip that means nothing."""
        if not 2 <= self.bits <= 8 and self.bits != FULL_BITS:
            raise UserError(f"act.bits={self.bits}", f"2 to 8, or {FULL_BITS} for none", "bits.act=8")
        if not 0 < self.clip <= 1:
            raise UserError(f"act.clip={self.clip}", "a ratio in (0, 1]", "method.act.clip=1.0")

    def freeze(self, stats: Stats | None) -> Callable[[Tensor], Tensor]:
        """Return x [..., I] -> x̂ [..., I], same dtype; it looks at nothing but the token itself."""
        if self.bits >= FULL_BITS:
            return lambda x: x
        return partial(fake_quantize_per_token, bits=self.bits, symmetric=self.symmetric, clip=self.clip)
