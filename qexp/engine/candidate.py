"""A block as it would be: run with what learned tensors make of it and the recipe's quantizers, nothing changed.

Weights are computed on the way, differentiable; online maps and quantizers are put in place for one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from qexp.core.learned import NO_CLIPS, Made
from qexp.core.linear import InputPath, QuantLinear
from qexp.core.maps import LinearMap
from qexp.core.norms import NORM, OFFSET_NORM
from qexp.core.placed import wide
from qexp.core.ranges import Clipped, Imitated, bare, within
from qexp.core.rewrite import dual_weight, dual_written, undo, written
from qexp.core.stages import Grid, Method
from qexp.core.straight import straight
from qexp.core.words import FULL_BITS, Insert, Site, Writer
from qexp.engine.acting import act_of, search_quantizer
from qexp.engine.streams import Kwargs
from qexp.models.view import ModelView

Inserts = Mapping[str, Insert]
Grids = Mapping[str, Grid]
Weights = dict[str, Tensor]


class Candidate:
    """Blocks run with the weights and online maps that learned tensors would give them; nothing is changed."""

    def __init__(self, view: ModelView, sites: Sequence[Site]) -> None:
        self.view, self.sites = view, {site.name: site for site in sites}

    def weights(self, made: Made, block: int, grids: Grids) -> Weights:
        """Return the parameters of a block that differ from its own, by full name, differentiable.

        ``grids`` of the layers to round.
        """
        prefix = f"{self.view.prefix}.{block}."
        weights = {**self._rewritten(made.inserts, prefix), **made.weights}
        for name in (name for name in grids if name.startswith(prefix)):
            if f"{name}.weight" not in made.weights:
                linear = self.view.linear(name)
                W, ratios = wide(weights.get(f"{name}.weight", linear.weight)), made.clips.weights.get(name)
                grid = grids[name] if ratios is None else within(grids[name], ratios)
                weights[f"{name}.weight"] = _beside_kept(linear, W, grid)
        return weights

    def answer(self, made: Made, block: int, weights: Weights, x: Tensor, kwargs: Kwargs) -> Tensor:
        """Return what a block with these weights answers to x, in the dtype of x."""
        prefix = f"{self.view.prefix}.{block}."
        plain = {f"{prefix}{name}": value for name, value in self.view.blocks[block].named_parameters()}
        local = {name.removeprefix(prefix): W.to(x.dtype) for name, W in (plain | weights).items()}
        with self._online(made.inserts, prefix):
            answer = functional_call(self.view.blocks[block], local, (x,), kwargs)
        first: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return first

    def block(self, inserts: Inserts, block: int, x: Tensor, kwargs: Kwargs, grids: Grids) -> Tensor:
        """Return what a block answers to x under inserts; gradients reach the tensors of the inserts."""
        made = Made(inserts)
        return self.answer(made, block, self.weights(made, block, grids), x, kwargs)

    def _folded(self, name: str, insert: Insert) -> bool:
        return insert.kind in self.sites[name].admits

    def _rewritten(self, inserts: Inserts, prefix: str) -> Weights:
        """Return what the inserts make of a block's parameters; what is folded acts first."""
        made = _Parameters(self.view)
        for name, insert in sorted(inserts.items(), key=lambda item: not self._folded(*item)):
            site, folded = self.sites[name], self._folded(name, insert)
            for writer in (w for w in site.writers if folded and w.name.startswith(prefix)):
                made.write(writer, insert)
            for reader in (r for r in site.readers if site.kind != "query_key" and r.startswith(prefix)):
                if site.kind == "keys":
                    made.answer_keys(reader, site, insert)
                else:
                    made.read(reader, insert, self.view.linear(reader).path.maps if folded else [])
        return made.made

    @contextmanager
    def _online(self, inserts: Inserts, prefix: str) -> Iterator[None]:
        """Let the maps of a block that are not folded run in front of their readers, and take them out again."""
        placed: list[tuple[InputPath, LinearMap]] = []
        turned: list[tuple[Any, LinearMap | None]] = []
        for name, insert in inserts.items():
            reader = self.sites[name].readers[0]
            if self._folded(name, insert) or not reader.startswith(prefix):
                continue
            if self.sites[name].kind == "query_key":
                door: Any = self.view.model.get_submodule(reader).door
                turned.append((door, door.rotation))
                door.rotation = insert.map
            else:
                path = self.view.linear(reader).path
                path.maps.append(insert.map)
                placed.append((path, insert.map))
        try:
            yield
        finally:
            for path, map in placed:
                path.maps.remove(map)
            for door, before in turned:
                door.rotation = before


