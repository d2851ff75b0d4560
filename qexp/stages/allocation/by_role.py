"""Other bits for some kinds of layers: QUIK keeps down_proj, the hardest input, at 8.

Source: arXiv:2310.09259 section 3.2 (weights and activations of down_proj and fc2 at 8 bits).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from qexp.core.errors import UserError
from qexp.core.measures import Measures
from qexp.core.words import FULL_BITS, Layer

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class ByRole:
    """``bits`` everywhere, but ``roles`` have their own, never fewer; their activations too if ``activations``."""

    bits: int
    roles: Mapping[str, int]
    activations: bool

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Raise UserError for a role or width that means nothing."""
        for role, bits in self.roles.items():
            if role not in ROLES or (not 2 <= bits <= 8 and bits != FULL_BITS):
                got = f"allocation.roles has {role}: {bits}"
                raise UserError(got, f"one of {', '.join(ROLES)} with 2 to 8 bits", "method.allocation.roles={down: 8}")

    def assign(self, layers: Iterable[Layer], measures: Measures) -> dict[str, int]:
        """Return bits by layer name."""
        return {layer.name: self._least(layer, self.bits) for layer in layers}

    def act_bits(self, layer: Layer, bits: int) -> int:
        """Return the bits of a layer's input where the others have ``bits``."""
        return self._least(layer, bits) if self.activations else bits

    def _least(self, layer: Layer, bits: int) -> int:
        return max(bits, self.roles.get(layer.role, bits))
