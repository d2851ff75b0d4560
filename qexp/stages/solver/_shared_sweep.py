"""One sweep over the columns of a weight: the buffers, and which columns are rounded and pushed when.

Source: methods/gptq.md section 3. A grid that can round neighbouring columns by itself (``SweepsColumns``) does so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qexp.core.ranges import bare, over
from qexp.core.stages import Grid
from qexp.core.words import Params

NEIGHBOURS = 32  # columns that a grid may round by itself: their targets and errors stay in cache


@runtime_checkable
class SweepsColumns(Protocol):
    """A grid that rounds neighbouring columns faster than one encode and one decode for each of them."""

    def sweep(self, T_JO: Tensor, E_JO: Tensor, M_JJ: Tensor, params: Params) -> Tensor:
        """Return codes [J, O] of columns rounded in turn; T gathers errors, E becomes weight - rounded, in place.

        ``params`` are [J, O]: those of each column and row.
        """
        ...


@dataclass
class Sweep:
    """The buffers of one sweep, transposed so that a column of the weight is contiguous.

    ``T_IO`` holds the targets, ``E_IO`` the original weights until a column is rounded and its error w - q
    afterwards, ``codes`` [I/D, O, ...] the result, all in the order of the sweep; ``params`` [G, O, ...] are those of
    all groups, ``group_of`` the group of each column.
    """

    T_IO: Tensor
    E_IO: Tensor
    M_II: Tensor
    grid: Grid
    codes: Tensor | None = None
    params: Params = field(default_factory=dict)
    group_of: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, W_OI: Tensor, order: Tensor, M_II: Tensor, grid: Grid) -> Sweep:
        """Return the state before the first column; ``order`` tells which columns of W come first."""
        T_IO = W_OI.T.contiguous()[order]
        return cls(T_IO, T_IO.clone(), M_II, grid)

    def use(self, params: Params, order: Tensor) -> None:
        """Take the grids of all groups, [O, G, ...]: each column gets those of its group."""
        self.group_of = (order // self.grid.group if self.grid.group > 0 else torch.zeros_like(order)).tolist()
        self.params = {name: _by_group(p) for name, p in params.items()}

    def round_fitting(self, H_II: Tensor) -> Params:
        """Round all columns, fitting each group when it is reached; return the parameters of all groups."""
        width = self.grid.group
        self.group_of = [column // width for column in range(len(self.T_IO))]
        for lo in range(0, len(self.T_IO), width):
            hi = lo + width
            fitted = over(self.grid, lo // width).fit(self._corrected(lo, hi), H_II[lo:hi, lo:hi])
            for name, p in fitted.items():
                if name not in self.params:
                    self.params[name] = p.new_empty(len(self.T_IO) // width, len(p), *p.shape[2:])
                self.params[name][lo // width] = p[:, 0]
            self.round(lo, hi)
            self._push(lo, hi, len(self.T_IO))
        return {name: p.transpose(0, 1).contiguous() for name, p in self.params.items()}

    def round(self, lo: int, hi: int) -> None:
        """Round columns lo .. hi: the left half, its errors into the right half, the right half.

        Updates as wide as the columns they serve move less memory than lazy blocks of 128, for the same sums.
        """
        dim, grid, inner = self.grid.dim, self.grid, bare(self.grid)
        few = hi - lo <= NEIGHBOURS and dim == 1 and self.T_IO.dtype == torch.float32
        if few and isinstance(inner, SweepsColumns):
            part = slice(lo, hi)
            params = {name: p[self.group_of[part]] for name, p in self.params.items()}
            self._keep(lo, inner.sweep(self.T_IO[part], self.E_IO[part], self.M_II[part, part], params))
            return
        if hi - lo > dim:
            mid = lo + (hi - lo) // dim // 2 * dim
            self.round(lo, mid)
            self._push(lo, mid, hi)
            self.round(mid, hi)
            return
        params = {name: p[self.group_of[lo], :, None] for name, p in self.params.items()}
        codes = grid.encode(self.T_IO[lo:hi].T, params)
        self._keep(lo, codes.transpose(0, 1))
        self.E_IO[lo:hi] -= grid.decode(codes, params).T

    def codes_in_place(self, order: Tensor) -> Tensor:
        """Return all codes [O, I/D, ...] in the original order of columns."""
        assert self.codes is not None, "no column was rounded"
        codes, dim = torch.empty_like(self.codes), self.grid.dim
        codes[order[::dim] // dim] = self.codes
        return codes.transpose(0, 1).contiguous()

    def _keep(self, lo: int, codes_BO: Tensor) -> None:
        """Keep the codes [B, O, ...] of the columns from ``lo`` on."""
        at = lo // self.grid.dim
        if self.codes is None:
            self.codes = codes_BO.new_empty(len(self.T_IO) // self.grid.dim, *codes_BO.shape[1:])
        self.codes[at : at + len(codes_BO)] = codes_BO

    def _corrected(self, lo: int, hi: int) -> Tensor:
        """Return the weights [O, hi - lo] corrected for all errors before ``lo``: the paper's current weights.

        Targets of the range lack the corrections its own columns will owe each other: x = w + (t - w) M⁻¹ has them.
        """
        M_JJ, w_JO = self.M_II[lo:hi, lo:hi], self.E_IO[lo:hi]
        moved_JO = self.T_IO[lo:hi] - w_JO
        solved_JO: Tensor = torch.linalg.solve_triangular(M_JJ.T, moved_JO, upper=False, unitriangular=True)
        return (w_JO + solved_JO).T

    def _push(self, lo: int, mid: int, hi: int) -> None:
        """Add the errors of columns lo .. mid to the targets of columns mid .. hi."""
        self.T_IO[mid:hi].addmm_(self.M_II[lo:mid, mid:hi].T, self.E_IO[lo:mid])


def _by_group(param: Tensor) -> Tensor:
    """Return a parameter as [G, O, ...]: side by side in memory, unless all rows look at one, as at codebooks."""
    return param.transpose(0, 1) if param.stride(0) == 0 else param.transpose(0, 1).contiguous()
