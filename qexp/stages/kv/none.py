"""Leave keys and values as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qexp.core.words import FULL_BITS


@dataclass(frozen=True, kw_only=True)
class NoKv:
    """The null member."""

    version: ClassVar[int] = 1
    bits: ClassVar[int] = FULL_BITS

    def __call__(self, k_BASE: Tensor, v_BASE: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values unchanged."""
        return k_BASE, v_BASE

    def cost(self, head_size: int) -> float:
        """Return 16 bits per cached element."""
        return float(FULL_BITS)
