"""Settings that every quantizer to small floats has, of weights or of activations, and their check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from qexp.core.errors import UserError, choose
from qexp.core.words import FULL_BITS
from qexp.kernels.floats import ELEMENTS, RULES, element

BITS = {"grid": "bits.weight", "act": "bits.act"}


class SmallFloats(Protocol):
    """A quantizer to elements by their bits, in blocks with scales of a kind; ``rule`` is for powers of two."""

    @property
    def bits(self) -> int:
        """Return bits of a value."""
        ...

    @property
    def elements(self) -> Mapping[int, str]:
        """Return the name of the element by its bits."""
        ...

    @property
    def scale(self) -> str:
        """Return what scales are stored as."""
        ...

    @property
    def rule(self) -> str:
        """Return how powers of two are chosen."""
        ...


def check_floats(stage: str, floats: SmallFloats, scales: Iterable[str]) -> None:
    """Raise UserError for a scale, a rule or an element that does not exist, or bits without an element."""
    choose(f"{stage}.scale", floats.scale, tuple(scales), f"method.{stage}.scale")
    choose(f"{stage}.rule", floats.rule, RULES, f"method.{stage}.rule")
    for bits, name in floats.elements.items():
        choose(f"{stage}.elements", name, ELEMENTS, f"method.{stage}.elements")
        own = element(name).bits
        if own != bits:
            got = f"{stage}.elements={{{bits}: {name}}}, an element of {own} bits"
            raise UserError(got, "each element at its own bits", f"method.{stage}.elements={{{own}:{name}}}")
    if floats.bits not in floats.elements and floats.bits != FULL_BITS:
        has = " or ".join(str(bits) for bits in floats.elements)
        raise UserError(f"floats of {floats.bits} bits", f"{has} bits", f"{BITS[stage]}={min(floats.elements)}")
