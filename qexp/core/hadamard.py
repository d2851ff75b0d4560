"""The Hadamard rotation of rows, of any size: the map behind QuaRot's R1 to R4.

``Hadamard(size, signs)`` is the orthogonal map x -> (x * signs) H^T / sqrt(size). Signs randomise it: without them the
all-ones row of H sends the mean of x into one coordinate. Sizes without a known Hadamard matrix get an orthonormal
DCT-II of their odd part, with a warning.

Source: methods/hadamard.md sections 5 to 7; QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from qexp.core.hadamard_matrices import dct, factorize, small_hadamard
from qexp.core.placed import Placed, wide
from qexp.kernels.graphs import constant
from qexp.kernels.hadamard import hadamard_transform, inverse_hadamard_transform

log = logging.getLogger(__name__)

State = tuple[str, dict[str, Tensor], dict[str, int | str]]  # kind, tensors, numbers: what is saved of a map


@dataclass(frozen=True, eq=False)
class Hadamard:
    """Orthogonal map on rows of ``size`` columns; signs [size] of +-1 (any dtype) or None."""

    size: int
    signs: Tensor | None

    def __post_init__(self) -> None:
        """Warn where no Hadamard matrix exists. Raises: ValueError if the signs do not fit the size."""
        if self.signs is not None and self.signs.shape != (self.size,):
            raise ValueError(f"signs have shape {tuple(self.signs.shape)}, expected ({self.size},)")
        if factorize(self.size).odd > 1:
            composed, flat = factorize(self.size), flatness(self.size)
            log.warning("no Hadamard matrix of size %d: using %s, max|entry| sqrt(n) = %.3f", self.size, composed, flat)

    def apply(self, x: Tensor) -> Tensor:
        """Return (x * signs) H^T / sqrt(size) for x [..., size], in the dtype of x (16-bit: computed in float32)."""
        signed = x if self._placed is None else wide(x) * self._placed.like(x)
        return hadamard_transform(signed, _factors(self.size, x.device), factorize(self.size).power).to(x.dtype)

    def dual(self, x: Tensor) -> Tensor:
        """Return the same as :meth:`apply`: the map is orthogonal."""
        return self.apply(x)

    def undual(self, x: Tensor) -> Tensor:
        """Return (x H / sqrt(size)) * signs for x [..., size], the inverse of :meth:`apply`."""
        y = inverse_hadamard_transform(wide(x), _factors(self.size, x.device), factorize(self.size).power)
        return (y if self._placed is None else y * self._placed.like(x)).to(x.dtype)

    def state(self) -> State:
        """Return what to save: the signs, the size and the composition the size had."""
        tensors = {} if self.signs is None else {"signs": self.signs}
        return "hadamard", tensors, {"size": self.size, "composition": str(factorize(self.size))}

    @cached_property
    def _placed(self) -> Placed | None:
        return None if self.signs is None else Placed(self.signs)


def randomized_hadamard(size: int, generator: torch.Generator) -> Hadamard:
    """Return a Hadamard map with random signs drawn on the CPU, so that every device sees the same ones."""
    return Hadamard(size, torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1)


def hadamard_from_state(tensors: dict[str, Tensor], numbers: dict[str, int | str]) -> Hadamard:
    """Rebuild a saved map. Raises: ValueError if this version composes the size in another way."""
    size = int(numbers["size"])
    if numbers["composition"] != str(factorize(size)):
        raise ValueError(f"saved Hadamard {size} = {numbers['composition']}, this version has {factorize(size)}")
    return Hadamard(size, tensors.get("signs"))


def flatness(size: int) -> float:
    """Return max|entry| * sqrt(size) of the map: 1 for a Hadamard matrix, at most sqrt(2) for the DCT in its place."""
    return float(dct(factorize(size).odd).abs().max())


@cache
@constant
def _factors(size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the small matrices K_i on the device: int8, or float64 for a DCT."""
    found = factorize(size)
    matrices = [small_hadamard(order) for order in found.orders] + ([dct(found.odd)] if found.odd > 1 else [])
    return tuple(matrix.to(device) for matrix in matrices)
