"""Give every layer the same bits: what every paper means where it says nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from qexp.core.measures import Measures
from qexp.core.words import Layer


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """The same ``bits`` everywhere; damages are never asked for."""

    bits: int

    version: ClassVar[int] = 1

    def assign(self, layers: Iterable[Layer], measures: Measures) -> dict[str, int]:
        """Return bits by layer name."""
        return {layer.name: self.bits for layer in layers}

    def act_bits(self, layer: Layer, bits: int) -> int:
        """Return the bits of a layer's input: what all others have."""
        return bits
