"""A table of 2^b free values for each row (or group), by weighted clustering (SqueezeLLM).

The table minimises sum_j F_j (w_j - level)². F by ``weights``: fisher, the squared gradients of the model's loss, so
that precision goes where the loss is sensitive; hessian, diag H of the layer's input; none, all alike.

Source: arXiv:2306.07629 sections 4.1-4.2; methods/squeezellm.md. Differs: clusters are the optimum (to 0.5 %) of a
dynamic program, where the paper runs Lloyd's steps from k-means++ (19 to 34 % above it, methods/squeezellm.md); tables
are float16, which the paper counts and its kernels do not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import choose
from qexp.core.words import Format, Layer, Params
from qexp.stages.grid import _shared as common
from qexp.stages.grid._shared_clusters import cluster
from qexp.stages.grid._shared_levels import nearest, take

WEIGHTS = ("fisher", "hessian", "none")


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """The grid. Params: ``levels`` [O, G, 2^b], rising. ``group`` columns share a table; -1 is the whole row."""

    bits: int
    group: int
    weights: str

    version: ClassVar[int] = 1
    dim: ClassVar[int] = 1
    formats: ClassVar[Mapping[str, Format]] = {"levels": "float16"}
    shared: ClassVar[frozenset[str]] = frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """Return what weighs the errors."""
        return frozenset({"hessian": {"activations"}, "fisher": {"fisher"}}.get(self.weights, ()))

    def for_layer(self, layer: Layer, bits: int) -> KMeans:
        """Return this grid at ``bits``."""
        return replace(self, bits=bits)

    def check(self, layer: Layer) -> None:
        """Raise UserError for settings that mean nothing or a shape that does not fit."""
        choose("grid.weights", self.weights, WEIGHTS, "method.grid.weights")
        common.check_sliced(self.bits, self.group, layer)

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return the tables. Without a Hessian all weights count alike."""
        h_J = common.diagonal(H_JJ if self.weights == "hessian" else None, W_OJ)
        return self.fit_weighted(W_OJ, h_J.expand_as(W_OJ))

    def fit_weighted(self, W_OJ: Tensor, F_OJ: Tensor) -> Params:
        """Return the tables for errors weighed by F. Raises: NumericalError for a weight that is not finite."""
        common.check_finite(W_OJ)
        W_OGg, F_OGg = (common.slices(each, self.group) for each in (W_OJ, F_OJ))
        levels = cluster(W_OGg.flatten(0, 1), F_OGg.flatten(0, 1), 1 << self.bits)
        return {"levels": levels.half().to(W_OJ).view(*W_OGg.shape[:2], -1)}

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return the nearest codes, uint8 [O, J]."""
        return nearest(W_OJ, params["levels"]).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return the levels [O, J] in their dtype."""
        return take(params["levels"], codes)

    def cost(self, outputs: int, inputs: int) -> float:
        """Return bits per weight: the code, and the table of its slice."""
        return self.bits + 16 * (1 << self.bits) / common.columns(self, outputs, inputs)
