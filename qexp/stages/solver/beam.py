"""Learn codebooks and search codes, in turn, down the exact output error of one weight (AQLM).

    L = tr(D H Dᵀ) / tr(W H Wᵀ),    D = Ŵ - W
An epoch is ``training.steps`` of Adam on codebooks and row scales, codes fixed, then one sweep over all codes, books
fixed as they will be stored: groups of columns in random order, in each its codebooks in random order, all rows at
once. With one beam that is coordinate descent. It ends when an epoch gains less than ``tolerance``.

Source: arXiv:2401.06118 section 3 (phases 1 and 2), its code e79a896; methods/aqlm.md section 3.
Differs: D H is kept up to date, not computed again for every word; books are rounded to float16 before each sweep, not
at the end; Adam's moments begin anew in each epoch, and steps that gain nothing are taken back; the best epoch is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from qexp.core.codebooks import Codebooks, summed
from qexp.core.errors import UserError
from qexp.core.minimise import Descent, Knobs, minimise
from qexp.core.stages import Grid
from qexp.core.training import Course, Training
from qexp.core.words import Quantized, Stats
from qexp.stages.solver._shared_codewords import Search

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}  # of D H in all beams, or of the losses of all words


@dataclass(frozen=True, kw_only=True)
class Beam:
    """The solver. ``rate`` of codebooks and scales; ``beams`` sums of a row are followed through a sweep."""

    rate: float
    epochs: int
    tolerance: float
    beams: int
    training: Training

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        self.training.check("method.solver.training")
        if self.beams < 1:
            raise UserError(f"solver.beams={self.beams}", "one at least", "method.solver.beams=1")

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid that has no codebooks."""
        if not isinstance(grid, Codebooks):
            got = f"a search of codewords on {type(grid).__name__}"
            raise UserError(got, "a grid of codebooks", "method/grid=additive")

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return codes [O, I/D, K] of a float32 (or float64) weight. Raises: UserError for a grid without codebooks."""
        self.check(grid)
        assert stats is not None, "the search of codewords needs statistics"
        params = grid.fit(W_OI, stats.H_II)
        now = Quantized(grid.encode(W_OI, params), params)
        task = _Task(W_OI, _relative(stats.H_II.to(W_OI), W_OI), grid, cast("Codebooks", grid))
        best, least = now, task.loss(now)
        for _ in range(self.epochs):
            now = self._searched(task, self._learned(task, now), rng)
            loss, before = task.loss(now), least
            if loss < least:
                best, least = now, loss
            if loss >= (1 - self.tolerance) * before:
                break
        return best

    def _learned(self, task: _Task, now: Quantized) -> Quantized:
        """Return the codes with the parameters after the steps of an epoch, as they are stored."""
        descent = _Books(task, now)
        steps = self.training.steps
        course = Course(self.training, [[0]] * steps, max(1, steps), 1.0)
        minimise([Knobs("books", [descent.books, descent.scale], self.rate)], course, descent, iter)
        return Quantized(now.codes, task.books.of_books(descent.books, descent.scale))

    def _searched(self, task: _Task, now: Quantized, rng: torch.Generator) -> Quantized:
        """Return the codes after a sweep, rows in chunks; the order is the same for all."""
        books, scale = task.books.books(now.params)
        groups = torch.randperm(now.codes.shape[1], generator=rng).tolist()
        visits = [(group, torch.randperm(len(books), generator=rng).tolist()) for group in groups]
        most, D_OI = CHUNK_ELEMENTS.get(scale.device.type, 1 << 22), task.error(now)
        rows = max(1, most // (self.beams * max(D_OI.shape[1], books.shape[1])))
        parts = zip(now.codes.split(rows), D_OI.split(rows), scale.split(rows), strict=True)
        search = Search(books, task.H_II, visits, self.beams)
        codes = [search(*part) for part in parts]
        return Quantized(torch.cat(codes), now.params)


class _Task(NamedTuple):
    """What is to be approached, by which measure, with which values."""

    W_OI: Tensor
    H_II: Tensor
    grid: Grid
    books: Codebooks

    def error(self, now: Quantized) -> Tensor:
        """Return D [O, I]."""
        return self.grid.decode(now.codes, now.params) - self.W_OI

    def loss(self, now: Quantized) -> float:
        """Return L."""
        D_OI = self.error(now)
        return float(((D_OI @ self.H_II) * D_OI).sum())


class _Books(Descent):
    """L in codebooks and scales."""

    def __init__(self, task: _Task, now: Quantized) -> None:
        self.task, self.codes = task, now.codes.long()
        self.books, self.scale = (t.clone().requires_grad_() for t in task.books.books(now.params))

    def step(self, chosen: Sequence[int]) -> float:
        """Return L; its gradient in the weight is 2 D H."""
        with torch.enable_grad():
            W_OI = self._weight()
        D_OI = W_OI.detach() - self.task.W_OI
        DH_OI = D_OI @ self.task.H_II
        W_OI.backward(2 * DH_OI)
        return float((DH_OI * D_OI).sum())

    @torch.no_grad()
    def measure(self) -> float:
        """Return L."""
        D_OI = self._weight() - self.task.W_OI
        return float(((D_OI @ self.task.H_II) * D_OI).sum())

    def _weight(self) -> Tensor:
        return (summed(self.books, self.codes) * self.scale[:, None, None]).flatten(1)


def _relative(H_II: Tensor, W_OI: Tensor) -> Tensor:
    """Return H over tr(W H Wᵀ): Adam's epsilon then means the same for every layer."""
    return H_II / ((W_OI @ H_II) * W_OI).sum().clamp(min=torch.finfo(H_II.dtype).tiny)
