"""What learned members and the engine say to each other: parts of a block that are learned, and what they make of it.

A part has tensors (``knobs``) and a function that makes of them what the block then runs with: inserts at sites, cut
ranges, weights. The engine alone computes, measures and steps (engine/reconstruct.py); members never see a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from qexp.core.minimise import Knobs
from qexp.core.stages import Grid, Surroundings
from qexp.core.training import Training
from qexp.core.words import Insert, Quantized, Site, Stats

Tensors = Mapping[str, Tensor]


class Clips(NamedTuple):
    """Ratios in (0, 1] that are learned.

    ``acts`` by site, tensors [], in place of the clip of a dynamic activation quantizer; ``weights`` by layer, tensors
    [O, G, 2] (G = 1 also where a row has groups): how far the range of each slice goes down and up.
    """

    acts: Tensors = MappingProxyType({})
    weights: Tensors = MappingProxyType({})

    def each(self, change: Callable[[Tensor], Tensor]) -> Clips:
        """Return them, every tensor changed."""
        acts, weights = ({name: change(t) for name, t in clips.items()} for clips in self)
        return Clips(acts, weights)


NO_CLIPS = Clips()


class Made(NamedTuple):
    """What learned tensors make of a block: inserts by site, ranges, and parameters by full name in place of its own.

    A layer whose weight is among ``weights`` is rounded already.
    """

    inserts: Mapping[str, Insert] = MappingProxyType({})
    clips: Clips = NO_CLIPS
    weights: Tensors = MappingProxyType({})

    def __or__(self, other: Made) -> Made:
        """Return both together."""
        acts, weights = ({**a, **b} for a, b in zip(self.clips, other.clips, strict=True))
        both = {**self.inserts, **other.inserts}
        return Made(both, Clips(acts, weights), {**self.weights, **other.weights})


NOTHING_MADE = Made()


@dataclass(frozen=True)
class Part:
    """Something of a block that is learned; ``make`` is differentiable in the tensors of ``knobs``.

    ``project`` puts the tensors back where they are allowed to be; ``begin_epoch`` (epoch, epochs) hears of epochs.
    """

    knobs: Sequence[Knobs]
    make: Callable[[], Made]
    project: Callable[[], None] = lambda: None
    begin_epoch: Callable[[int, int], None] = lambda *_: None

    def tensors(self) -> dict[str, Tensor]:
        """Return what is learned, by name, as it is kept on disk."""
        knobs = enumerate(self.knobs)  # two may have one name: layers of other bits learn at other rates
        return {f"{n}.{k.name}.{i}": t.detach() for n, k in knobs for i, t in enumerate(k.tensors)}


@runtime_checkable
class Trained(Protocol):
    """A transform of block scope that is learned; its ``edit`` is where it starts."""

    @property
    def training(self) -> Training:
        """Return how it is learned."""
        ...

    @property
    def learns_ranges(self) -> bool:
        """Return whether it learns the ranges of weights along."""
        ...

    def kind_at(self, site: Site) -> str:
        """Return the kind of map that it inserts at a site."""
        ...

    def part(self, sites: Sequence[Site], around: Mapping[str, Surroundings], rng: torch.Generator) -> Part:
        """Return what is learned of the sites of one block."""
        ...


@runtime_checkable
class RangeTuner(Protocol):
    """A tuner of the ranges of weights, which are learned together with the transforms, before any code is taken."""

    @property
    def training(self) -> Training:
        """Return how it is learned."""
        ...

    def ranges(self, slices: Mapping[str, tuple[int, int]]) -> Part:
        """Return the ranges of the layers of one block, given how many rows and slices of a row each has."""
        ...


@runtime_checkable
class BlockTuner(Protocol):
    """A tuner of what a finished block has besides codes: the weights (and biases) of its norms, by full name."""

    @property
    def training(self) -> Training:
        """Return how it is learned."""
        ...

    def norms(self, values: Tensors) -> Part:
        """Return the part that is learned."""
        ...


@runtime_checkable
class NormFactors(Protocol):
    """A tuner that computes factors of norms from statistics and the weights behind them, and trains nothing."""

    def factors(self, H_II: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the factors [I] of a norm's output, for the (float, quantized) weights of all that read it."""
        ...


class Rounding(Protocol):
    """How one weight is rounded, in learned tensors."""

    @property
    def knobs(self) -> Sequence[Knobs]:
        """Return what is learned."""
        ...

    def rounded(self) -> Tensor:
        """Return the rounded weight [O, I], differentiable; its value is what the codes decode to."""
        ...

    def quantized(self) -> Quantized:
        """Return the codes and parameters."""
        ...

    def project(self) -> None:
        """Put the tensors back where they are allowed to be."""
        ...


@runtime_checkable
class LearnedSolver(Protocol):
    """A solver that learns the roundings of a whole block; its ``solve`` is where it starts."""

    @property
    def training(self) -> Training:
        """Return how it is learned."""
        ...

    def norms_rate(self, bits: int) -> float:
        """Return the rate at which the norms of a block of so many bits are learned along, 0 for not."""
        ...

    def rounding(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Rounding:
        """Return the rounding of one weight, at its start."""
        ...


@runtime_checkable
class ModelTuner(Protocol):
    """A tuner of the whole quantized model, end to end: codes stay, what decodes them is learned."""

    @property
    def training(self) -> Training:
        """Return how it is learned."""
        ...

    def decoding(self, quantized: Quantized, grid: Grid) -> Rounding:
        """Return the rounding of one weight whose codes stay."""
        ...


class Objective(Protocol):
    """What a transform of model scope descends: the loss of the quantized model on calibration sequences."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        ...

    def __call__(self, inserts: Mapping[str, Insert], chosen: Sequence[int], round_weights: bool) -> float:
        """Return the mean loss of the chosen sequences under inserts; gradients go to the tensors of the maps."""
        ...


class Learned(NamedTuple):
    """What was learned of the whole model: an insert for each site by name, and the loss of every step."""

    inserts: dict[str, Insert]
    losses: list[float]


@runtime_checkable
class Learner(Protocol):
    """A transform of model scope that is learned; its ``edit`` is where it starts.

    It may have ``load``, the file of an earlier run to take instead of learning.
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
