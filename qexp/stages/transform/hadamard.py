"""Rotate with Hadamard matrices, so that outlier channels are spread over all channels (QuaRot).

R1: one randomised H on the residual stream, x <- x diag(s) H / sqrt(C), folded. Values: H per head, folded into v and
o; across the heads H online before o, together a full H on o's input. R3: H on queries and keys after RoPE (acts only
where keys are quantized). R4: H online before down. The readers' weights absorb the same transforms.
Where R1 cannot be folded (post-norms, Gemma 2/3) it runs online at the input of q/k/v and gate/up.
Source: arXiv:2404.00456 section 4 stages 1a-1d; sizes without a Hadamard matrix: core/hadamard.py.
Differs: all folding in float64 (official: float32 for head and R4); v biases are rotated; any head count works.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch

from qexp.core.compound_maps import AcrossHeads, PerHead
from qexp.core.hadamard import Hadamard, randomized_hadamard
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Insert, Site

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HadamardRotation:
    """Which rotations are on.

    ``residual`` is R1 (with random signs if ``randomized``), ``heads`` and ``across_heads`` the value path, ``keys``
    R3, ``down`` R4.
    """

    residual: bool
    randomized: bool
    heads: bool
    across_heads: bool
    keys: bool
    down: bool

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    inserts: ClassVar[str] = "orthogonal"
    scope: ClassVar[str] = "model"

    @property
    def after(self) -> tuple[str, ...]:
        """Return fold_norm where the residual stream is rotated: gains do not commute with rotations."""
        return ("fold_norm",) if self.residual else ()

    def sites(self, model: Sites) -> list[Site]:
        """Return the sites of the parts that are switched on."""
        sites = self._residual_sites(model) if self.residual else []
        parts = {"value": self.heads, "attn_out": self.across_heads, "query_key": self.keys, "mlp_mid": self.down}
        return sites + model.sites(*(kind for kind, wanted in parts.items() if wanted))

    def _residual_sites(self, model: Sites) -> list[Site]:
        residual = model.sites("residual")
        if "orthogonal" in residual[0].admits:
            return residual
        log.info(
            "R1 cannot be folded (norms behind the block outputs): it runs online at the input of q/k/v and gate/up"
        )
        return model.sites("attn_in", "mlp_in")

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert | None:
        """Return the rotation of ``site``."""
        if site.kind in ("residual", "attn_in", "mlp_in"):
            return Insert(
                "orthogonal", randomized_hadamard(site.size, rng) if self.randomized else Hadamard(site.size, None)
            )
        if site.kind == "value":
            return Insert("per_head", PerHead(Hadamard(site.head_size, None), site.size // site.head_size))
        if site.kind == "attn_out":
            heads = site.size // site.head_size
            return Insert("orthogonal", AcrossHeads(Hadamard(heads, None), site.head_size)) if heads > 1 else None
        return Insert("orthogonal", Hadamard(site.size, None))
