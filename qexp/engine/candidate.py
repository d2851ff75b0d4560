"""A block as it would be: run with what learned tensors make of it and the recipe's quantizers, nothing changed.

Weights are computed on the way, differentiable; online maps and quantizers are put in place for one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from qexp.core.absorb import Parameters, present
from qexp.core.learned import NO_CLIPS, Made
from qexp.core.linear import InputPath
from qexp.core.maps import LinearMap
from qexp.core.method import Method
from qexp.core.placed import wide
from qexp.core.ranges import Clipped, Imitated, bare, within
from qexp.core.stages import Grid
from qexp.core.straight import straight
from qexp.core.words import FULL_BITS, Insert, Site
from qexp.engine.acting import act_of, search_quantizer
from qexp.engine.streams import Kwargs, hidden_states
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
                linear, ratios = self.view.linear(name), made.clips.weights.get(name)
                W = wide(weights.get(f"{name}.weight", linear.weight))
                grid = grids[name] if ratios is None else within(grids[name], ratios)
                weights[f"{name}.weight"] = linear.assembled(_rounded(grid, linear.left(W)), W)
        return weights

    def answer(self, made: Made, block: int, weights: Weights, x: Tensor, kwargs: Kwargs) -> Tensor:
        """Return what a block with these weights answers to x, in the dtype of x."""
        prefix = f"{self.view.prefix}.{block}."
        plain = {f"{prefix}{name}": value for name, value in self.view.blocks[block].named_parameters()}
        local = {name.removeprefix(prefix): W.to(x.dtype) for name, W in (plain | weights).items()}
        with self._online(made.inserts, prefix):
            return hidden_states(functional_call(self.view.blocks[block], local, (x,), kwargs))

    def block(self, inserts: Inserts, block: int, x: Tensor, kwargs: Kwargs, grids: Grids) -> Tensor:
        """Return what a block answers to x under inserts; gradients reach the tensors of the inserts."""
        made = Made(inserts)
        return self.answer(made, block, self.weights(made, block, grids), x, kwargs)

    def _folded(self, name: str, insert: Insert) -> bool:
        return insert.kind in self.sites[name].admits

    def _rewritten(self, inserts: Inserts, prefix: str) -> Weights:
        """Return what the inserts make of a block's parameters; what is folded acts first."""
        made = Beside(self.view.model)
        for name, insert in sorted(inserts.items(), key=lambda item: not self._folded(*item)):
            site, folded = self.sites[name], self._folded(name, insert)
            for writer in (w for w in site.writers if folded and w.name.startswith(prefix)):
                made.write(writer, insert)
            for reader in (r for r in site.readers if site.kind != "query_key" and r.startswith(prefix)):
                if site.kind == "keys":
                    made.answer(reader, site.writers[0], insert)
                else:
                    made.read(reader, insert, folded)
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


class Beside(Parameters):
    """Parameters as inserts would change them: differentiable, and the model stays."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.made: Weights = {}

    def now(self, name: str) -> Tensor | None:
        """Return a parameter, changed or the model's own, in float32 (float64 for float64)."""
        if name in self.made:
            return self.made[name]
        value = present(self.model, name)
        return None if value is None else wide(value)

    def put(self, name: str, value: Tensor) -> None:
        """Keep the value."""
        self.made[name] = value


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


def _rounded(grid: Grid, W: Tensor) -> Tensor:
    """Return W on its grid; gradients pass through the rounding, and through the ranges where the grid can tell."""
    inner = bare(grid)
    if isinstance(inner, Imitated):
        return inner.imitate(W, grid.ratios if isinstance(grid, Clipped) else None)
    if not W.detach().isfinite().all():
        return W  # its loss is no number either, which the loop answers
    cut, params = grid.clamp(W) if isinstance(grid, Clipped) else W, grid.fit(W.detach(), None)
    return straight(cut, grid.decode(grid.encode(W.detach(), params), params))
