"""The objectives of transforms that are learned: what a block or the whole model loses, quantized, and gradients of it.

The model's weights stay as they are: each block runs with the weights that candidate inserts would give it, computed on
the way and differentiable. Through the model, one block at a time has a graph: a first pass keeps only what enters each
block, on disk, then the blocks are walked backwards, each computed once more (methods/spinquant.md section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from qexp.core.errors import UserError
from qexp.core.learned import NO_CLIPS, Clips, Learned, within
from qexp.core.maps import LinearMap
from qexp.core.placed import wide
from qexp.core.rng import generator
from qexp.core.spill import Spill
from qexp.core.stages import Method
from qexp.core.words import Insert, Site
from qexp.engine.candidate import Candidate, Inserts, quantizers
from qexp.engine.context import Progress
from qexp.engine.solving import Grids, Plan, plan_of
from qexp.engine.store import Finished, Store, pack_maps, read, unpack_maps
from qexp.engine.streams import Kwargs, Stream, advance, embed
from qexp.engine.surroundings import SiteSurroundings
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


class BlockObjective:
    """Mean squared error of one block against its float answer on the same inputs, with the recipe's quantizers on.

    As a share of the mean square of the answer, so that blocks and models compare.
    """

    def __init__(self, plan: Plan, block: int, sites: Sequence[Site], source: Stream, kwargs: Kwargs) -> None:
        self.plan, self.index, self.kwargs = plan, block, kwargs
        self.candidate = Candidate(plan.view, sites)
        self.inputs, self.targets = torch.cat(source), torch.cat(advance(plan.view, block, source, kwargs))
        self.scale = float(self.targets.float().pow(2).mean())

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.inputs)

    def __call__(self, inserts: Inserts, chosen: Sequence[int], round_weights: bool, clips: Clips = NO_CLIPS) -> float:
        """Return the error on the chosen sequences under inserts and clips; gradients go to their tensors."""
        view, which = self.plan.view, list(chosen)
        x, target = (half_to_float(t[which].to(view.model.device)) for t in (self.inputs, self.targets))
        grids = rounding(self.plan, clips, round_weights)
        with quantizers(view, self.plan.method, [self.index], clips.acts), torch.enable_grad():
            answer = self.candidate.block(inserts, self.index, x, self.kwargs, grids)
            loss = (answer - target).float().pow(2).mean() / self.scale
            loss.backward()
        return float(loss.detach())


class ModelObjective:
    """Mean cross-entropy of the next token on calibration sequences, with the recipe's quantizers on."""

    def __init__(self, plan: Plan, sites: Sequence[Site], tokens: Tensor, folder: Path | None = None) -> None:
        self.plan, self.view, self.tokens, self.folder = plan, plan.view, tokens, folder
        self.candidate = Candidate(plan.view, sites)
        stream, self.kwargs = embed(plan.view, tokens)
        self.embedded = torch.cat(stream)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.tokens)

    def __call__(self, inserts: Inserts, chosen: Sequence[int], round_weights: bool, clips: Clips = NO_CLIPS) -> float:
        """Return the loss of the chosen sequences under inserts and clips; gradients go to their tensors."""
        device, which = self.view.model.device, list(chosen)
        start, ids = half_to_float(self.embedded[which].to(device)), self.tokens[which].to(device)
        blocks, turn = range(len(self.view.blocks)), inserts[RESIDUAL].map if RESIDUAL in inserts else None
        grids = rounding(self.plan, clips, round_weights)

        def answer(block: int, x: Tensor) -> Tensor:
            return self.candidate.block(inserts, block, x, self.kwargs[block], grids)

        with quantizers(self.view, self.plan.method, blocks, clips.acts), closing(Spill(self.folder)) as entering:
            with torch.no_grad():
                x = start if turn is None else turn.apply(start)
                for block in blocks:
                    entering.push(x)
                    x = answer(block, x)
            loss, gradient = self._head(turn, x, ids)
            for block in reversed(blocks):
                x = entering.pop().requires_grad_()
                with torch.enable_grad():
                    answer(block, x).backward(gradient)
                gradient = _gradient(x)
        if turn is not None:
            with torch.enable_grad():
                turn.apply(start).backward(gradient)
        return loss

    def _capped(self, logits: Tensor) -> Tensor:
        cap = getattr(self.view.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _head(self, turn: LinearMap | None, x: Tensor, ids: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient at what leaves the last block; one sequence of logits at a time."""
        family, total, gradients = self.view.described, 0.0, list[Tensor]()
        norm: Any = self.view.model.get_submodule(family.final_norm)
        head: Any = self.view.model.get_submodule(family.head)
        for row, sequence in zip(x.split(1), ids, strict=True):
            leaf = row.detach().requires_grad_()
            with torch.enable_grad():
                W = head.weight if turn is None else turn.dual(head.weight)
                bias = None if head.bias is None else head.bias.to(leaf.dtype)
                normed = functional_call(norm, {n: p.to(leaf.dtype) for n, p in norm.named_parameters()}, (leaf,))
                logits = linear(normed[0, :-1].to(leaf.dtype), W.to(leaf.dtype), bias)
                loss = cross_entropy(self._capped(wide(logits)), sequence[1:]) / len(ids)
                loss.backward()
            total += float(loss.detach())
            gradients.append(_gradient(leaf))
        return total, torch.cat(gradients)


def rounding(plan: Plan, clips: Clips, wanted: bool) -> Grids:
    """Return the grids of the layers to round, with the ranges that are learned; none if rounding is not wanted."""
    ratios = clips.weights
    return {name: within(g, ratios[name]) if name in ratios else g for name, g in plan.grids.items() if wanted}


def half_to_float(x: Tensor) -> Tensor:
    """Return float16 as float32: gradients of means over many elements are too small for it."""
    return x.float() if x.dtype == torch.float16 else x


def learned_once(view: ModelView, method: Method, name: str, transform: Any, seed: int, learning: Learning) -> Learned:
    """Return what a transform learns: from its ``load`` file, from the run's folder, or learned now and kept there."""
    sites: list[Site] = transform.sites(view)

    def make() -> Finished:
        if learning.tokens is None:
            raise UserError(f"{learning.store.folder} lacks learned-{name}", "a complete run")
        objective = ModelObjective(plan_of(view, method, seed), sites, learning.tokens, learning.store.folder)
        around = {site.name: SiteSurroundings(view, site, None, None) for site in sites}
        track = partial(learning.progress, f"learn {name}")
        learned = transform.learn(sites, around, objective, generator(seed, name), track)
        assert not any(learned.clips), "clips are kept with a block; a transform of model scope has none"
        kinds = {site: insert.kind for site, insert in learned.inserts.items()}
        maps = {site: insert.map for site, insert in learned.inserts.items()}
        return pack_maps(maps, {"kinds": kinds, "losses": learned.losses})

    # A file that is taken is kept in the run's folder, too: the run is whole without it.
    finished = learning.store.once(f"learned-{name}", lambda: loaded(view, name, transform) or make())
    maps, kinds = unpack_maps(finished), finished.facts["kinds"]
    return Learned({site: Insert(kinds[site], map) for site, map in maps.items()}, finished.facts["losses"])


def loaded(view: ModelView, name: str, transform: Any) -> Finished | None:
    """Return the file that ``load`` names, None where nothing is named.

    Raises: UserError if it is missing, corrupt, or was learned on a model with other sites.
    """
    load = getattr(transform, "load", "")
    if not load:
        return None
    finished, sites = read(Path(load)), transform.sites(view)
    kinds, maps = finished.facts.get("kinds", {}), unpack_maps(finished)
    if kinds.keys() != {site.name for site in sites} or any(maps[s.name].size != s.size for s in sites):
        got = f"{load} holds maps of other sites than this model has"
        raise UserError(got, "a file learned on this model", f"method.transform.{name}.load=''")
    return finished


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad
