"""A step for each element, from the largest magnitude of its token and of its channel (CrossQuant).

d_ij = t_i^alpha c_j^(1 - alpha) / (2^(b-1) - 1), t_i = max_j |x_ij|, c_j = max_i |x_ij|; q = round(x / d). No code can
leave the range, because |x_ij| <= min(t_i, c_j). alpha = 1 is per token, 0 per channel.

As published the channel maxima are those of the passing sequence: NOT CAUSAL (a token's result depends on later ones),
no integer product can use it, and at one token it degenerates into a power-law grid per element. It measures what such
steps could do. What can be deployed is ``transform/column_scale`` in front of ``act/per_token``.

Source: arXiv:2410.07505 (formulas, alpha = 0.15), methods/crossquant.md section 3. Differs: one set of channel maxima
for each sequence of a batch, so that batching changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.words import FULL_BITS, Params
from qexp.kernels.quantize import pass_through_round
from qexp.stages.act._shared import check_settings

FLOOR = 1e-5  # under both maxima, as in the spec


@dataclass(frozen=True, kw_only=True)
class CrossQuant:
    """The quantizer; ``alpha`` in [0, 1] is the token's share of the step."""

    bits: int
    alpha: float

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        check_settings(self.bits, 1.0)
        if not 0 <= self.alpha <= 1:
            raise UserError(f"act.alpha={self.alpha}", "a number from 0 to 1", "method.act.alpha=0.15")

    def check(self, inputs: int) -> None:
        """Take inputs of any width."""

    def fit(self, low_I: Tensor, high_I: Tensor) -> Params:
        """Keep nothing: both maxima are the passing sequence's."""
        return {}

    def freeze(self, kept: Params) -> Callable[[Tensor], Tensor]:
        """Return x [..., T, I] -> x̂, same dtype; all tokens of a sequence matter to each of them."""
        if self.bits >= FULL_BITS:
            return lambda x: x
        return partial(cross_quantize, bits=self.bits, alpha=self.alpha)


def cross_quantize(x: Tensor, bits: int, alpha: float) -> Tensor:
    """Return x [..., T, I] (or one token [I]) rounded to its own steps; float32 arithmetic, float64 for float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    rows = wide if wide.dim() > 1 else wide[None]
    magnitude, top = rows.detach().abs(), 2 ** (bits - 1) - 1
    tokens = magnitude.amax(-1, keepdim=True).clamp(min=FLOOR).pow(alpha) / top
    channels = magnitude.amax(-2, keepdim=True).clamp(min=FLOOR).pow(1 - alpha)
    codes = pass_through_round(rows * tokens.reciprocal() / channels)
    y: Tensor = codes * channels * tokens
    return y.reshape(x.shape).to(x.dtype)
