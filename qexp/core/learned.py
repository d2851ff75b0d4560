"""What learned members and the engine say to each other: an objective, what is learned of it, and grids to learn on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from qexp.core.stages import Grid, Surroundings
from qexp.core.words import Insert, Params, Site


class Clips(NamedTuple):
    """Ratios in (0, 1] that are learned.

    ``acts`` by site, tensors [], in place of the clip of a dynamic activation quantizer; ``weights`` by layer, tensors
    [O, 2]: how far the range of each row, or of each of its groups, goes down and up.
    """

    acts: Mapping[str, Tensor] = MappingProxyType({})
    weights: Mapping[str, Tensor] = MappingProxyType({})

    def each(self, change: Callable[[Tensor], Tensor]) -> Clips:
        """Return them, every tensor changed."""
        acts, weights = ({name: change(t) for name, t in clips.items()} for clips in self)
        return Clips(acts, weights)


NO_CLIPS = Clips()


class Objective(Protocol):
    """What a learned transform descends: the loss of the quantized model, or block, on calibration sequences."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        ...

    def __call__(
        self, inserts: Mapping[str, Insert], chosen: Sequence[int], round_weights: bool, clips: Clips = NO_CLIPS
    ) -> float:
        """Return the mean loss of the chosen sequences under inserts and clips.

        Gradients go to the tensors of maps and clips.
        """
        ...


class Learned(NamedTuple):
    """What was learned: an insert for each site by name, the loss of every step, and clips."""

    inserts: dict[str, Insert]
    losses: list[float]
    clips: Clips = NO_CLIPS


@runtime_checkable
class Learner(Protocol):
    """A transform that is learned; its ``edit`` is where it starts.

    One of model scope may have ``load``, the file of an earlier run to take instead of learning.
    """

    def learn(
        self,
        sites: Sequence[Site],
        around: Mapping[str, Surroundings],
        objective: Objective,
        rng: torch.Generator,
        track: Callable[[range], Iterable[int]],
    ) -> Learned:
        """Return the inserts; ``track`` shows how far it is."""
        ...


@runtime_checkable
class Imitated(Protocol):
    """A grid whose rounding can be differentiated, ranges included."""

    def imitate(self, W_OI: Tensor) -> Tensor:
        """Return the rounded weight; gradients pass straight through the rounding."""
        ...


class Clipped:
    """Any grid, with ranges cut at learned ratios [O, 2] of each slice's own: it fits weights that are clamped there.

    What it answers is the grid's; solvers see no difference. Source: methods/flatquant.md 3.5, methods/omniquant.md.
    """

    def __init__(self, grid: Grid, ratios_O2: Tensor) -> None:
        self.grid, self.ratios = grid, ratios_O2

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
        down, up = self.ratios.to(W_OJ).split(1, dim=1)
        cut: Tensor = slices.clamp((low * down)[..., None], (high * up)[..., None])
        return cut.flatten(1)


def within(grid: Grid, ratios_O2: Tensor) -> Grid:
    """Return the grid with its ranges cut at learned ratios."""
    return cast("Grid", Clipped(grid, ratios_O2))
