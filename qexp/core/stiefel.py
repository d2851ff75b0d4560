"""Descent on orthogonal matrices: the Cayley step of SpinQuant's optimiser, and the way back from rounding drift.

For a loss with gradient G = dL/dR at orthogonal R, W = (Rᵀ G - Gᵀ R) / 2 is skew and
    R <- R (I + a/2 W)⁻¹ (I - a/2 W),   a = min(rate, 1 / (||W||_1 + 1e-8)),
stays orthogonal; ||W||_1 is the largest absolute column sum, so that a rate above it only says "as far as allowed".

Source: arXiv:2405.16406 Eq. 3-4 (there with the sign that ascends; the official code, and we, descend), methods/
spinquant.md 3.6. Differs: solved in float64 up to ``DIRECT`` columns, where the official code takes 5 fixed-point
iterations in the dtype of R; above, ``ITERATIONS`` of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIRECT = 512  # columns up to which the linear system is solved
ITERATIONS = 8


def cayley_step(R: Tensor, G: Tensor, rate: float) -> tuple[Tensor, float]:
    """Return the next R [n, n] float64 and the step a that was taken; ``rate`` is the largest one."""
    R, G = R.double(), G.double()
    half = R.T @ G
    W = (half - half.T) / 2
    a = min(rate, 1 / (float(W.abs().sum(0).max()) + 1e-8))
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    if len(R) <= DIRECT:
        turned: Tensor = R @ torch.linalg.solve(eye + a / 2 * W, eye - a / 2 * W)
        return turned, a
    Y = R - a * R @ W
    for _ in range(ITERATIONS):
        Y = R - a / 2 * (R + Y) @ W
    return Y, a


def nearest_orthogonal(R: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to R [n, n] (its polar factor), float64."""
    U, _, V = torch.linalg.svd(R.double())
    nearest: Tensor = U @ V
    return nearest
