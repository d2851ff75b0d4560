"""Learn a scale for every channel between two layers, and a shift where norms have biases (OmniQuant's LET).

x <- (x - t) / s behind a norm, W <- W s, b <- b + W t: difficulty moves from activations into weights and nothing is
left at run time. Sites: norm -> q, k, v; norm -> gate, up; v -> o (one scale per channel of a key/value head, shared by
the query heads that read it); keys and queries (k <- k s, q <- q / s, s equal at i and i + d/2 where rotary embeddings
mix them). s = exp of what is learned, from max|x|^alpha / max|W|^(1-alpha); keys start at 1. Ranges of weights are
learned along if the recipe has the tuner ``clip``.

Source: arXiv:2308.13137 section 3.3, code 95fae1b, methods/omniquant.md.
Differs: key scales are tied, so that the function stays (the code's are free); grouped-query attention is supported; s
is positive by its exponential, not by truncation; shifts are learned only where norm and readers have biases, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.compound_maps import HeadMaps
from qexp.core.learned import Made, Part
from qexp.core.maps import Diagonal
from qexp.core.minimise import Knobs
from qexp.core.stages import Sites, Surroundings
from qexp.core.training import Training
from qexp.core.words import Insert, Site
from qexp.stages.transform._shared_let import scale_start, shift_start, tied


@dataclass(frozen=True, kw_only=True)
class Let:
    """``alpha`` of the first scales, ``rate`` of scales and shifts; ``keys`` scales keys and queries, too."""

    alpha: float
    rate: float
    shift: bool
    keys: bool
    training: Training

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "diagonal"
    scope: ClassVar[str] = "block"
    learns_ranges: ClassVar[bool] = False

    def sites(self, model: Sites) -> list[Site]:
        """Return the sites behind norms, the values, and the keys, block by block in the order they are folded."""
        return model.sites("attn_in", "mlp_in", "value", *(["keys"] if self.keys else []))

    def kind_at(self, site: Site) -> str:
        """Return the kind of map at a site."""
        return {"value": "per_head", "keys": "rotary_diagonal"}.get(site.kind, "diagonal")

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert:
        """Return the start."""
        return _insert(site, self._start(site, around))

    def part(self, sites: Sequence[Site], around: Mapping[str, Surroundings], rng: torch.Generator) -> Part:
        """Return the scales and shifts of one block."""
        leaves = {site.name: self._start(site, around[site.name]) for site in sites}
        tensors = [tensor.requires_grad_() for parts in leaves.values() for tensor in parts.values()]

        def make() -> Made:
            return Made({site.name: _insert(site, leaves[site.name]) for site in sites})

        return Part([Knobs("scales", tensors, self.rate)], make)

    def _start(self, site: Site, around: Surroundings) -> dict[str, Tensor]:
        """Return what is learned of a site: log scales, and a shift."""
        if site.kind == "keys":
            heads = site.size // site.head_size
            width = site.head_size // 2 if "per_head" not in site.admits else site.head_size
            return {"scale": torch.zeros(heads, width)}
        leaves = {"scale": scale_start(site, around, self.alpha).log()}
        if self.shift and (t := shift_start(around)) is not None:
            leaves["shift"] = t
        return leaves


def _insert(site: Site, leaves: dict[str, Tensor]) -> Insert:
    """Return the insert that the learned tensors make."""
    scale = leaves["scale"].exp()
    if site.kind == "keys":
        return tied(site, scale)
    shift = -leaves["shift"] if "shift" in leaves else None
    if site.kind == "value":
        return Insert("per_head", HeadMaps(1 / scale.view(-1, site.head_size)), shift)
    return Insert("diagonal", Diagonal(1 / scale), shift)
