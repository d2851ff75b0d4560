"""Maps made of maps: over the heads of a row, across them, or one after the other; and any map from its saved state.

Source: methods/quarot.md section 3 (values and heads), methods/hadamard.md section 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from qexp.core.hadamard import State, hadamard_from_state
from qexp.core.maps import Dense, Diagonal, Kronecker, LinearMap, Orthogonal, Permutation
from qexp.core.placed import Placed, wide

Numbers = dict[str, int | str]


@dataclass(frozen=True, eq=False)
class PerHead:
    """The same inner map of size d on each d columns; rows may have any number of heads, ``heads`` fixes ``size``."""

    inner: LinearMap
    heads: int

    @property
    def size(self) -> int:
        """Number of columns on the side that has ``heads`` heads."""
        return self.inner.size * self.heads

    def apply(self, x: Tensor) -> Tensor:
        """Return x (I (x) A); x [..., h d] for any h, as grouped-query attention writes fewer heads than it reads."""
        return self._each(self.inner.apply, x)

    def dual(self, x: Tensor) -> Tensor:
        """Return x (I (x) A^-T)."""
        return self._each(self.inner.dual, x)

    def undual(self, x: Tensor) -> Tensor:
        """Return x (I (x) A^T)."""
        return self._each(self.inner.undual, x)

    def state(self) -> State:
        """Return the inner map's state and the number of heads."""
        return _pack("per_head", {"inner": self.inner}, {"heads": self.heads})

    def _each(self, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return act(x.reshape(*x.shape[:-1], -1, self.inner.size)).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """A map of its own for each of H heads, ``a`` [H, d] of diagonals or [H, d, d] of matrices.

    Rows with a multiple of H heads give each map to as many neighbours: grouped-query attention reads more heads than
    it writes. Inverses are computed where they are asked for, in the dtype of ``a``, unless they are given.
    """

    a: Tensor
    a_inv: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of columns on the side that has H heads."""
        return self.a.shape[0] * self.a.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """Return every head times its map."""
        return self._each(x, self._placed.like(x))

    def dual(self, x: Tensor) -> Tensor:
        """Return every head times the inverse transpose of its map."""
        if self.a.dim() == 2:
            return self._each(x, 1 / self._placed.like(x))
        return self._each(x, self._inverse.like(x).mT)

    def undual(self, x: Tensor) -> Tensor:
        """Return every head times the transpose of its map."""
        a = self._placed.like(x)
        return self._each(x, a if a.dim() == 2 else a.mT)

    def state(self) -> State:
        """Return the maps."""
        return "head_maps", {"a": self.a}, {}

    def _each(self, x: Tensor, a: Tensor) -> Tensor:
        heads = wide(x).unflatten(-1, (len(a), -1, a.shape[1]))  # [..., H, neighbours, d]
        mapped = heads * a[:, None] if a.dim() == 2 else heads @ a
        same: Tensor = mapped.reshape(x.shape).to(x.dtype)
        return same

    @cached_property
    def _placed(self) -> Placed:
        return Placed(self.a)

    @cached_property
    def _inverse(self) -> Placed:
        return Placed(torch.linalg.inv(self.a) if self.a_inv is None else self.a_inv)


@dataclass(frozen=True, eq=False)
class AcrossHeads:
    """The inner map along the head axis of rows [heads * d]: columns at equal places in their heads are mixed."""

    inner: LinearMap
    head_size: int

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.inner.size * self.head_size

    def apply(self, x: Tensor) -> Tensor:
        """Return x (A (x) I)."""
        return self._from_left(self._matrices[0].like(x).T, x)

    def dual(self, x: Tensor) -> Tensor:
        """Return x (A^-T (x) I)."""
        return self._from_left(self._matrices[1].like(x).T, x)

    def undual(self, x: Tensor) -> Tensor:
        """Return x (A^T (x) I)."""
        return self._from_left(self._matrices[0].like(x), x)

    def state(self) -> State:
        """Return the inner map's state and the head size."""
        return _pack("across_heads", {"inner": self.inner}, {"head_size": self.head_size})

    def _from_left(self, matrix: Tensor, x: Tensor) -> Tensor:
        heads = wide(x).reshape(*x.shape[:-1], self.inner.size, self.head_size)
        return (matrix @ heads).reshape(x.shape).to(x.dtype)

    @property
    def _matrices(self) -> tuple[Placed, Placed]:
        return self._made() if any(t.requires_grad for t in self.inner.state()[1].values()) else self._kept

    @cached_property
    def _kept(self) -> tuple[Placed, Placed]:
        with torch.inference_mode(False):  # kept: a later caller may need gradients through it
            return self._made()

    def _made(self) -> tuple[Placed, Placed]:
        """Return the inner A and A^-T as matrices: from the left they cost a fifth of transposing the heads twice."""
        eye = torch.eye(self.inner.size, dtype=torch.float64)
        return Placed(self.inner.apply(eye)), Placed(self.inner.dual(eye))


@dataclass(frozen=True, eq=False)
class Chain:
    """Maps of one size applied one after the other, first first."""

    maps: tuple[LinearMap, ...]

    def __post_init__(self) -> None:
        """Raise ValueError unless there is a map and all have one size."""
        if len(sizes := {m.size for m in self.maps}) != 1:
            raise ValueError(f"a chain needs maps of one size, got sizes {sorted(sizes)}")

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.maps[0].size

    def apply(self, x: Tensor) -> Tensor:
        """Return x A_1 A_2 ..."""
        return reduce(lambda y, m: m.apply(y), self.maps, x)

    def dual(self, x: Tensor) -> Tensor:
        """Return x A_1^-T A_2^-T ..."""
        return reduce(lambda y, m: m.dual(y), self.maps, x)

    def undual(self, x: Tensor) -> Tensor:
        """Return x ... A_2^T A_1^T."""
        return reduce(lambda y, m: m.undual(y), reversed(self.maps), x)

    def state(self) -> State:
        """Return the states of the maps, numbered."""
        return _pack("chain", {str(i): m for i, m in enumerate(self.maps)}, {"count": len(self.maps)})


def map_from_state(kind: str, tensors: dict[str, Tensor], numbers: Numbers) -> LinearMap:
    """Rebuild a map from what its ``state()`` returned. Raises: ValueError on an unknown kind."""
    if kind not in _MAKERS:
        raise ValueError(f"unknown kind of linear map {kind!r}")
    return _MAKERS[kind](tensors, numbers)


def _kronecker(tensors: dict[str, Tensor], _numbers: Numbers) -> Kronecker:
    return Kronecker(Dense(tensors["left.a"]), Dense(tensors["right.a"]))


def _pack(kind: str, children: dict[str, LinearMap], own: dict[str, int]) -> State:
    """Return one flat state: each child's entries under its name and a dot."""
    tensors, numbers = dict[str, Tensor](), Numbers(own)
    for name, child in children.items():
        numbers[f"{name}.kind"], inner_tensors, inner_numbers = child.state()
        tensors |= {f"{name}.{key}": tensor for key, tensor in inner_tensors.items()}
        numbers |= {f"{name}.{key}": number for key, number in inner_numbers.items()}
    return kind, tensors, numbers


def _unpack(name: str, tensors: dict[str, Tensor], numbers: Numbers) -> LinearMap:
    """Rebuild the child that :func:`_pack` stored under ``name``."""
    inner_tensors = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
    inner_numbers = {key.partition(".")[2]: n for key, n in numbers.items() if key.startswith(f"{name}.")}
    return map_from_state(str(inner_numbers.pop("kind")), inner_tensors, inner_numbers)


_MAKERS: dict[str, Callable[[dict[str, Tensor], Numbers], LinearMap]] = {
    "hadamard": hadamard_from_state,
    "diagonal": lambda tensors, _: Diagonal(tensors["a"]),
    "dense": lambda tensors, _: Dense(tensors["a"]),
    "orthogonal": lambda tensors, _: Orthogonal(tensors["a"]),
    "permutation": lambda tensors, _: Permutation(tensors["order"]),
    "kronecker": _kronecker,
    "per_head": lambda tensors, numbers: PerHead(_unpack("inner", tensors, numbers), int(numbers["heads"])),
    "head_maps": lambda tensors, _: HeadMaps(tensors["a"]),
    "across_heads": lambda tensors, numbers: AcrossHeads(_unpack("inner", tensors, numbers), int(numbers["head_size"])),
    "chain": lambda tensors, numbers: Chain(
        tuple(_unpack(str(i), tensors, numbers) for i in range(int(numbers["count"])))
    ),
}
