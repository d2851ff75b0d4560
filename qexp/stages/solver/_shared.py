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


def unit_factor(H_II: Tensor, order: Tensor, damp_fraction: float, dim: int) -> Tensor | None:
    """Return M, unit upper triangular in ``dim`` x ``dim`` blocks, with H[order, order] + damping = M Δ Mᵀ.

    Float64 inside, H's dtype outside. Damping is raised, with a warning, until the factorisation succeeds; None if it
    never does. Raises: NumericalError if H is not finite.
    """
    if not torch.stack(H_II.aminmax()).isfinite().all():
        raise NumericalError("the Hessian has elements that are not finite")
    last_first = order.flip(0)
    H_II, fraction = H_II.index_select(0, last_first).index_select(1, last_first), damp_fraction
    for _ in range(DAMP_TRIES):
        L_II = _lower_factor(damped(H_II, fraction))
        if L_II is not None:
            return _unit(L_II, dim).to(H_II.dtype).flip(0, 1)
        fraction = max(2 * fraction, DAMP_STEP)
        log.warning("the Hessian is not positive definite: damping %g is tried next", fraction)
    return None


def _lower_factor(H_II: Tensor) -> Tensor | None:
    """Return L lower triangular with H = L Lᵀ, or None; LAPACK's U = Lᵀ by columns is L by rows, not copied."""
    U_II, info = torch.linalg.cholesky_ex(H_II.mT, upper=True)
    return None if int(info) else U_II.mT


def _unit(L_II: Tensor, dim: int) -> Tensor:
    """Return L times the inverse of its diagonal blocks; L is spent."""
    if dim == 1:
        return L_II.div_(L_II.diagonal().clone())
    blocks = len(L_II) // dim
    L_BDD = L_II.view(blocks, dim, blocks, dim).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    L_BID = L_II.view(-1, blocks, dim).transpose(0, 1)
    M_BID: Tensor = torch.linalg.solve_triangular(L_BDD, L_BID, upper=False, left=False)
    return M_BID.transpose(0, 1).reshape(L_II.shape)
