"""A block as it would be: run with candidate inserts and the recipe's quantizers, differentiable, nothing changed.

Weights are computed from the inserts on the way; online maps and quantizers are put in place for one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.func import functional_call

from qexp.core.learned import NO_CLIPS, Clipped, Imitated
from qexp.core.linear import InputPath
from qexp.core.maps import LinearMap
from qexp.core.placed import wide
from qexp.core.rewrite import dual_weight, written
from qexp.core.stages import Grid, Method
from qexp.core.words import FULL_BITS, Insert, Site
from qexp.engine.acting import act_of, search_quantizer
from qexp.engine.streams import Kwargs
from qexp.models.view import ModelView

Inserts = Mapping[str, Insert]


class Candidate:
    """Blocks run with the weights and online maps that candidate inserts would give them; nothing is changed.

    Folded maps are those that linears write; shifts are not among what can be tried yet.
    """

    def __init__(self, view: ModelView, sites: Sequence[Site]) -> None:
        self.view, self.sites = view, {site.name: site for site in sites}

    def block(self, inserts: Inserts, block: int, x: Tensor, kwargs: Kwargs, grids: Mapping[str, Grid]) -> Tensor:
        """Return what a block answers to x; gradients reach the tensors of the inserts.

        ``grids`` of the layers to round may be clipped: their ratios have gradients, too. The whole block computes in
        the dtype of x, whatever its parameters are stored in.
        """
        prefix = f"{self.view.prefix}.{block}."
        weights = self._weights(inserts, prefix)
        for name in (name for name in grids if name.startswith(prefix)):
            W = wide(weights.get(f"{name}.weight", self.view.linear(name).weight))
            weights[f"{name}.weight"] = _rounded(grids[name], W)
        plain = {f"{prefix}{name}": value for name, value in self.view.blocks[block].named_parameters()}
        local = {name.removeprefix(prefix): W.to(x.dtype) for name, W in (plain | weights).items()}
        with self._online(inserts, prefix):
            answer = functional_call(self.view.blocks[block], local, (x,), kwargs)
        first: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return first

    def _folded(self, name: str, insert: Insert) -> bool:
        return insert.kind in self.sites[name].admits

    def _weights(self, inserts: Inserts, prefix: str) -> dict[str, Tensor]:
        """Return what the inserts make of a block's weights and biases, by full name; what is folded acts first."""
        made: dict[str, Tensor] = {}

        def now(name: str) -> Tensor:
            return made[name] if name in made else wide(self.view.model.get_parameter(name))

        for name, insert in sorted(inserts.items(), key=lambda item: not self._folded(*item)):
            site, folded = self.sites[name], self._folded(name, insert)
            for writer in (w.name for w in site.writers if folded and w.name.startswith(prefix)):
                write = partial(written, insert.map, self.view.linear(writer).unmap)
                made[f"{writer}.weight"] = write(now(f"{writer}.weight").T).T
                if self.view.linear(writer).bias is not None:
                    made[f"{writer}.bias"] = write(now(f"{writer}.bias"))
            for reader in (r for r in site.readers if site.kind != "query_key" and r.startswith(prefix)):
                online = self.view.linear(reader).path.maps if folded else []
                made[f"{reader}.weight"] = dual_weight(now(f"{reader}.weight"), insert.map, online)
        return made

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


@contextmanager
def quantizers(
    view: ModelView, method: Method, blocks: Iterable[int], clips: Mapping[str, Tensor] = NO_CLIPS.acts
) -> Iterator[None]:
    """Switch the recipe's activation and key/value quantizers on, and off again; ranges are those of each batch.

    ``clips`` of activations by site.
    """
    which = list(blocks)
    groups = [group for block in which for group in view.groups(block)]
    acts = [search_quantizer(act_of(method, group), clips.get(group.site)) for group in groups]
    paths = [(view.linear(group.layers[0].name).path, act) for group, act in zip(groups, acts, strict=True)]
    doors = [door for block in which if (door := view.door(block)) is not None]
    try:
        for path, quantizer in paths:
            path.act = quantizer
        for door in doors:
            door.kv = method.kv if method.kv.bits < FULL_BITS else None
        yield
    finally:
        for path, _ in paths:
            path.act = None
        for door in doors:
            door.kv = None


def _rounded(grid: Grid, W: Tensor) -> Tensor:
    """Return W on its grid; gradients pass through the rounding, and through the ranges where the grid can tell."""
    if isinstance(grid, Clipped):
        return _rounded(grid.grid, grid.clamp(W))
    if isinstance(grid, Imitated):
        return grid.imitate(W)
    params = grid.fit(W.detach(), None)
    return W + (grid.decode(grid.encode(W.detach(), params), params) - W).detach()
