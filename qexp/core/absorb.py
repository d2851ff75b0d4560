"""What an insert makes of the parameters around its site: one arithmetic, in place or on the side.

x (a row) becomes (x + shift) A: writers produce that, readers get the dual, W <- W A^-T, b <- b - W shift, so that the
function stays what it was. ``core/rewrite.py`` does it to the model, in float64; a block that is tried before anything
is changed (engine/candidate.py) does it differentiably, beside the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qexp.core.linear import QuantLinear
from qexp.core.maps import LinearMap
from qexp.core.norms import NORM, OFFSET_NORM
from qexp.core.words import Insert, Writer


class Parameters:
    """The parameters of a model by full name, as inserts change them one after the other."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def now(self, name: str) -> Tensor | None:
        """Return a parameter as it is by now, in the dtype of the arithmetic; None if there is none."""
        raise NotImplementedError

    def put(self, name: str, value: Tensor) -> None:
        """Take note of a changed parameter; one that was not there is added."""
        raise NotImplementedError

    def write(self, writer: Writer, change: Insert) -> None:
        """Let a norm, a linear or an embedding write (x + shift) A."""
        apply, weight, bias = change.map.apply, self._weight(writer.name), self.now(f"{writer.name}.bias")
        if bias is not None and change.shift is not None:
            bias = bias + change.shift.to(bias)
        assert change.shift is None or bias is not None, f"a shift at {writer.name}, which has no bias"
        if writer.kind in (NORM, OFFSET_NORM):
            offset = _offset(writer)
            self.put(f"{writer.name}.weight", _or(1.0, apply(weight + offset)) - offset)
            if bias is not None:
                self.put(f"{writer.name}.bias", _or(0.0, apply(bias)))
            return
        if writer.kind == "embedding":
            self.put(f"{writer.name}.weight", apply(weight))
            return
        unmap = self._unmap(writer.name)
        self.put(f"{writer.name}.weight", written(change.map, unmap, weight.T.contiguous()).T)
        if bias is not None:
            self.put(f"{writer.name}.bias", written(change.map, unmap, bias))

    def read(self, reader: str, change: Insert, folded: bool) -> None:
        """Give a linear the dual of the map, behind its online maps unless it is ``folded``, and undo the shift."""
        module: Any = self.model.get_submodule(reader)
        online = module.path.maps if isinstance(module, QuantLinear) and folded else []
        weight = self._weight(reader)
        if change.shift is not None:
            addition = -(undo(weight, online) @ change.shift.to(weight))
            bias = self.now(f"{reader}.bias")
            self.put(f"{reader}.bias", addition if bias is None else bias + addition)
        self.put(f"{reader}.weight", dual_weight(weight, change.map, online))

    def answer(self, queries: str, keys: Writer, change: Insert) -> None:
        """Let queries, which meet the keys, have the dual of the map: rows of their linear, or their norm's gain."""
        weight, bias = self._weight(queries), self.now(f"{queries}.bias")
        if keys.kind in (NORM, OFFSET_NORM):
            offset = _offset(keys)
            self.put(f"{queries}.weight", change.map.dual(weight + offset) - offset)
            return
        unmap = self._unmap(queries)
        self.put(f"{queries}.weight", _dual_written(change.map, unmap, weight.T.contiguous()).T)
        if bias is not None:
            self.put(f"{queries}.bias", _dual_written(change.map, unmap, bias))

    def _weight(self, name: str) -> Tensor:
        weight = self.now(f"{name}.weight")
        assert weight is not None
        return weight

    def _unmap(self, name: str) -> LinearMap | None:
        return getattr(self.model.get_submodule(name), "unmap", None)


class InPlace(Parameters):
    """The model's own parameters; arithmetic in float64."""

    def now(self, name: str) -> Tensor | None:
        """Return a parameter in float64."""
        value = present(self.model, name)
        return None if value is None else value.double()

    def put(self, name: str, value: Tensor) -> None:
        """Copy the value into the model."""
        there = present(self.model, name)
        if there is not None:
            there.copy_(value)
            return
        owner, leaf = name.rsplit(".", 1)
        module: Any = self.model.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(value.to(module.weight), requires_grad=False))


def present(model: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of the model by its full name, None if there is none."""
    owner, leaf = name.rsplit(".", 1)
    value: Tensor | None = getattr(model.get_submodule(owner), leaf, None)
    return value


def _offset(norm: Writer) -> float:
    return 1.0 if norm.kind == OFFSET_NORM else 0.0


def written(map: LinearMap, unmap: LinearMap | None, outputs: Tensor) -> Tensor:
    """Return a writer's outputs [..., O] mapped, in front of a map that is taken back behind its product."""
    return map.apply(outputs) if unmap is None else unmap.apply(map.apply(unmap.undual(outputs)))


def _dual_written(map: LinearMap, unmap: LinearMap | None, outputs: Tensor) -> Tensor:
    return map.dual(outputs) if unmap is None else unmap.apply(map.dual(unmap.undual(outputs)))


def _or(value: float, products: Tensor) -> Tensor:
    """Return products with ``value`` where they are 0 * inf: a silent channel, which ``unit_gain`` gives up."""
    return torch.where(products.isnan(), value, products)


def dual_weight(W: Tensor, map: LinearMap, online: list[LinearMap]) -> Tensor:
    """Return a reader's weight [O, I] after the dual of ``map``, which acts before the ``online`` maps."""
    W = map.dual(undo(W, online))
    for step in online:
        W = step.dual(W)
    return W


def undo(W: Tensor, online: list[LinearMap]) -> Tensor:
    """Return a reader's weight [O, I] as it would be without the ``online`` maps in front of it."""
    for step in reversed(online):
        W = step.undual(W)
    return W
