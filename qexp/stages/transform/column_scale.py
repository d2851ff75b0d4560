"""Divide each channel by a power of its calibrated maximum: CrossQuant's column factor, made deployable.

s_j = c_j^(1 - alpha), c_j = max|X_j| over calibration tokens; x <- x / s, W <- W diag(s) before W is rounded. The token
scale behind it is that of ``act/per_token``, the maximum of the divided row (never larger than the paper's factor).
It is SmoothQuant's fold without the weight's share.

Source: arXiv:2410.07505 for the step, methods/crossquant.md 3d (static). Differs: the paper takes c from the passing
sequence, which no integer product can use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from qexp.core.errors import UserError
from qexp.core.maps import Diagonal
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Insert, Site
from qexp.stages.transform._shared import check_places

DEAD = 1e-5


@dataclass(frozen=True, kw_only=True)
class ColumnScale:
    """``alpha`` in [0, 1]: 1 leaves everything as it is, 0 gives every channel the same maximum."""

    alpha: float
    places: Sequence[str]
    online: bool

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "diagonal"
    scope: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        """Raise UserError for an alpha outside [0, 1]."""
        check_places("column_scale", self.places)
        if not 0 <= self.alpha <= 1:
            key = "method.transform.column_scale.alpha=0.15"
            raise UserError(f"transform.column_scale.alpha={self.alpha}", "a number from 0 to 1", key)

    def sites(self, model: Sites) -> list[Site]:
        """Return the configured sites, only those whose writers can absorb a diagonal unless ``online``."""
        return [site for site in model.sites(*self.places) if self.online or "diagonal" in site.admits]

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert:
        """Return the diagonal 1 / s, s float32 [I]; 1 for dead channels."""
        c = around.stats.absmax_I
        return Insert("diagonal", Diagonal(torch.where(c < DEAD, 1.0, c.clamp(min=DEAD).pow(self.alpha - 1))))
