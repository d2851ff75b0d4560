"""What learned members and the engine say to each other: an objective, what is learned of it, and grids to learn on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from qexp.core.stages import Surroundings
from qexp.core.words import Insert, Site

Clips = Mapping[str, Tensor]
"""Ratios in (0, 1] by site, each a tensor [], in place of the clip of a dynamic activation quantizer."""
NO_CLIPS: Clips = MappingProxyType({})


class Objective(Protocol):
    """What a learned transform descends: the loss of the quantized model, or block, on calibration sequences."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        ...

    def __call__(
        self, inserts: Mapping[str, Insert], chosen: Sequence[int], round_weights: bool, clips: Clips = NO_CLIPS
    ) -> float:
        """Return the mean loss of the chosen sequences under inserts and clips of activations by site.

        Gradients go to the tensors of maps and clips.
        """
        ...


class Learned(NamedTuple):
    """What was learned: an insert for each site by name, the loss of every step, and clips of activations."""

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
