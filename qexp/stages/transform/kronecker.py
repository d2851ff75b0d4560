"""Learn an invertible map in front of every linear of a block, a Kronecker product of two small matrices (FlatQuant).

x <- (x c) (P1 (x) P2) at the inputs of q/k/v, gate/up and down; o's input gets P_o over heads (online) and P_v inside
heads (folded into v and o); keys get P_h, queries its dual, after RoPE. All of it, with the scale c, is learned against
the float block's answer, quantizers on, by AdamW. Nothing is asked of norms or of the residual stream, so every
placement of norms is fine. c starts as max|W|^(1-alpha) / max|X|^alpha; P starts random orthogonal.

Source: arXiv:2410.09426 section 3, code 9d88ffc, methods/flatquant.md.
Differs: P is free and its inverse computed in float64 (the code's direct_inv); c is exp of what is learned, so that it
stays positive, and runs online; an activation clip is one ratio for both ends, KV has none, and v's weight clip acts
behind P_v, where v is rounded; the loss is not divided by its own value, which AdamW hardly notices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.compound_maps import AcrossHeads, Chain, PerHead
from qexp.core.learned import NO_CLIPS, Clips, Made, Part
from qexp.core.maps import Dense, Diagonal, Kronecker
from qexp.core.minimise import Knobs
from qexp.core.stages import Sites, Surroundings
from qexp.core.training import Training
from qexp.core.words import Insert, Site
from qexp.stages.transform._shared import random_orthogonal, smaller_side

SCALED = ("attn_in", "mlp_in", "mlp_mid")
CLIPPED = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
CLIP_START = 4.0  # a logit: 0.982 of a range
DEAD = 1e-5


@dataclass(frozen=True, kw_only=True)
class KroneckerMaps:
    """``alpha`` of the first scale; ``rate`` of maps and scales.

    ``clip_rate`` is that of the clips, of activations and of the ranges of weights, 0 for none.
    """

    alpha: float
    scale: bool
    keys: bool
    rate: float
    clip_rate: float
    training: Training

    version: ClassVar[int] = 3
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "dense"
    scope: ClassVar[str] = "block"

    @property
    def learns_ranges(self) -> bool:
        """Return whether ranges are learned along with the maps."""
        return self.clip_rate > 0

    def sites(self, model: Sites) -> list[Site]:
        """Return every input of a linear, the values, and queries and keys."""
        return model.sites("attn_in", "value", "attn_out", *(["query_key"] if self.keys else []), "mlp_in", "mlp_mid")

    def kind_at(self, site: Site) -> str:
        """Return the kind of map at a site."""
        return "per_head" if site.kind == "value" else "dense"

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert:
        """Return the start: a random orthogonal map and, where there is one, the first scale."""
        return _insert(site, self._start(site, around, rng))

    def part(self, sites: Sequence[Site], around: Mapping[str, Surroundings], rng: torch.Generator) -> Part:
        """Return the maps of one block, and the clips, as they are learned."""
        leaves = {site.name: self._start(site, around[site.name], rng) for site in sites}
        clips = self._clips(sites, around)
        tensors = [tensor.requires_grad_() for parts in leaves.values() for tensor in parts.values()]
        logits = [*clips.acts.values(), *clips.weights.values()]
        knobs = [Knobs("maps", tensors, self.rate), *([Knobs("clips", logits, self.clip_rate)] if logits else [])]

        def make() -> Made:
            return Made({site.name: _insert(site, leaves[site.name]) for site in sites}, clips.each(torch.sigmoid))

        return Part(knobs, make)

    def _clips(self, sites: Sequence[Site], around: Mapping[str, Surroundings]) -> Clips:
        """Return the logits of all clips."""
        if not self.clip_rate:
            return NO_CLIPS
        inputs = [site for site in sites if site.kind in CLIPPED]
        weights = {
            reader: torch.full((len(W), 1, 2), CLIP_START).requires_grad_()
            for site in inputs
            for reader, W in zip(site.readers, around[site.name].weights, strict=True)
        }
        return Clips({site.name: torch.tensor(CLIP_START).requires_grad_() for site in inputs}, weights)

    def _start(self, site: Site, around: Surroundings, rng: torch.Generator) -> dict[str, Tensor]:
        """Return what is learned of a site, float64."""
        if site.kind in ("value", "query_key"):
            return {"left": random_orthogonal(site.head_size, rng)}
        if site.kind == "attn_out":
            return {"left": random_orthogonal(site.size // site.head_size, rng)}
        p = smaller_side(site.size)
        parts = {"left": random_orthogonal(p, rng), "right": random_orthogonal(site.size // p, rng)}
        if self.scale and site.kind in SCALED:
            parts["scale"] = self._scale(around).log().double()
        return parts

    def _scale(self, around: Surroundings) -> Tensor:
        """Return c, float32 [I]."""
        x_max = around.stats.absmax_I
        w_max = torch.stack([W.abs().amax(0) for W in around.weights]).amax(0)
        c = w_max.clamp(min=DEAD).pow(1 - self.alpha) / x_max.clamp(min=DEAD).pow(self.alpha)
        return torch.where((x_max < DEAD) | (w_max < DEAD), 1.0, c)


def _insert(site: Site, parts: dict[str, Tensor]) -> Insert:
    """Return the insert that the learned tensors make."""
    left = _dense(parts["left"])
    if site.kind == "value":
        return Insert("per_head", PerHead(left, site.size // site.head_size))
    if site.kind == "query_key":
        return Insert("dense", left)
    if site.kind == "attn_out":
        return Insert("dense", AcrossHeads(left, site.head_size))
    turn = Kronecker(left, _dense(parts["right"]))
    if "scale" not in parts:
        return Insert("dense", turn)
    return Insert("dense", Chain((Diagonal(parts["scale"].exp()), turn)))


def _dense(a: Tensor) -> Dense:
    return Dense(a, torch.linalg.inv(a))
