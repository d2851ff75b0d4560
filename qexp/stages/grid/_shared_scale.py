"""Scales of uniform grids: from a range by convention, as they are stored, and differentiable.

Conventions (a = largest magnitude of a slice, [lo, hi] its range with zero inside):
    restricted      s = a / (2^(b-1) - 1)   z = 2^(b-1)        QuaRot, SmoothQuant: ±a are levels
    half_step       s = 2a / (2^b - 1)      z = 2^(b-1)        GPTQ --sym: +a is cut by half a step
    full_unsigned   s = a / 2^(b-1)         z = 2^(b-1)        AWQ eq. 1: +a is cut by a whole step
    full_signed     s = ±a / 2^(b-1)        z = 2^(b-1)        auto-round: the extreme element is code 0, exactly
    asymmetric      s = (hi - lo) / (2^b - 1)  z = round(-lo / s), stored as an integer
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.core.errors import NumericalError, UserError, choose
from qexp.core.straight import rounded, straight
from qexp.stages.grid._shared import slices
from qexp.stages.grid._shared_search import Range

log = logging.getLogger(__name__)

SYMMETRIES = ("restricted", "half_step", "full_unsigned", "full_signed", "asymmetric")
SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


def check_settings(symmetry: str, clip: float, dtype: str) -> None:
    """Raise UserError for a convention, a part of a range or a dtype that means nothing."""
    choose("grid.symmetry", symmetry, SYMMETRIES, "method.grid.symmetry")
    choose("grid.scale_dtype", dtype, SCALE_BITS, "method.grid.scale_dtype")
    if not 0 < clip <= 1:
        raise UserError(f"grid.clip={clip}", "a ratio in (0, 1]", "method.grid.clip=1.0")


def exact_scale(ends: Range, bits: int, symmetry: str) -> Tensor:
    """Return the scale [O, G] of every slice's range, before it is stored; zero for a slice of zeros."""
    (lo, hi), half, top = ends, 1 << (bits - 1), (1 << bits) - 1
    if symmetry == "asymmetric":
        return (hi - lo) / top
    if symmetry == "full_signed":
        return torch.where(-lo >= hi, -lo, -hi) / half
    steps = {"restricted": half - 1, "half_step": top / 2, "full_unsigned": half}[symmetry]
    return torch.maximum(-lo, hi) / steps


@dataclass(frozen=True)
class Imitation:
    """What rounding to a uniform grid depends on."""

    bits: int
    group: int
    symmetry: str
    clip: float
    dtype: str

    def __call__(self, W_OI: Tensor, ratios: Tensor | None) -> Tensor:
        """Return W on the grid of its ranges times ``clip`` and ratios [O, G, 2]; gradients reach the ranges.

        Scales are met as they are stored: the weight that is learned on is the one that is kept. Gradients go straight
        through the zero point, too: a weight that is cut follows the end of the range.
        """
        W, top = slices(W_OI, self.group), (1 << self.bits) - 1
        cuts = W.new_ones(1, 1, 2) if ratios is None else ratios.to(W)
        down, up = (self.clip * cut[..., None] for cut in cuts.unbind(-1))
        ends = W.amin(-1, keepdim=True).clamp(max=0) * down, W.amax(-1, keepdim=True).clamp(min=0) * up
        scale = exact_scale(ends, self.bits, self.symmetry)
        scale = straight(scale, stored_scale(scale.detach(), self.dtype))
        zero = rounded(-ends[0] / scale).clamp(0, top) if self.symmetry == "asymmetric" else 1 << (self.bits - 1)
        return (((rounded(W / scale) + zero).clamp(0, top) - zero) * scale).reshape(W_OI.shape)


def stored_scale(scale: Tensor, dtype: str) -> Tensor:
    """Return a scale as ``dtype`` keeps it, in its own dtype: 1 where it is zero, never rounded down to zero.

    float32 stands for the dtype of the arithmetic: nothing is rounded.
    """
    exact = torch.where(scale == 0, 1, scale)
    if dtype == "float32":
        return exact
    kept = exact.to(getattr(torch, dtype)).to(exact.dtype)
    return torch.where(kept == 0, exact.sign() * _least(dtype), kept)


def check_scale(scale: Tensor, dtype: str) -> None:
    """Raise NumericalError where a scale overflowed; warn where storing it costs more than about 1 %."""
    if not scale.isfinite().all():
        raise NumericalError(f"a grid scale overflows {dtype}: set method.grid.scale_dtype=bfloat16")
    coarse = int((scale.abs() < 64 * _least(dtype)).sum())
    if coarse:
        log.warning("%d of %d grid scales are too small for %s", coarse, scale.numel(), dtype)


def _least(dtype: str) -> float:
    """Return the smallest positive number of ``dtype``."""
    info = torch.finfo(getattr(torch, dtype))
    return float(info.smallest_normal * info.eps)
