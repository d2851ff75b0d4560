"""Keep the input channels of the largest activations, and the weight columns that read them, in 16 bits (QUIK).

Channels are ordered by max|X_j| on calibration tokens; the last n are kept. One gather puts them behind the others,
which alone are quantized, activations as well as weights; the kept columns take up the error of the others (engine).

Source: arXiv:2310.09259 sections 3.1-3.2; methods/quik.md. The paper's "large average values" are maxima in its code.
Differs: statistics from the run's own calibration, not from 512 stored Pile sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from qexp.core.errors import UserError
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Site, Split
from qexp.stages.transform._shared import check_places


@dataclass(frozen=True, kw_only=True)
class OutlierColumns:
    """``fraction`` of a site's channels is kept, rounded up to a multiple of ``multiple``; ``places``: site kinds."""

    fraction: float
    multiple: int
    places: Sequence[str]

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "permutation"
    scope: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        check_places("outlier_columns", self.places)
        if not 0 <= self.fraction < 1 or self.multiple < 1:
            got = f"outlier_columns.fraction={self.fraction}, multiple={self.multiple}"
            raise UserError(got, "a fraction in [0, 1)", "method.transform.outlier_columns.fraction=0.03125")

    def kept(self, size: int) -> int:
        """Return how many of ``size`` channels are kept."""
        kept = min(math.ceil(self.fraction * size / self.multiple) * self.multiple, size - self.multiple)
        if kept <= 0 < self.fraction:
            got = f"outlier_columns.multiple={self.multiple} on a site of {size} channels"
            raise UserError(got, "a smaller number", "method.transform.outlier_columns.multiple=8")
        return kept

    def sites(self, model: Sites) -> list[Site]:
        """Return the configured sites."""
        return model.sites(*self.places)

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Split | None:
        """Return the order by rising magnitude, and how many of the last are kept."""
        kept = self.kept(site.size)
        return Split(torch.argsort(around.stats.absmax_I, stable=True).int(), kept) if kept > 0 else None
