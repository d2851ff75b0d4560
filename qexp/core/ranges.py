"""Grids to learn on: with ranges that are cut, whose rounding can be differentiated, whose spacing can be learned."""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from qexp.core.stages import Grid
from qexp.core.words import Params


@runtime_checkable
class Imitated(Protocol):
    """A grid whose rounding can be differentiated, ranges included."""

    def imitate(self, W_OI: Tensor, ratios: Tensor | None) -> Tensor:
        """Return the rounded weight, ranges cut at ratios [O, G, 2] if any; gradients pass through the rounding."""
        ...


@runtime_checkable
class Uniform(Protocol):
    """A grid of evenly spaced values s (q - z), q = 0 .. top, whose spacing can be learned."""

    @property
    def top(self) -> int:
        """Return the largest code."""
        ...

    def spacing(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return scale and zero [O, G] of parameters, in floating point."""
        ...

    def stored(self, scale: Tensor, zero: Tensor) -> Params:
        """Return the parameters that keep a spacing: rounded as they are stored."""
        ...


class Clipped:
    """Any grid, ranges cut at learned ratios [O, G, 2] of each slice's own: it fits weights that are clamped there.

    What it answers is the grid's; solvers see no difference. Source: methods/flatquant.md 3.5, methods/omniquant.md.
    """

    def __init__(self, grid: Grid, ratios: Tensor) -> None:
        self.grid, self.ratios = grid, ratios

    def __getattr__(self, name: str) -> Any:
        """Return what the grid has."""
        return getattr(self.grid, name)

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return the parameters of the clamped weight."""
        return self.grid.fit(self.clamp(W_OJ), H_JJ)

    def clamp(self, W_OJ: Tensor) -> Tensor:
        """Return the weight cut at the ratios, differentiable; a range contains zero."""
        width = self.grid.group if 0 < self.grid.group < W_OJ.shape[1] else W_OJ.shape[1]
        slices = W_OJ.unflatten(1, (-1, width))
        low, high = slices.amin(-1).clamp(max=0), slices.amax(-1).clamp(min=0)
        down, up = self.ratios.to(W_OJ).unbind(-1)
        cut: Tensor = slices.clamp((low * down)[..., None], (high * up)[..., None])
        return cut.flatten(1)


@runtime_checkable
class Weighted(Protocol):
    """A grid that can be fitted by a weight for each error."""

    def fit_weighted(self, W_OJ: Tensor, F_OJ: Tensor) -> Params:
        """Return parameters for a weight whose squared errors count F >= 0."""
        ...


class Sensed:
    """A grid with the squared gradients F [O, J] of the weight that it will be fitted to. Else it is the grid."""

    def __init__(self, grid: Grid, F_OJ: Tensor) -> None:
        self.grid, self.F_OJ = grid, F_OJ

    def __getattr__(self, name: str) -> Any:
        """Return what the grid has."""
        return getattr(self.grid, name)

    def fit(self, W_OJ: Tensor, _: Tensor | None) -> Params:
        """Return the parameters by the squared gradients of these columns."""
        return cast("Weighted", self.grid).fit_weighted(W_OJ, self.F_OJ[:, : W_OJ.shape[1]].to(W_OJ))


def sensed(grid: Grid, F_OJ: Tensor) -> Grid:
    """Return the grid with the squared gradients by which it is fitted."""
    return cast("Grid", Sensed(grid, F_OJ))


def within(grid: Grid, ratios: Tensor) -> Grid:
    """Return the grid with its ranges cut at learned ratios."""
    return cast("Grid", Clipped(grid, ratios))


def over(grid: Grid, group: int) -> Grid:
    """Return the grid as it is fitted to one group of columns alone: a clipped one has ratios of its own for each."""
    if isinstance(grid, Clipped):
        own = grid.ratios[:, group : group + 1] if grid.ratios.shape[1] > 1 else grid.ratios
        return within(over(grid.grid, group), own)
    if isinstance(grid, Sensed):
        return sensed(grid.grid, grid.F_OJ[:, group * grid.group : (group + 1) * grid.group])
    return grid


def bare(grid: Grid) -> Grid:
    """Return the grid itself, without what it is fitted by."""
    return bare(grid.grid) if isinstance(grid, Clipped | Sensed) else grid
