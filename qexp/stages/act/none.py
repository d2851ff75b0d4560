"""Leave activations as they are: the weight-only recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qexp.core.words import FULL_BITS, Stats


@dataclass(frozen=True, kw_only=True)
class NoAct:
    """The null member."""

    version: ClassVar[int] = 1
    bits: ClassVar[int] = FULL_BITS

    def freeze(self, stats: Stats | None) -> Callable[[Tensor], Tensor]:
        """Return the identity."""
        return lambda x: x
