"""What solvers that feed errors forward share: the order of columns and the triangular factor of the Hessian.

Source: methods/gptq.md section 3 (flip-Cholesky, damping over live columns).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from qexp.core.errors import NumericalError

log = logging.getLogger(__name__)

DAMP_STEP = 0.01  # what damping is raised to, and then doubled, where the factorisation fails
DAMP_TRIES = 10


def column_order(H_II: Tensor, dim: int) -> Tensor:
    """Return the columns by falling diag H, in blocks of ``dim`` neighbours, ties in their old order."""
    energy = H_II.diagonal().view(-1, dim).sum(1)
    blocks = torch.argsort(energy, descending=True, stable=True)
    return (blocks[:, None] * dim + torch.arange(dim, device=blocks.device)).view(-1)


def damped(H_II: Tensor, fraction: float) -> Tensor:
    """Return H in float64 with ``fraction`` of the mean of its live diagonal added; dead columns get that mean."""
    H_II = H_II.to(torch.float64, copy=True)
    diagonal = H_II.diagonal()
    live = diagonal != 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_tensor(1.0)
    diagonal.add_(torch.where(live, 0, mean) + fraction * mean)
    return H_II


def upper_factor(H_II: Tensor) -> Tensor | None:
    """Return R upper triangular with H = R Rᵀ (the Cholesky factor of the flipped matrix), or None."""
    L_II, info = torch.linalg.cholesky_ex(H_II.flip(0, 1))
    return None if int(info) else L_II.flip(0, 1)


def unit_factor(H_II: Tensor, damp_fraction: float, dim: int) -> Tensor | None:
    """Return M float64, unit upper triangular in ``dim`` x ``dim`` blocks, with H + damping = M D Mᵀ.

    Damping is raised, with a warning, until the factorisation succeeds; None if it never does.
    Raises: NumericalError if H is not finite.
    """
    if not H_II.isfinite().all():
        raise NumericalError("the Hessian has elements that are not finite")
    fraction = damp_fraction
    for _ in range(DAMP_TRIES):
        R_II = upper_factor(damped(H_II, fraction))
        if R_II is not None:
            return _unit(R_II, dim)
        fraction = max(2 * fraction, DAMP_STEP)
        log.warning("GPTQ: the Hessian is not positive definite: damping raised to %g", fraction)
    return None


def _unit(R_II: Tensor, dim: int) -> Tensor:
    """Return R times the inverse of its diagonal blocks."""
    if dim == 1:
        return R_II / R_II.diagonal()
    blocks = len(R_II) // dim
    R_BDD = R_II.view(blocks, dim, blocks, dim).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    R_BID = R_II.view(-1, blocks, dim).transpose(0, 1)
    M_BID: Tensor = torch.linalg.solve_triangular(R_BDD, R_BID, upper=True, left=False)
    return M_BID.transpose(0, 1).reshape(R_II.shape)
