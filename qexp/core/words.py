"""The nouns every stage shares.

Letters in shapes, few and the same everywhere: O outputs, I inputs, J a slice of inputs, G groups,
D columns per code, T tokens, B batch, S sequence, C hidden, A heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qexp.core.maps import LinearMap

Params = dict[str, Tensor]
"""What a grid needs to decode, each tensor [O, G, ...]: column slices of a weight slice dimension 1."""

Format = int | str
"""How a parameter of a grid is stored: as unsigned integers of so many bits, or in a floating dtype."""

FULL_BITS = 16
"""At this width nothing is quantized: the identity, not a rounding."""


@dataclass(frozen=True)
class Layer:
    """One linear layer of a decoder block: its module name, role (q, k, v, o, gate, up, down, ...) and shape."""

    name: str
    role: str
    block: int
    outputs: int
    inputs: int

    @property
    def weights(self) -> int:
        """Return how many weights the layer has."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Group:
    """Layers of one block that read the same input, in forward order: one Stats, one solve."""

    site: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Stats:
    """Observations of one shared input over the calibration tokens, float32: they die with their block.

    ``H_II`` is the mean over tokens of x xᵀ; least, greatest and mean absolute value are per channel. ``rows_TI`` are
    the tokens of the largest magnitudes, largest first, where a member ``needs`` "rows"; else none.
    """

    tokens: int
    H_II: Tensor
    low_I: Tensor
    high_I: Tensor
    mean_abs_I: Tensor
    rows_TI: Tensor

    @property
    def absmax_I(self) -> Tensor:
        """Return the largest magnitude per channel."""
        return torch.maximum(-self.low_I, self.high_I)


@dataclass(frozen=True)
class Quantized:
    """Codes [O, (I - K) / D, ...], the parameters that decode them, and the last K columns if they have no codes."""

    codes: Tensor
    params: Params
    kept: Tensor | None = None


@dataclass(frozen=True)
class Writer:
    """A module whose output is (part of) a site.

    ``kind`` is linear (its rows), norm (its gain w), offset_norm (its gain 1 + w) or embedding.
    """

    name: str
    kind: str


@dataclass(frozen=True)
class Site:
    """An edge of the network between writers and readers, where an invertible map can be inserted.

    ``kind`` is residual, attn_in, value, attn_out, mlp_in, mlp_mid, head_in, query_key (its ``size`` is that of one
    head), keys (folded: its reader, q, answers with its rows) or output (of one linear, undone behind it); ``size`` its
    width; ``head_size`` the width of one head where it
    has heads; ``admits`` the kinds of map that the writers can absorb (the rest goes online at the readers). ``norms``
    stand between a residual site and its readers.
    """

    name: str
    kind: str
    block: int | None
    size: int
    writers: tuple[Writer, ...]
    readers: tuple[str, ...]
    admits: frozenset[str]
    head_size: int = 0
    norms: tuple[Writer, ...] = ()


@dataclass(frozen=True)
class Insert:
    """Replace the activation x at a site by (x + shift) A.

    ``kind``: diagonal, orthogonal, per_head, dense, center, permutation; of keys rotary (commutes with the rotations of
    positions) and rotary_diagonal.

    The readers get the dual of A, so that the function stays what it was.
    """

    kind: str
    map: LinearMap
    shift: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """Keep ``kept`` input channels of a site out of all quantization; ``order`` int64 [I] puts them last."""

    order: Tensor
    kept: int


@dataclass(frozen=True)
class Outliers:
    """Keep single weights of a site's readers out of all quantization: a mask [O, I] for each, in their order."""

    masks: tuple[Tensor, ...]


@dataclass
class LayerReport:
    """What the record says of one quantized layer; ``error`` is the relative output error on calibration data."""

    name: str
    bits: float
    error: float | None = None
    sqnr_db: float | None = None


@dataclass
class BlockReport:
    """What the record says of one block; of the members that learned ``losses`` by step and what came of it."""

    index: int
    seconds: float
    layers: list[LayerReport] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    learned: dict[str, dict[str, float]] = field(default_factory=dict)
