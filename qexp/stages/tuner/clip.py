"""Learn how far the range of every row or group of weights goes (LWC: learnable weight clipping).

    range = [sigmoid(l) * min W, sigmoid(u) * max W],  l and u learned, one each per slice, 4 at the start (0.982)
They are learned against the block's float answer before any code is taken, together with the recipe's last transform if
that one is learned (OmniQuant's LET), else alone behind all transforms. Any grid then fits the cut range.

Source: arXiv:2308.13137 section 3.2, code 95fae1b, methods/omniquant.md.
Differs: gradients go straight through the rounding of zero points, so a weight that is cut follows its end; scales are
met as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from qexp.core.learned import Clips, Made, Part
from qexp.core.minimise import Knobs
from qexp.core.training import Training


@dataclass(frozen=True, kw_only=True)
class Clip:
    """``start`` of the logits and their ``rate``; ``training`` counts where no transform is learned."""

    start: float
    rate: float
    training: Training

    version: ClassVar[int] = 1

    def ranges(self, slices: Mapping[str, tuple[int, int]]) -> Part:
        """Return the logits of all layers of a block, [O, G, 2] each."""
        logits = {name: torch.full((*shape, 2), self.start).requires_grad_() for name, shape in slices.items()}

        def make() -> Made:
            return Made(clips=Clips(weights={name: logit.sigmoid() for name, logit in logits.items()}))

        return Part([Knobs("clips", list(logits.values()), self.rate)], make)
