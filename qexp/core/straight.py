"""Rounding that gradients pass: the numeric primitives of everything that learns on a uniform grid.

Float32 (float64 for float64); ties go to even, as in packing. Source: methods/block_reconstruction.md section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def straight(values: Tensor, changed: Tensor) -> Tensor:
    """Return ``changed`` with the gradient of ``values``: x + stop(f(x) - x), exact in value."""
    return _Straight.apply(values, changed)  # type: ignore[no-any-return]


def rounded(values: Tensor) -> Tensor:
    """Return the rounded values with the gradient of the values."""
    return straight(values, values.detach().round())


def slices(W_OI: Tensor, groups: int) -> Tensor:
    """Return a weight as its slices [O, G, I / G]."""
    return W_OI.reshape(len(W_OI), groups, -1)


def on_grid(levels_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return weights [O, I] and codes [O, G, g] for levels = w / s before rounding.

    q = clamp(round(levels) + z, 0, top) with the true gradient of the clamp, w = s (q - z); z may be half a code.
    """
    zero = zero_OG[..., None]
    half = zero.detach() % 1
    codes = (rounded(levels_OGg + half) + (zero - half)).clamp(0, top)
    return ((codes - zero) * scale_OG[..., None]).flatten(1), codes


class _Straight(torch.autograd.Function):
    """The second argument's value, the first one's gradient: x + (y - x) would lose the last bits of y."""

    @staticmethod
    def forward(ctx: object, values: Tensor, changed: Tensor) -> Tensor:  # noqa: ARG004
        return changed.view_as(changed)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None
