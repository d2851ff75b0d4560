"""Nudge the norms of a quantized block so that the channels of its answer keep their means and spreads (Norm Tweaking).

After the layers of a block are quantized, the weights (and biases) of its norms take one pass over the data:
    L = mean over channels of |Δ mean| + |Δ variance|, over the tokens of a sequence,
against the float block on the same, quantized stream. Rates grow with depth: rate (1 + a l / L). Everything else stays;
the next block sees the tuned one. Meant for calibration text that the model has written itself
(``calibration=generated``).

Source: arXiv:2309.02784 section 3 and Algorithm 1; methods/norm_tweaking.md (which read three implementations).
Differs: the state is chosen on held-out sequences, start included. Rate and depth are not the paper's, which searches
them by grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qexp.core.learned import Made, Part
from qexp.core.minimise import Knobs
from qexp.core.training import Training


@dataclass(frozen=True, kw_only=True)
class NormTweaking:
    """``rate`` of the norms' weights and biases."""

    rate: float
    training: Training

    version: ClassVar[int] = 1

    def norms(self, values: Mapping[str, Tensor]) -> Part:
        """Return the norms as they are, to be learned."""
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        return Part([Knobs("norms", list(leaves.values()), self.rate)], lambda: Made(weights=leaves))
