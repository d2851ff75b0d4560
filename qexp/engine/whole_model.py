"""The objective of transforms that are learned end to end: what the quantized model loses, and gradients of it.

The model's weights stay as they are: each block runs with the weights that candidate inserts would give it, computed on
the way and differentiable. One block at a time has a graph: a first pass keeps only what enters each
block, on disk, then the blocks are walked backwards, each computed once more (methods/spinquant.md section 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from qexp.core.learned import Learned
from qexp.core.maps import LinearMap
from qexp.core.method import Method
from qexp.core.placed import wide
from qexp.core.rng import generator
from qexp.core.spill import Spill
from qexp.core.words import Insert, Site
from qexp.engine.candidate import Candidate, Inserts, quantizers
from qexp.engine.context import Progress
from qexp.engine.reconstruct import half_to_float
from qexp.engine.solving import Plan, plan_of
from qexp.engine.store import Finished, Store, pack_maps, read, unpack_maps
from qexp.engine.streams import embed
from qexp.engine.surroundings import SiteSurroundings
from qexp.models.view import ModelView

RESIDUAL = "residual"
Answer = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Learning:
    """What learning takes from a run: calibration tokens [N, S], where results are kept, how progress is shown.

    Without tokens only what was learned before is to be had.
    """

    tokens: Tensor | None
    store: Store
    progress: Progress


class NextToken:
    """Mean cross-entropy of the next token on calibration sequences, and its gradient, block by block."""

    def __init__(self, view: ModelView, tokens: Tensor, folder: Path | None = None) -> None:
        self.view, self.tokens, self.folder = view, tokens, folder
        stream, self.kwargs = embed(view, tokens)
        self.embedded = torch.cat(stream)

    def descend(
        self, answer: Answer, chosen: Sequence[int], turn: LinearMap | None = None, share: float = 1.0
    ) -> float:
        """Return the loss of the chosen sequences where blocks give ``answer`` (index, x); gradients are added.

        ``turn`` is a map of the residual stream; ``share`` multiplies the gradients.
        """
        device, which = self.view.model.device, list(chosen)
        start, ids = half_to_float(self.embedded[which].to(device)), self.tokens[which].to(device)
        with closing(Spill(self.folder)) as entering:
            with torch.no_grad():
                x = start if turn is None else turn.apply(start)
                for block in range(len(self.view.blocks)):
                    entering.push(x)
                    x = answer(block, x)
            loss, gradient = self._head(turn, x, ids)
            gradient *= share
            for block in reversed(range(len(self.view.blocks))):
                x = entering.pop().requires_grad_()
                with torch.enable_grad():
                    answer(block, x).backward(gradient)
                gradient = _gradient(x)
        if turn is not None:
            with torch.enable_grad():
                turn.apply(start).backward(gradient)
        return loss

    @torch.no_grad()
    def measure(self, answer: Answer, chosen: Sequence[int]) -> float:
        """Return the loss of the chosen sequences, one at a time."""
        total = 0.0
        for i in chosen:
            x = half_to_float(self.embedded[[i]].to(self.view.model.device))
            for block in range(len(self.view.blocks)):
                x = answer(block, x)
            total += float(self._loss(None, x, self.tokens[i].to(x.device))) / len(chosen)
        return total

    def _head(self, turn: LinearMap | None, x: Tensor, ids: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient at what leaves the last block; one sequence of logits at a time."""
        total, gradients = 0.0, list[Tensor]()
        for row, sequence in zip(x.split(1), ids, strict=True):
            leaf = row.detach().requires_grad_()
            with torch.enable_grad():
                loss = self._loss(turn, leaf, sequence) / len(ids)
                loss.backward()
            total += float(loss.detach())
            gradients.append(_gradient(leaf))
        return total, torch.cat(gradients)

    def _loss(self, turn: LinearMap | None, x: Tensor, ids: Tensor) -> Tensor:
        """Return the mean cross-entropy of one sequence x [1, S, C]."""
        family = self.view.described
        norm: Any = self.view.model.get_submodule(family.final_norm)
        head: Any = self.view.model.get_submodule(family.head)
        W = head.weight if turn is None else turn.dual(head.weight)
        bias = None if head.bias is None else head.bias.to(x.dtype)
        normed = functional_call(norm, {n: p.to(x.dtype) for n, p in norm.named_parameters()}, (x,))
        logits = linear(normed[0, :-1].to(x.dtype), W.to(x.dtype), bias)
        return cross_entropy(self.view.capped(wide(logits)), ids[1:])


class ModelObjective:
    """The next token's loss under inserts, with the recipe's quantizers on."""

    def __init__(self, plan: Plan, sites: Sequence[Site], tokens: Tensor, folder: Path | None = None) -> None:
        self.plan, self.candidate = plan, Candidate(plan.view, sites)
        self.next_token = NextToken(plan.view, tokens, folder)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.next_token.tokens)

    def __call__(self, inserts: Inserts, chosen: Sequence[int], round_weights: bool) -> float:
        """Return the loss of the chosen sequences under inserts; gradients go to the tensors of their maps."""
        grids, kwargs = self.plan.grids if round_weights else {}, self.next_token.kwargs

        def answer(block: int, x: Tensor) -> Tensor:
            return self.candidate.block(inserts, block, x, kwargs[block], grids)

        with quantizers(self.plan.view, self.plan.method, range(len(self.plan.view.blocks))):
            return self.next_token.descend(answer, chosen, inserts[RESIDUAL].map if RESIDUAL in inserts else None)


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
