"""What learned members and the engine say to each other: an objective, what is learned of it, and grids to learn on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from qexp.core.stages import Surroundings
from qexp.core.words import Insert, Site


class Objective(Protocol):
    """What a learned transform descends: the loss of the quantized model, or block, on calibration sequences."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        ...

    def __call__(self, inserts: Mapping[str, Insert], chosen: Sequence[int], round_weights: bool) -> float:
        """Return the mean loss of the chosen sequences under inserts by site; gradients go to the tensors of maps."""
        ...


class Learned(NamedTuple):
    """What was learned: an insert for each site by name, and the loss of every step."""

    inserts: dict[str, Insert]
    losses: list[float]


@runtime_checkable
class Learner(Protocol):
    """A transform that is learned; its ``edit`` is where it starts."""

    @property
    def load(self) -> str:
        """Return the file of an earlier run to take instead of learning (model scope), or nothing."""
        ...

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
