"""The seven stage kinds, as Protocols: a method is a composition of their members.

A member is a frozen dataclass in ``qexp/stages/<kind>/<member>.py`` with its YAML in ``conf/method/<kind>/``.
``version`` is raised when its numbers change, so that old records are not taken for new ones; ``needs`` names what it
reads: "activations", "rows" (see Stats), "fisher" (squared gradients of the loss, one for each weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from qexp.core.maps import LinearMap
from qexp.core.measures import Measures
from qexp.core.words import Format, Insert, Layer, Outliers, Params, Quantized, Site, Split, Stats


class Sites(Protocol):
    """What a transform sees of a model: its sites by kind, model-wide or of one block."""

    def sites(self, *kinds: str) -> list[Site]:
        """Return all sites of these kinds, in forward order."""
        ...


class Surroundings(Protocol):
    """What a transform may look at around one site, and change nothing of."""

    @property
    def weights(self) -> Sequence[Tensor]:
        """Return the readers' weights, each [O, I] float32, as what is inserted here meets them."""
        ...

    @property
    def gain(self) -> Tensor | None:
        """Return the elementwise gain [I] of the norm that writes the site, or None."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """Return the bias [I] of the norm that writes the site, or None."""
        ...

    @property
    def stats(self) -> Stats:
        """Return the statistics of the site's activation (block scope only)."""
        ...

    @property
    def fisher(self) -> Sequence[Tensor]:
        """Return the readers' mean squared gradients of the loss, each [O, I] float32 (needs "fisher")."""
        ...

    def damage(self, candidate: LinearMap) -> float:
        """Return the output error if ``candidate`` were inserted and this recipe's grid and act applied."""
        ...


@runtime_checkable
class Transform(Protocol):
    """A function-preserving rewrite of sites. Contract: logits unchanged to 1e-9 in float64."""

    @property
    def version(self) -> int: ...
    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def scope(self) -> str:
        """Return "model" (before the blocks are walked, no statistics) or "block"."""
        ...

    @property
    def inserts(self) -> str:
        """Return the kind of map it inserts in block scope: it tells where statistics are taken."""
        ...

    @property
    def after(self) -> tuple[str, ...]:
        """Return the names of transforms that must come before this one."""
        ...

    def sites(self, model: Sites) -> list[Site]:
        """Return the sites this transform edits, in order."""
        ...

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert | Split | Outliers | None:
        """Return the map to insert at ``site``, the channels or weights to keep out, or None to leave it."""
        ...


@runtime_checkable
class Grid(Protocol):
    """The values a weight may take, and their honest cost in bits."""

    @property
    def version(self) -> int: ...
    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def bits(self) -> int: ...
    @property
    def dim(self) -> int:
        """Return how many neighbouring columns one code covers (1 for scalar grids)."""
        ...

    @property
    def group(self) -> int:
        """Return how many columns share parameters; -1 is the whole row, 0 the whole tensor."""
        ...

    @property
    def formats(self) -> Mapping[str, Format]:
        """Return how each parameter is stored, which must lose nothing of it."""
        ...

    @property
    def shared(self) -> frozenset[str]:
        """Return the parameters that all rows and groups have in common: they are stored once."""
        ...

    def for_layer(self, layer: Layer, bits: int) -> Self:
        """Return this grid at ``bits`` for ``layer``."""
        ...

    def check(self, layer: Layer) -> None:
        """Raise UserError if the layer's shape does not fit the grid."""
        ...

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return parameters for a weight (slice) in float32; ``H_JJ`` weighs errors where the range rule uses it."""
        ...

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return the nearest codes [O, J/dim], uint8; compound ones [O, J/dim, ...], see ``core.storage``."""
        ...

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return the weights [O, J] that codes stand for, in the dtype of the parameters."""
        ...

    def cost(self, outputs: int, inputs: int) -> float:
        """Return stored bits per weight with scales, zero points and tables."""
        ...


@runtime_checkable
class Solver(Protocol):
    """Which grid point each weight takes."""

    @property
    def version(self) -> int: ...
    @property
    def needs(self) -> frozenset[str]: ...

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Grid, rng: torch.Generator) -> Quantized:
        """Return codes and parameters for a float32 weight, which stays as it is."""
        ...


@runtime_checkable
class Act(Protocol):
    """The quantizer of a linear layer's input, simulated."""

    @property
    def version(self) -> int: ...
    @property
    def needs(self) -> frozenset[str]:
        """Return "activations" if ranges are calibrated; a quantizer that measures each input needs nothing."""
        ...

    @property
    def bits(self) -> int: ...

    def check(self, inputs: int) -> None:
        """Raise UserError if an input of this width cannot be quantized."""
        ...

    def fit(self, low_I: Tensor, high_I: Tensor) -> Params:
        """Return what to keep for one input whose channels took values from low to high; nothing if dynamic."""
        ...

    def freeze(self, kept: Params) -> Callable[[Tensor], Tensor]:
        """Return x [..., I] -> x̂ [..., I] for one input, from what ``fit`` kept, or a ``clip`` that was learned."""
        ...


@runtime_checkable
class Kv(Protocol):
    """The quantizer of keys and values, simulated where attention reads them."""

    @property
    def version(self) -> int: ...
    @property
    def bits(self) -> int: ...

    def __call__(self, k_BASE: Tensor, v_BASE: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized keys and values; causal: position t does not depend on later ones."""
        ...

    def cost(self, head_size: int) -> float:
        """Return stored bits per cached element with scales and zero points."""
        ...


@runtime_checkable
class Tuner(Protocol):
    """Training after rounding. Contract: calibration loss not higher, weights still decode from codes."""

    @property
    def version(self) -> int: ...


@runtime_checkable
class Allocation(Protocol):
    """How many bits each layer gets; 16 leaves a layer as it is. One that asks for damages has a ``metric``."""

    @property
    def version(self) -> int: ...

    def assign(self, layers: Iterable[Layer], measures: Measures) -> dict[str, int]:
        """Return bits by layer name."""
        ...

    def act_bits(self, layer: Layer, bits: int) -> int:
        """Return the bits of a layer's input where the recipe has ``bits``."""
        ...