class _Parameters:
    """Parameters as inserts change them one after the other: core/rewrite.py, differentiable and on the side."""

    def __init__(self, view: ModelView) -> None:
        self.view, self.made = view, Weights()

    def now(self, name: str) -> Tensor | None:
        if name in self.made:
            return self.made[name]
        owner, leaf = name.rsplit(".", 1)
        value: Tensor | None = getattr(self.view.model.get_submodule(owner), leaf, None)
        return None if value is None else wide(value)

    def write(self, writer: Writer, insert: Insert) -> None:
        """Let a norm or a linear write (x + shift) A."""
        weight, bias = self.now(f"{writer.name}.weight"), self.now(f"{writer.name}.bias")
        assert weight is not None
        if writer.kind in (NORM, OFFSET_NORM):
            offset = 1.0 if writer.kind == OFFSET_NORM else 0.0
            self.made[f"{writer.name}.weight"] = insert.map.apply(weight + offset) - offset
            write = insert.map.apply
        else:
            write = partial(written, insert.map, self.view.linear(writer.name).unmap)
            self.made[f"{writer.name}.weight"] = write(weight.T).T
        if bias is not None:
            self.made[f"{writer.name}.bias"] = write(bias if insert.shift is None else bias + insert.shift.to(bias))

    def read(self, reader: str, insert: Insert, online: list[LinearMap]) -> None:
        """Give a linear the dual of the map, and the bias that undoes the shift."""
        weight, bias = self.now(f"{reader}.weight"), self.now(f"{reader}.bias")
        assert weight is not None
        if insert.shift is not None:
            assert bias is not None, "a shift in front of a linear without a bias"
            self.made[f"{reader}.bias"] = bias - undo(weight, online) @ insert.shift.to(weight)
        self.made[f"{reader}.weight"] = dual_weight(weight, insert.map, online)

    def answer_keys(self, reader: str, site: Site, insert: Insert) -> None:
        """Let queries, which meet the keys, have the dual of the map: rows of their linear, or their norm's gain."""
        weight, bias = self.now(f"{reader}.weight"), self.now(f"{reader}.bias")
        assert weight is not None
        kind = site.writers[0].kind
        if kind in (NORM, OFFSET_NORM):
            offset = 1.0 if kind == OFFSET_NORM else 0.0
            self.made[f"{reader}.weight"] = insert.map.dual(weight + offset) - offset
            return
        write = partial(dual_written, insert.map, self.view.linear(reader).unmap)
        self.made[f"{reader}.weight"] = write(weight.T).T
        if bias is not None:
            self.made[f"{reader}.bias"] = write(bias)


@contextmanager
def quantizers(
    view: ModelView, method: Method, blocks: Iterable[int], clips: Mapping[str, Tensor] = NO_CLIPS.acts
) -> Iterator[None]:
    """Switch the recipe's activation and key/value quantizers on, and back to what was before.

    Ranges are those that the block has, else those of each batch; ``clips`` of activations by site.
    """
    which = list(blocks)
    groups = [group for block in which for group in view.groups(block)]
    paths = [view.linear(group.layers[0].name).path for group in groups]
    acts = [
        search_quantizer(act_of(method, group), clips.get(group.site), path.ranges)
        for group, path in zip(groups, paths, strict=True)
    ]
    doors = [door for block in which if (door := view.door(block)) is not None]
    before = [path.act for path in paths], [door.kv for door in doors]
    try:
        for path, quantizer in zip(paths, acts, strict=True):
            path.act = quantizer
        for door in doors:
            door.kv = method.kv if method.kv.bits < FULL_BITS else None
        yield
    finally:
        for path, act in zip(paths, before[0], strict=True):
            path.act = act
        for door, kv in zip(doors, before[1], strict=True):
            door.kv = kv


def _beside_kept(linear: QuantLinear, W: Tensor, grid: Grid) -> Tensor:
    """Return W rounded but for the columns that are kept."""
    kept = linear.path.kept
    return torch.cat([_rounded(grid, W[:, :-kept]), W[:, -kept:]], dim=1) if kept else _rounded(grid, W)


def _rounded(grid: Grid, W: Tensor) -> Tensor:
    """Return W on its grid; gradients pass through the rounding, and through the ranges where the grid can tell."""
    inner = bare(grid)
    if isinstance(inner, Imitated):
        return inner.imitate(W, grid.ratios if isinstance(grid, Clipped) else None)
    if not W.detach().isfinite().all():
        return W  # its loss is no number either, which the loop answers
    cut, params = grid.clamp(W) if isinstance(grid, Clipped) else W, grid.fit(W.detach(), None)
    return straight(cut, grid.decode(grid.encode(W.detach(), params), params))
