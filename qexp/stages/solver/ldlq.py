"""Round the last column first, with linear feedback from an LDL decomposition of the Hessian (QuIP).

H = M D Mᵀ, M unit lower triangular; for k from last to first: t_k = w_k + sum over j > k of (w_j - q_j) M_jk,
q_k = nearest grid point of t_k. This is GPTQ on reversed columns, exactly: the same sweep, another order. ``passes``
then improve the answer coordinate by coordinate: q_k <- nearest(q_k + (w - q) H_k / H_kk), until nothing moves.

Source: arXiv:2307.13304 Alg. 3 and section 3; passes: its code (LDLQ-RG), where columns are first sorted by rising
diag H (``sort``). Differs: targets are not clamped to the grid's range before the sweep unless ``clamp`` asks for it
(the code does, and what is clamped gets no feedback; measured worse at 2 bits, methods/quip.md section 3). Passes clamp
every step; the code clamps after a pass and goes on with the errors of the values before the clamp.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.stages import Grid
from qexp.core.words import Params, Quantized, Stats
from qexp.stages.solver._shared import damped, unit_factor
from qexp.stages.solver._shared_sweep import Sweep

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ldlq:
    """The solver. ``damp_fraction`` is of the mean of diag H; ``passes`` of greedy improvement, 0 for none."""

    damp_fraction: float
    sort: bool
    passes: int
    clamp: bool

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return codes [O, I/D] of a float32 (or float64) weight; the grid is fitted once, on the weight as it is.

        Raises: NumericalError if the Hessian is not finite. Rounds to nearest, with a warning, if no damping helps.
        """
        assert stats is not None, "LDLQ needs statistics"
        H_II = stats.H_II
        params = grid.fit(W_OI, H_II)
        if self.clamp:
            W_OI = _within(W_OI, grid, params)
        order = _order(H_II, grid.dim, self.sort)
        M_II = unit_factor(H_II, order, self.damp_fraction, grid.dim)
        if M_II is None:
            log.warning("LDLQ: the Hessian is not positive definite at any damping tried: rounded to nearest")
            return Quantized(grid.encode(W_OI, params), params)
        sweep = Sweep.start(W_OI, order, M_II.to(W_OI.dtype), grid)
        sweep.use(params, order)
        sweep.round(0, len(order))
        solved = Quantized(sweep.codes_in_place(order), params)
        if not self.passes:
            return solved
        return self._improved(W_OI, solved, damped(H_II, self.damp_fraction).to(W_OI.dtype), grid, order)

    def _improved(self, W_OI: Tensor, solved: Quantized, H_II: Tensor, grid: Grid, order: Tensor) -> Quantized:
        """Return the answer after the greedy passes, in the sweep's order: each step lowers tr(E H Eᵀ) or leaves it."""
        codes, rounded = solved.codes.clone(), grid.decode(solved.codes, solved.params)
        for _ in range(self.passes):
            before = codes.clone()
            for start in order[:: grid.dim].tolist():
                here = slice(start, start + grid.dim)
                push = torch.linalg.solve(H_II[here, here], ((W_OI - rounded) @ H_II[:, here]).T).T
                local = _columns(solved.params, start, W_OI.shape[1])
                codes[:, start // grid.dim] = grid.encode(rounded[:, here] + push, local)[:, 0]
                rounded[:, here] = grid.decode(codes[:, start // grid.dim, None], local)
            if torch.equal(before, codes):
                break
        return Quantized(codes, solved.params)


def _order(H_II: Tensor, dim: int, sort: bool) -> Tensor:
    """Return the order of the sweep: from the last column to the first, of columns sorted by rising diag H or as is."""
    blocks = torch.arange(len(H_II) // dim, device=H_II.device)
    if sort:
        blocks = torch.argsort(H_II.diagonal().view(-1, dim).sum(1), stable=True)
    return (blocks.flip(0)[:, None] * dim + torch.arange(dim, device=H_II.device)).view(-1)


def _columns(params: Params, column: int, columns: int) -> Params:
    """Return the parameters of the group that a column lies in, [O, 1, ...]."""
    return {name: p[:, g : g + 1] for name, p in params.items() for g in [column * p.shape[1] // columns]}


def _within(W_OI: Tensor, grid: Grid, params: Params) -> Tensor:
    """Return the weight clamped to the levels of a uniform grid."""
    ends = [grid.decode(torch.full_like(W_OI, c, dtype=torch.uint8), params) for c in (0, (1 << grid.bits) - 1)]
    return W_OI.clamp(torch.minimum(*ends), torch.maximum(*ends))
