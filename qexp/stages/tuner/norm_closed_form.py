"""Scale each norm's gain so that what reads it answers best, in closed form: Norm Tweaking without training.

For a norm in front of linears with float weights W_l and quantized weights Q_l, and H = XᵀX of its output, the factors
s that minimise sum over l of ||X W_lᵀ - X diag(s) Q_lᵀ||² solve
    (H o sum_l Q_lᵀ Q_l + λ I) s = diag(H sum_l W_lᵀ Q_l) + λ 1,    λ = ``damp`` times the mean diagonal.
The gain (and bias) is multiplied by s. One solve per norm; weights only.

Source: smpanaro/norm-tweaking (third party), methods/norm_tweaking.md section 3; the idea is arXiv:2309.02784's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NormClosedForm:
    """``damp`` of the diagonal, which pulls factors to 1."""

    damp: float

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})

    def factors(self, H_II: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return s [I], float64, for the (float, quantized) weights [O, I] of all readers."""
        H = H_II.double()
        float_, quantized = (torch.cat([pair[i].double() for pair in pairs]) for i in (0, 1))
        A = H * (quantized.T @ quantized)
        damp = self.damp * A.diagonal().mean()
        right = ((float_ @ H) * quantized).sum(0) + damp
        A.diagonal().add_(damp)
        solved: Tensor = torch.linalg.solve(A, right)
        return solved
