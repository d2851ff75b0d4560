"""Leave every weight as it is: the float baseline as a recipe like any other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from qexp.core.measures import Measures
from qexp.core.words import FULL_BITS, Layer


@dataclass(frozen=True, kw_only=True)
class NoAllocation:
    """The null member."""

    version: ClassVar[int] = 1

    def assign(self, layers: Iterable[Layer], measures: Measures) -> dict[str, int]:
        """Return 16 bits by layer name."""
        return {layer.name: FULL_BITS for layer in layers}

    def act_bits(self, layer: Layer, bits: int) -> int:
        """Return the bits of a layer's input: what all others have."""
        return bits
