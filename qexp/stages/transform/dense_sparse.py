"""Keep single weights exactly, and quantize what is left: the most sensitive ones, and the largest (SqueezeLLM).

Of each layer the ``sensitive`` fraction of the largest squared gradients is kept; then of what is left every weight
with |w| >= T, T such that ``outliers`` of the layer are. Positions kept are zero in what is quantized, so that they
neither widen a range nor draw levels, and exact (float16) in the layer.

Source: arXiv:2306.07629 section 4.2; methods/squeezellm.md section 3. Differs: T is the layer's own quantile of |w|;
the official code has one multiple of the interquartile range for the whole model, tuned by hand to a wanted fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Outliers, Site
from qexp.stages.transform._shared import check_places


@dataclass(frozen=True, kw_only=True)
class DenseSparse:
    """``sensitive`` and ``outliers`` are fractions of a layer's weights; ``places``: kinds of sites whose readers."""

    sensitive: float
    outliers: float
    places: Sequence[str]

    version: ClassVar[int] = 1
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "diagonal"
    scope: ClassVar[str] = "block"
    keeps_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        check_places("dense_sparse", self.places)
        if not (0 <= self.sensitive < 0.5 and 0 <= self.outliers < 0.5):
            got = f"dense_sparse.sensitive={self.sensitive}, outliers={self.outliers}"
            raise UserError(got, "fractions below 0.5", "method.transform.dense_sparse.outliers=0.004")

    @property
    def needs(self) -> frozenset[str]:
        """Return "fisher" if sensitive weights are kept."""
        return frozenset({"fisher"} if self.sensitive else ())

    def sites(self, model: Sites) -> list[Site]:
        """Return the configured sites."""
        return model.sites(*self.places)

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Outliers | None:
        """Return which weights of each reader are kept."""
        weights = around.weights
        fisher = around.fisher if self.sensitive else weights
        return Outliers(tuple(self._mask(W, F) for W, F in zip(weights, fisher, strict=True)))

    def _mask(self, W_OI: Tensor, F_OI: Tensor) -> Tensor:
        """Return the kept positions [O, I]; the largest of each kind, earlier ones at ties."""
        kept = torch.zeros(W_OI.numel(), dtype=torch.bool, device=W_OI.device)
        kept[_largest(F_OI.flatten(), self.sensitive)] = True
        left = W_OI.abs().flatten().masked_fill(kept, -1)
        kept[_largest(left, self.outliers)] = True
        return kept.view(W_OI.shape)


def _largest(values: Tensor, fraction: float) -> Tensor:
    """Return the positions of the largest values, so many of all."""
    count = round(fraction * values.numel())
    return torch.argsort(values, descending=True, stable=True)[:count]
