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
from qexp.core.words import Quantized, Stats
from qexp.stages.solver._shared import column_order, unit_factor
from qexp.stages.solver._shared_sweep import Sweep

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

    version: ClassVar[int] = 2
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
        M_II = unit_factor(stats.H_II, order, self.damp_fraction, grid.dim)
        if M_II is None:
            log.warning("GPTQ: the Hessian is not positive definite at any damping tried: rounded to nearest")
            params = grid.fit(W_OI, stats.H_II)
            return Quantized(grid.encode(W_OI, params), params)
        sweep = Sweep.start(W_OI, order, M_II.to(W_OI.dtype), grid)
        if grid.group > 0 and not self.static_groups and not grid.shared:
            params = sweep.round_fitting(stats.H_II)  # columns are in their own order: __post_init__
        else:
            params = grid.fit(W_OI, stats.H_II)
            sweep.use(params, order)
            sweep.round(0, len(order))
        return Quantized(sweep.codes_in_place(order), params)
