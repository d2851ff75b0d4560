"""Round column by column, and push each error onto the columns not yet rounded.

With H + damping = R Rᵀ, R upper triangular, and M = R diag(R)⁻¹ (unit upper), column k is rounded at its target
    t_k = w_k + sum over j < k of (w_j - q_j) M_jk,    q_k = nearest grid point of t_k,
which is the paper's update without the inverse of H: one Cholesky, of H with rows and columns reversed. A grid of D
columns per code takes D x D blocks of R for its entries. Targets are updated by halves, a matrix product at a time.

Source: arXiv:2210.17323 Alg. 1; vector grids as block LDLQ, arXiv:2402.04396; methods/gptq.md section 3.
Differs: halves instead of lazy blocks; dead columns neither enter the mean that scales the damping nor come first
under ``act_order``; groups narrower than 128 are fitted on weights that carry all earlier corrections, as the paper
says (the official code lacks those of the current lazy block).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.stages import Grid
from qexp.core.words import Params, Quantized, Stats
from qexp.stages.solver._shared import column_order, unit_factor

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """The solver. ``damp_fraction`` is of the mean of diag H.

    ``act_order`` rounds columns by falling diag H. ``static_groups`` fits the grid before the sweep on the
    original weight; otherwise each group is fitted when the sweep reaches it, on the corrected weight.
    """

    damp_fraction: float
    act_order: bool
    static_groups: bool

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def __post_init__(self) -> None:
        """Raise UserError where a group's columns would not be neighbours in the order of the sweep."""
        if self.act_order and not self.static_groups:
            raise UserError(
                "solver.act_order=true with static_groups=false",
                "static groups, or columns in order",
                "method.solver.act_order=false or method.solver.static_groups=true",
            )

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return codes [O, I/D], in the original order of columns, of a float32 (or float64) weight.

        Raises: NumericalError if the Hessian is not finite. Rounds to nearest, with a warning, if no damping helps.
        """
        assert stats is not None, "GPTQ needs statistics"
        dead = stats.H_II.diagonal() == 0
        W_OI = W_OI.masked_fill(dead, 0)  # no effect on calibration data, so it should not widen a range
        order = column_order(stats.H_II, grid.dim) if self.act_order else torch.arange(len(dead), device=dead.device)
        M_II = unit_factor(stats.H_II[order[:, None], order], self.damp_fraction, grid.dim)
        if M_II is None:
            log.warning("GPTQ: the Hessian is not positive definite at any damping: rounded to nearest")
            params = grid.fit(W_OI, stats.H_II)
            return Quantized(grid.encode(W_OI, params), params)
        sweep = _Sweep.start(W_OI[:, order], M_II.to(W_OI.dtype), grid)
        if grid.group > 0 and not self.static_groups:
            params = sweep.round_fitting(stats.H_II)  # columns are in their own order: __post_init__
        else:
            params = grid.fit(W_OI, stats.H_II)
            sweep.params = by_column(params, order, grid)
            sweep.round(0, len(order))
        codes = torch.empty_like(sweep.codes)
        codes[order[:: grid.dim] // grid.dim] = sweep.codes
        return Quantized(codes.T.contiguous(), params)


@dataclass
class _Sweep:
    """The buffers of one sweep, transposed so that a column of the weight is contiguous.

    ``T_IO`` holds the targets, ``E_IO`` the original weights until a column is rounded and its error w - q
    afterwards, ``codes`` [I/D, O] the result, ``params`` the grid of each column, all in the order of the sweep.
    """

    T_IO: Tensor
    E_IO: Tensor
    M_II: Tensor
    codes: Tensor
    grid: Grid
    params: list[Params]

    @classmethod
    def start(cls, W_OI: Tensor, M_II: Tensor, grid: Grid) -> _Sweep:
        """Return the state before the first column."""
        T_IO = W_OI.T.contiguous()
        codes = torch.empty(len(T_IO) // grid.dim, len(W_OI), dtype=torch.uint8, device=W_OI.device)
        return cls(T_IO, T_IO.clone(), M_II, codes, grid, [])

    def round_fitting(self, H_II: Tensor) -> Params:
        """Round all columns, fitting each group when it is reached; return the parameters of all groups."""
        width = self.grid.group
        for lo in range(0, len(self.T_IO), width):
            params = self.grid.fit(self._corrected(lo, lo + width), H_II[lo : lo + width, lo : lo + width])
            self.params += [params] * width
            self.round(lo, lo + width)
            self._push(lo, lo + width, len(self.T_IO))
        return {name: torch.cat([p[name] for p in self.params[::width]], dim=1) for name in self.params[0]}

    def round(self, lo: int, hi: int) -> None:
        """Round columns lo .. hi: the left half, its errors into the right half, the right half.

        Updates as wide as the columns they serve move less memory than lazy blocks of 128, for the same sums.
        """
        dim = self.grid.dim
        if hi - lo > dim:
            mid = lo + (hi - lo) // dim // 2 * dim
            self.round(lo, mid)
            self._push(lo, mid, hi)
            self.round(mid, hi)
            return
        params = self.params[lo]
        codes = self.grid.encode(self.T_IO[lo:hi].T, params)
        self.codes[lo // dim] = codes[:, 0]
        self.E_IO[lo:hi] -= self.grid.decode(codes, params).T

    def _corrected(self, lo: int, hi: int) -> Tensor:
        """Return the weights [O, hi - lo] corrected for all errors before ``lo``: the paper's current weights.

        Targets lack what the columns of the range then owe each other: x = w + (t - w) M⁻¹ on the range.
        """
        M_JJ, w_JO = self.M_II[lo:hi, lo:hi], self.E_IO[lo:hi]
        moved_JO = self.T_IO[lo:hi] - w_JO
        solved_JO: Tensor = torch.linalg.solve_triangular(M_JJ.T, moved_JO, upper=False, unitriangular=True)
        return (w_JO + solved_JO).T

    def _push(self, lo: int, mid: int, hi: int) -> None:
        """Add the errors of columns lo .. mid to the targets of columns mid .. hi."""
        self.T_IO[mid:hi].addmm_(self.M_II[lo:mid, mid:hi].T, self.E_IO[lo:mid])


def by_column(params: Params, order: Tensor, grid: Grid) -> list[Params]:
    """Return for each position in the sweep the parameters [O, 1, ...] of that column's group."""
    groups = next(iter(params.values())).shape[1]
    local = [{name: p[:, g : g + 1].contiguous() for name, p in params.items()} for g in range(groups)]
    group_of = order // grid.group if grid.group > 0 else torch.zeros_like(order)
    return [local[g] for g in group_of.tolist()]
