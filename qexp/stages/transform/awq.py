"""Scale up the input channels that matter, by a one-parameter search per site (AWQ).

s = mean|X|^r, r = k/20 for k = 0..19, divided by sqrt(max s * min s); W <- W s, x <- x / s; the r with the least output
error of the attention, the MLP or the linear behind the site, under the weight grid of the recipe. r = 0 is s = 1, so
the search is never worse than not scaling. The clip search of the paper is a range rule of the grid
(integer_output_clip).
Source: arXiv:2306.00978 Eq. 4-5; loop and floors as in mit-han-lab/llm-awq (d6e797a).
Differs: the paper's r reaches 1, the code's stops at 0.95 (we follow the code); float32 instead of float16; with an
activation quantizer in the recipe the search sees it. v -> o is skipped under grouped queries, as in the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from qexp.core.maps import Diagonal
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Insert, Site
from qexp.stages.transform._shared import check_places

FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Awq:
    """``steps`` exponents are tried (20 in the paper); ``places``: site kinds."""

    steps: int
    places: Sequence[str]

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "diagonal"
    scope: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        """Raise UserError for an unknown kind of site."""
        check_places("awq", self.places)

    def sites(self, model: Sites) -> list[Site]:
        """Return the configured sites whose writers can absorb a diagonal."""
        return [site for site in model.sites(*self.places) if "diagonal" in site.admits]

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert | None:
        """Return the best diagonal 1 / s, or None where s = 1 is best."""
        best, least = None, float("inf")
        for k in range(self.steps):
            s = around.stats.mean_abs_I.pow(k / self.steps).clamp(min=FLOOR)
            candidate = Diagonal((s.max() * s.min()).sqrt() / s)
            loss = around.damage(candidate)
            if loss < least:
                best, least = (candidate if k else None), loss
        return None if best is None else Insert("diagonal", best)
