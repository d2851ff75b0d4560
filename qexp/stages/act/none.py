"""Leave activations as they are: the weight-only recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qexp.core.words import FULL_BITS, Params


@dataclass(frozen=True, kw_only=True)
class NoAct:
    """The null member."""

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    bits: ClassVar[int] = FULL_BITS

    def check(self, inputs: int) -> None:
        """Take inputs of any width."""

    def fit(self, low_I: Tensor, high_I: Tensor) -> Params:
        """Keep nothing."""
        return {}

    def freeze(self, kept: Params) -> Callable[[Tensor], Tensor]:
        """Return the identity."""
        return lambda x: x
