"""One range for a whole input, measured on calibration tokens and fixed from then on (static).

symmetric: s = clip max|x| / (2^(b-1) - 1); asymmetric: s = clip (hi - lo) / (2^b - 1) on a range that contains zero,
z = round(-clip lo / s). Values outside go to the nearest end. The cheapest quantizer to run, and the first to fail on
outliers.

Source: arXiv:2211.10438 section 3, setting O3 (per-tensor static); methods/rtn.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.words import FULL_BITS, Params
from qexp.kernels.quantize import fake_quantize_fixed
from qexp.stages.act._shared import check_settings


@dataclass(frozen=True, kw_only=True)
class PerTensor:
    """The quantizer. ``clip`` in (0, 1] multiplies the range."""

    bits: int
    symmetric: bool
    clip: float

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def __post_init__(self) -> None:
        """Raise UserError for a width or clip that means nothing."""
        check_settings(self.bits, self.clip)

    def check(self, inputs: int) -> None:
        """Take inputs of any width."""

    def fit(self, low_I: Tensor, high_I: Tensor) -> Params:
        """Return scale [1] and, if asymmetric, zero [1], both float32."""
        low, high = low_I.amin().clamp(max=0), high_I.amax().clamp(min=0)
        floor = torch.finfo(torch.float32).tiny
        if self.symmetric:
            step = torch.maximum(-low, high) * self.clip / (2 ** (self.bits - 1) - 1)
            return {"scale": step.clamp(min=floor).view(1)}
        step = ((high - low) * self.clip / (2**self.bits - 1)).clamp(min=floor)
        return {"scale": step.view(1), "zero": (-low * self.clip / step).round().view(1)}

    def freeze(self, kept: Params) -> Callable[[Tensor], Tensor]:
        """Return x [..., I] -> x̂ [..., I], same dtype, on the grid that ``fit`` found."""
        if self.bits >= FULL_BITS:
            return lambda x: x
        return partial(fake_quantize_fixed, bits=self.bits, scale=kept["scale"], zero=kept.get("zero"))
