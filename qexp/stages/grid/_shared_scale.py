"""Scales of uniform grids: from a range by convention, as they are stored, and differentiable.

Conventions: see ``integer.py``; a symmetric one divides the largest magnitude by a number of steps.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from qexp.core.errors import NumericalError
from qexp.stages.grid._shared import Range, slices

log = logging.getLogger(__name__)

SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}


def exact_scale(ends: Range, bits: int, symmetry: str) -> Tensor:
    """Return the scale [O, G] of every slice's range, before it is stored; zero for a slice of zeros."""
    (lo, hi), half, top = ends, 1 << (bits - 1), (1 << bits) - 1
    if symmetry == "asymmetric":
        return (hi - lo) / top
    if symmetry == "full_signed":
        return torch.where(-lo >= hi, -lo, -hi) / half
    steps = {"restricted": half - 1, "half_step": top / 2, "full_unsigned": half}[symmetry]
    return torch.maximum(-lo, hi) / steps


def imitate(W_OI: Tensor, bits: int, group: int, symmetry: str, clip: float) -> Tensor:
    """Return W on the grid of its plain ranges times ``clip``; gradients reach the ranges and pass the rounding."""
    W, top = slices(W_OI, group), (1 << bits) - 1
    ends = W.amin(-1, keepdim=True).clamp(max=0) * clip, W.amax(-1, keepdim=True).clamp(min=0) * clip
    scale = exact_scale(ends, bits, symmetry)
    scale = torch.where(scale == 0, 1, scale)
    zero = _straight(-ends[0] / scale).clamp(0, top) if symmetry == "asymmetric" else 1 << (bits - 1)
    rounded = ((_straight(W / scale) + zero).clamp(0, top) - zero) * scale
    return rounded.reshape(W_OI.shape)


def _straight(values: Tensor) -> Tensor:
    """Return the rounded values with the gradient of the values."""
    return values + (values.round() - values).detach()


def stored_scale(scale: Tensor, dtype: str) -> Tensor:
    """Return a scale as ``dtype`` keeps it, in its own dtype: 1 where it is zero, never rounded down to zero.

    float32 stands for the dtype of the arithmetic: nothing is rounded.
    """
    exact = torch.where(scale == 0, 1, scale)
    if dtype == "float32":
        return exact
    rounded = exact.to(getattr(torch, dtype)).to(exact.dtype)
    return torch.where(rounded == 0, exact.sign() * _least(dtype), rounded)


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
