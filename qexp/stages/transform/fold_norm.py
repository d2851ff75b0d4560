"""Fold every norm's gain (and bias) into the linears behind it, so that norms commute with rotations.

RMSNorm: W <- W diag(g), g <- 1. LayerNorm: the mean subtraction goes into every producer of the residual stream
(embeddings, attention and MLP outputs), the bias into the readers' biases, and the norm becomes an RMSNorm.
Source: arXiv:2404.00456 section 4 stage 1a; arXiv:2401.15024 section 3.3 for LayerNorm.
Differs: the official code also centres the embeddings of RMSNorm models, which changes the function; we do not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch

from qexp.core.norms import Center, unit_gain
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Insert, Site

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FoldNorm:
    """Norm folding; no settings."""

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "diagonal"
    scope: ClassVar[str] = "model"

    def sites(self, model: Sites) -> list[Site]:
        """Return the residual stream (centred where norms are LayerNorms) and every norm's output.

        None where the residual stream cannot be rotated anyway (post-norms, Gemma 2/3): folding serves no rotation
        there, and would hand the linears the channels that the gains keep small.
        """
        residual = model.sites("residual")[0]
        if "orthogonal" not in residual.admits:
            log.info("norms are not folded: behind post-norms the residual stream keeps its axes")
            return []
        return model.sites("residual", "head_in", "attn_in", "mlp_in")

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert | None:
        """Return the insert that leaves a plain division by the root mean square."""
        if site.kind == "residual":
            return Insert("center", Center(site.size)) if "center" in site.admits else None
        assert around.gain is not None
        return unit_gain(around.gain, around.bias)
