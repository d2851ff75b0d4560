"""Invertible linear maps on rows, the material of function-preserving rewrites.

A map with matrix A acts on what is written, ``apply(x) = x A``, and dually on the rows of the weights that read it,
``dual(w) = w A^-T``, so that apply(x) . dual(w) = x . w. ``undual(w) = w A^T`` takes the dual back. Every map works on
the last axis, on the device of its argument, in float64 for float64 and in float32 for anything else (cast back).
Source: methods/hadamard.md section 1, methods/quarot.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from qexp.core.hadamard import State
from qexp.core.placed import Placed, wide


class LinearMap(Protocol):
    """An invertible matrix A [size, size] known by its actions on rows [..., size]."""

    @property
    def size(self) -> int:
        """Number of columns of the rows it acts on."""

    def apply(self, x: Tensor) -> Tensor:
        """Return x A."""

    def dual(self, x: Tensor) -> Tensor:
        """Return x A^-T."""

    def undual(self, x: Tensor) -> Tensor:
        """Return x A^T."""

    def state(self) -> State:
        """Return (kind, tensors, numbers), from which :func:`map_from_state` rebuilds the map."""


@dataclass(frozen=True, eq=False)
class Diagonal:
    """x_j -> x_j a_j for a vector a [size] without zeros."""

    a: Tensor

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.a.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """Return x * a."""
        return (wide(x) * self._placed.like(x)).to(x.dtype)

    def dual(self, x: Tensor) -> Tensor:
        """Return x / a."""
        return (wide(x) / self._placed.like(x)).to(x.dtype)

    undual = apply  # A is its own transpose

    def state(self) -> State:
        """Return the vector."""
        return "diagonal", {"a": self.a}, {}

    @cached_property
    def _placed(self) -> Placed:
        return Placed(self.a)


@dataclass(frozen=True, eq=False)
class Dense:
    """x -> x A for a matrix A [size, size]; its inverse is computed when asked for, in float64, unless it is given."""

    a: Tensor
    a_inv: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.a.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """Return x A."""
        return (wide(x) @ self._placed.like(x)).to(x.dtype)

    def dual(self, x: Tensor) -> Tensor:
        """Return x A^-T."""
        return (wide(x) @ self._inverse.like(x).T).to(x.dtype)

    def undual(self, x: Tensor) -> Tensor:
        """Return x A^T."""
        return (wide(x) @ self._placed.like(x).T).to(x.dtype)

    def state(self) -> State:
        """Return the matrix."""
        return "dense", {"a": self._placed.tensor}, {}

    @cached_property
    def _placed(self) -> Placed:
        return Placed(self.a)

    @cached_property
    def _inverse(self) -> Placed:
        return Placed(torch.linalg.inv(self.a.double()) if self.a_inv is None else self.a_inv)


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """x -> x A for an orthogonal matrix A [size, size], which is its own dual."""

    a: Tensor

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.a.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """Return x A."""
        return (wide(x) @ self._placed.like(x)).to(x.dtype)

    dual = apply

    def undual(self, x: Tensor) -> Tensor:
        """Return x A^T."""
        return (wide(x) @ self._placed.like(x).T).to(x.dtype)

    def state(self) -> State:
        """Return the matrix."""
        return "orthogonal", {"a": self._placed.tensor}, {}

    @cached_property
    def _placed(self) -> Placed:
        return Placed(self.a)


@dataclass(frozen=True, eq=False)
class Permutation:
    """x_j -> column ``order[j]`` of x; order int32 or int64 [size] holds every column once."""

    order: Tensor

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.order.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        """Return x with its columns in the new order."""
        return x.index_select(-1, self._orders(x.device)[0])

    dual = apply  # a permutation is orthogonal

    def undual(self, x: Tensor) -> Tensor:
        """Return x with its columns put back."""
        return x.index_select(-1, self._orders(x.device)[1])

    def state(self) -> State:
        """Return the order."""
        return "permutation", {"order": self.order}, {}

    def _orders(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._placed[0].device != device:
            self.__dict__["_placed"] = tuple(order.to(device) for order in self._placed)
        return self._placed

    @cached_property
    def _placed(self) -> tuple[Tensor, Tensor]:
        return self.order, torch.argsort(self.order)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """x -> x (A (x) B): rows viewed as X [p, q] become A^T X B, at p + q products an element instead of p q."""

    left: Dense
    right: Dense

    @property
    def size(self) -> int:
        """Number of columns, p q."""
        return self.left.size * self.right.size

    def apply(self, x: Tensor) -> Tensor:
        """Return x (A (x) B)."""
        return self._along(x, self.left.apply, self.right.apply)

    def dual(self, x: Tensor) -> Tensor:
        """Return x (A^-T (x) B^-T)."""
        return self._along(x, self.left.dual, self.right.dual)

    def undual(self, x: Tensor) -> Tensor:
        """Return x (A^T (x) B^T)."""
        return self._along(x, self.left.undual, self.right.undual)

    def state(self) -> State:
        """Return both matrices."""
        sides = {"left": self.left.state()[1], "right": self.right.state()[1]}
        return "kronecker", {f"{side}.{n}": t for side, parts in sides.items() for n, t in parts.items()}, {}

    def _along(self, x: Tensor, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]) -> Tensor:
        rows = right(wide(x).reshape(*x.shape[:-1], self.left.size, self.right.size))
        return left(rows.transpose(-1, -2)).transpose(-1, -2).reshape(x.shape).to(x.dtype)
