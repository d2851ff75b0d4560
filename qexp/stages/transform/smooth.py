"""Move activation outliers into the weights: one factor per input channel (SmoothQuant).

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) over calibration tokens and over all readers' rows; x <- x / s, W <- W s.
Source: arXiv:2211.10438 Eq. 4; statistics and floors as in the official repository (c61476d).
Differs: s = 1 for a dead channel (the code divides by 1e-5, which overflows 16 bits); float32 throughout;
``alpha=auto`` takes the alpha of {0.30, 0.35, ..., 0.95} with the least output error under this recipe's grid and act.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.maps import Diagonal
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Insert, Site
from qexp.stages.transform._shared import check_places

DEAD = 1e-5
AUTO = tuple(0.30 + 0.05 * i for i in range(14))


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """``alpha`` in [0, 1] or "auto": the share of the difficulty that moves to the weights; ``places``: site kinds.

    ``online`` divides also where nothing in front of the site can absorb it.
    """

    alpha: float | str
    places: Sequence[str]
    online: bool

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "diagonal"
    scope: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        """Raise UserError for an alpha outside [0, 1]."""
        check_places("smooth", self.places)
        if self.alpha != "auto" and not 0 <= float(self.alpha) <= 1:
            raise UserError(f"alpha={self.alpha}", "a number from 0 to 1, or auto", "method.transform.smooth.alpha=0.5")

    def sites(self, model: Sites) -> list[Site]:
        """Return the configured sites, only those whose writers can absorb a diagonal unless ``online``."""
        return [site for site in model.sites(*self.places) if self.online or "diagonal" in site.admits]

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert | None:
        """Return the diagonal 1 / s, s float32 [I]."""
        if self.alpha != "auto":
            return Insert("diagonal", Diagonal(1 / factors(around, float(self.alpha))))
        candidates = [Diagonal(1 / factors(around, alpha)) for alpha in AUTO]
        return Insert("diagonal", min(candidates, key=around.damage))


def factors(around: Surroundings, alpha: float) -> Tensor:
    """Return s, float32 [I]."""
    x_max = around.stats.absmax_I
    w_max = torch.stack([W.abs().amax(0) for W in around.weights]).amax(0)
    s = x_max.pow(alpha) / w_max.clamp(min=DEAD).pow(1 - alpha)
    return torch.where((x_max < DEAD) | (w_max < DEAD), 1.0, s.clamp(min=DEAD))
