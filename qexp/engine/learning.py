"""The objective of transforms that are learned through the whole model: its loss, quantized, and gradients of maps.

The model's weights stay as they are: each block runs with the weights that the candidate maps would give it, computed
on the way and differentiable. One block at a time has a graph: a first pass keeps only what enters each block, then the
blocks are walked backwards, each computed once more (methods/spinquant.md section 7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from qexp.core.errors import UserError
from qexp.core.maps import LinearMap
from qexp.core.placed import wide
from qexp.core.rewrite import dual_weight
from qexp.core.rng import generator
from qexp.core.stages import Learned, Method
from qexp.core.words import FULL_BITS, Insert, Site
from qexp.engine.acting import act_of, search_quantizer
from qexp.engine.context import Progress
from qexp.engine.solving import plan_of
from qexp.engine.store import Finished, Store, pack_maps, read, unpack_maps
from qexp.engine.streams import embed
from qexp.models.view import ModelView

RESIDUAL = "residual"


@dataclass(frozen=True)
class Learning:
    """What learning takes from a run: calibration tokens [N, S], where results are kept, how progress is shown.

    Without tokens only what was learned before is to be had.
    """

    tokens: Tensor | None
    store: Store
    progress: Progress


class ModelObjective:
    """Mean cross-entropy of the next token on calibration sequences, with the recipe's quantizers on."""

    def __init__(self, view: ModelView, method: Method, sites: Sequence[Site], tokens: Tensor, seed: int) -> None:
        self.view, self.method, self.tokens = view, method, tokens
        self.sites = {site.name: site for site in sites}
        stream, self.kwargs = embed(view, tokens)
        self.embedded = torch.cat(stream)
        self.grids = plan_of(view, method, seed).grids

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.tokens)

    def __call__(self, maps: Mapping[str, LinearMap], chosen: Sequence[int], round_weights: bool) -> float:
        """Return the loss of the chosen sequences under ``maps`` (by site name); gradients go to their tensors."""
        device, which, entering = self.view.model.device, list(chosen), list[Tensor]()
        start, ids = self.embedded[which].to(device), self.tokens[which].to(device)
        with quantizers(self.view, self.method):
            with torch.no_grad():
                x = self._turned(maps, start)
                for block in range(len(self.view.blocks)):
                    entering.append(x)
                    x = self._block(maps, block, x, round_weights)
            loss, gradient = self._head(maps, x, ids)
            for block in reversed(range(len(self.view.blocks))):
                x = entering.pop().requires_grad_()
                with torch.enable_grad():
                    self._block(maps, block, x, round_weights).backward(gradient)
                gradient = _gradient(x)
        if RESIDUAL in maps:
            with torch.enable_grad():
                self._turned(maps, start).backward(gradient)
        return loss

    def _turned(self, maps: Mapping[str, LinearMap], x: Tensor) -> Tensor:
        return maps[RESIDUAL].apply(x) if RESIDUAL in maps else x

    def _block(self, maps: Mapping[str, LinearMap], block: int, x: Tensor, round_weights: bool) -> Tensor:
        prefix = f"{self.view.prefix}.{block}."
        weights = self._weights(maps, prefix)
        if round_weights:
            for name, grid in self.grids.items():
                key = f"{name}.weight"
                if name.startswith(prefix):
                    W = wide(weights.get(key, self.view.linear(name).weight))
                    params = grid.fit(W.detach(), None)
                    weights[key] = W + (grid.decode(grid.encode(W.detach(), params), params) - W).detach()
        local = {name.removeprefix(prefix): W.to(x.dtype) for name, W in weights.items()}
        answer = functional_call(self.view.blocks[block], local, (x,), self.kwargs[block])
        first: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return first

    def _weights(self, maps: Mapping[str, LinearMap], prefix: str) -> dict[str, Tensor]:
        """Return what the maps make of a block's weights and biases, by full name."""
        made: dict[str, Tensor] = {}

        def now(name: str) -> Tensor:
            return made[name] if name in made else wide(self.view.model.get_parameter(name))

        for site_name, map in maps.items():
            site = self.sites[site_name]
            for writer in (w.name for w in site.writers if w.name.startswith(prefix)):
                made[f"{writer}.weight"] = map.apply(now(f"{writer}.weight").T).T
                if self.view.linear(writer).bias is not None:
                    made[f"{writer}.bias"] = map.apply(now(f"{writer}.bias"))
            for reader in (r for r in site.readers if r.startswith(prefix)):
                online = self.view.linear(reader).path.maps
                made[f"{reader}.weight"] = dual_weight(now(f"{reader}.weight"), map, online)
        return made

    def _head(self, maps: Mapping[str, LinearMap], x: Tensor, ids: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient at what leaves the last block; one sequence of logits at a time."""
        family, total, gradients = self.view.described, 0.0, list[Tensor]()
        norm: Any = self.view.model.get_submodule(family.final_norm)
        head: Any = self.view.model.get_submodule(family.head)
        for row, sequence in zip(x.split(1), ids, strict=True):
            leaf = row.detach().requires_grad_()
            with torch.enable_grad():
                W = maps[RESIDUAL].dual(head.weight) if RESIDUAL in maps else head.weight
                logits = linear(norm(leaf)[0, :-1], W.to(leaf.dtype), head.bias)
                loss = cross_entropy(wide(logits), sequence[1:]) / len(ids)
                loss.backward()
            total += float(loss.detach())
            gradients.append(_gradient(leaf))
        return total, torch.cat(gradients)


def learned_once(view: ModelView, method: Method, name: str, transform: Any, seed: int, learning: Learning) -> Learned:
    """Return what a transform learns: from its ``load`` file, from the run's folder, or learned now and kept there."""
    sites: list[Site] = transform.sites(view)

    def make() -> Finished:
        if learning.tokens is None:
            raise UserError(f"{learning.store.folder} lacks learned-{name}", "a complete run")
        objective = ModelObjective(view, method, sites, learning.tokens, seed)
        rng = generator(seed, name)
        learned = transform.learn(sites, objective, rng, partial(learning.progress, f"learn {name}"))
        kinds = {site: insert.kind for site, insert in learned.inserts.items()}
        maps = {site: insert.map for site, insert in learned.inserts.items()}
        return pack_maps(maps, {"kinds": kinds, "losses": learned.losses})

    finished = read(Path(transform.load)) if transform.load else learning.store.once(f"learned-{name}", make)
    kinds, maps = finished.facts.get("kinds", {}), unpack_maps(finished)
    if kinds.keys() != {site.name for site in sites} or any(maps[s.name].size != s.size for s in sites):
        raise UserError(
            f"{transform.load or 'the stored file'} holds maps of other sites than this model has",
            "a file learned on this model",
            f"method.transform.{name}.load=''",
        )
    return Learned({site: Insert(kinds[site], map) for site, map in maps.items()}, finished.facts["losses"])


@contextmanager
def quantizers(view: ModelView, method: Method) -> Iterator[None]:
    """Switch the recipe's activation and key/value quantizers on, and off again; ranges are those of each batch."""
    groups = [group for block in range(len(view.blocks)) for group in view.groups(block)]
    paths = [(view.linear(group.layers[0].name).path, search_quantizer(act_of(method, group))) for group in groups]
    found = [view.door(block) for block in range(len(view.blocks))]
    doors = [door for door in found if door is not None]
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


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad
