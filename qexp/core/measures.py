"""What an allocation that measures asks for, and what it is answered by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from qexp.core.words import Layer


class Measures(Protocol):
    """What an allocation may ask about a layer at some bits, and where it may say what it found."""

    def damage(self, layer: Layer, bits: int) -> float:
        """Return what quantizing this layer alone does to the model, by the allocation's own ``metric``."""
        ...

    def cost(self, layer: Layer, bits: int) -> float:
        """Return the stored bits per weight."""
        ...

    def tell(self, name: str, value: float) -> None:
        """Keep a figure for the record."""
        ...


@runtime_checkable
class Measured(Protocol):
    """An allocation that asks for damages."""

    @property
    def metric(self) -> str:
        """Return what is measured: kl, trace, fisher or output."""
        ...

    @property
    def options(self) -> Sequence[int]:
        """Return the bits a layer may get."""
        ...

    @property
    def sequences(self) -> int:
        """Return on how many sequences."""
        ...
