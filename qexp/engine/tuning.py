"""Training after rounding. Block scope: norms and what decodes codes, right after a block's layers are quantized.

The next block sees the tuned one.
Model scope: what decodes the codes, end to end down the next token's loss, one block's graph at a time; the state of a
killed run is on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qexp.core.absorb import InPlace
from qexp.core.decoding import BlockDecoder
from qexp.core.learned import BlockTuner, Made, ModelTuner, NormFactors, Rounding
from qexp.core.linear import QuantLinear
from qexp.core.maps import Diagonal
from qexp.core.method import Method
from qexp.core.minimise import Descent, Memory, Outcome, minimise
from qexp.core.rng import generator
from qexp.core.stages import Grid
from qexp.core.training import Training
from qexp.core.words import Insert, Quantized, Stats
from qexp.engine.candidate import Candidate, quantizers
from qexp.engine.context import Run
from qexp.engine.learned_record import thinned
from qexp.engine.reconstruct import Lesson, Scene, Story, reconstruct
from qexp.engine.rounding import norms_of, norms_part, put_norms, weights_part
from qexp.engine.solving import Plan, plan_of
from qexp.engine.store import Finished, read, write
from qexp.engine.whole_model import NextToken
from qexp.models.view import ModelView

log = logging.getLogger(__name__)

Decodings = Mapping[str, Rounding]
Before = Mapping[str, Tensor]


def before_rounding(plan: Plan, block: int) -> Before:
    """Return the weights of a block's layers, if a tuner compares them with what becomes of them."""
    if not any(isinstance(tuner, NormFactors) for tuner in plan.method.tuner.values()):
        return {}
    return {layer.name: plan.view.linear(layer.name).weight.clone() for layer in plan.view.layers_of(block)}


@torch.no_grad()
def tune_block(plan: Plan, scene: Scene, before: Before, seen: Mapping[str, Stats]) -> dict[str, Story]:
    """Let the recipe's tuners change a quantized block, all but its codes; return how learning went by name.

    ``before`` has the weights before rounding, ``seen`` the statistics by site.
    """
    stories: dict[str, Story] = {}
    for name, tuner in plan.method.tuner.items():
        if isinstance(tuner, NormFactors):
            _rescale(plan, scene.block, tuner, before, seen)
        if isinstance(tuner, BlockDecoder):
            stories |= _learn_values(plan, scene, name, tuner)
        if not isinstance(tuner, BlockTuner):
            continue
        part = tuner.norms(norms_of(plan, scene.block))
        stories[name] = reconstruct(plan, scene, Lesson(name, tuner.training, [part]))
        put_norms(plan, stories[name].made.weights)
        plan.view.replays.clear()  # what finished layers have answered was behind the old norms
    return stories


def _learn_values(plan: Plan, scene: Scene, name: str, tuner: BlockDecoder) -> dict[str, Story]:
    """Let a tuner learn what decodes the codes of a block, and its norms."""
    layers = [layer for layer in plan.view.layers_of(scene.block) if layer.name in plan.grids]
    if not layers:
        return {}
    roundings = {layer: tuner.values(*_coded(plan.view.linear(layer.name))) for layer in layers}
    parts = [weights_part(plan, roundings)]
    if tuner.norm_rate:
        parts.append(norms_part(plan, scene.block, tuner.norm_rate))
    story = reconstruct(plan, scene, Lesson(name, tuner.training, parts))
    for layer, rounding in roundings.items():
        plan.view.linear(layer.name).install(plan.grids[layer.name], rounding.quantized())
    put_norms(plan, story.made.weights)
    plan.view.replays.clear()
    return {name: story}


def _coded(linear: QuantLinear) -> tuple[Quantized, Grid]:
    """Return what a quantized layer is, and its grid."""
    assert linear.grid is not None and linear.codes is not None
    return Quantized(linear.codes, linear.params, linear.kept), linear.grid


def _rescale(plan: Plan, block: int, tuner: NormFactors, before: Before, seen: Mapping[str, Stats]) -> None:
    """Multiply the norms of a block by a tuner's factors, where nothing stands between a norm and what reads it."""
    view = plan.view
    for site in (site for site in view.sites("attn_in", "mlp_in") if site.block == block):
        readers = [view.linear(name) for name in site.readers]
        if readers[0].path.maps or site.name not in seen:
            log.info("block %d: %s stays, online maps are behind its norm", block, site.name)
            continue
        pairs = [(before[name], reader.weight) for name, reader in zip(site.readers, readers, strict=True)]
        factors = Insert("diagonal", Diagonal(tuner.factors(seen[site.name].H_II, pairs)))
        for writer in site.writers:
            InPlace(view.model).write(writer, factors)
    view.replays.clear()


@torch.no_grad()
def tune_model(view: ModelView, tokens: Tensor, method: Method, run: Run) -> dict[str, list[float]]:
    """Let the recipe's tuners of model scope train the quantized model; return their losses by name."""
    losses, plan = {}, plan_of(view, method, run.seed, run.progress)
    for name, tuner in method.tuner.items():
        if not isinstance(tuner, ModelTuner) or not plan.grids:
            continue

        def make(name: str = name, tuner: ModelTuner = tuner) -> Finished:
            return _tuned(plan, tokens, name, tuner, run)

        finished = run.store.once(tuned_key(name), make)
        for left in (run.folder / "blocks").glob(f"{name}.state.*"):
            left.unlink(missing_ok=True)  # it has served
        install_tuned(view, finished)
        losses[name] = finished.facts["losses"]
    return losses


def tuned_key(name: str) -> str:
    """Return the key in the store of what a tuner of model scope has made."""
    return f"tuned-{name}"


@torch.no_grad()
def install_tuned(view: ModelView, finished: Finished) -> None:
    """Put the parameters that decode the codes into every layer."""
    for layer, params in finished.facts["params"].items():
        linear = view.linear(layer)
        own, grid = _coded(linear)
        decoding = {p: finished.tensors[f"{layer}.{p}"].to(own.codes.device) for p in params}
        linear.install(grid, Quantized(own.codes, decoding, own.kept))


def _tuned(plan: Plan, tokens: Tensor, name: str, tuner: ModelTuner, run: Run) -> Finished:
    """Return the parameters of every quantized layer after training."""
    decodings = {layer: tuner.decoding(*_coded(plan.view.linear(layer))) for layer in plan.grids}
    memory = _Disk(run, name)
    outcome = _descend(plan, NextToken(plan.view, tokens, run.folder), tuner.training, decodings, name, memory)
    if outcome.degraded:
        log.warning("%s diverged at every rate tried; its best state (step %d) is kept", name, outcome.best_step)
    params = {layer: decoding.quantized().params for layer, decoding in decodings.items()}
    tensors = {f"{layer}.{p}": value.cpu().contiguous() for layer, own in params.items() for p, value in own.items()}
    told = {"losses": thinned(outcome.losses), "outcome": {**asdict(outcome), "losses": []}}
    facts = {"params": {layer: sorted(own) for layer, own in params.items()}, **told}
    return Finished(tensors, facts)


def _descend(
    plan: Plan, loss: NextToken, training: Training, decodings: Decodings, name: str, memory: Memory
) -> Outcome:
    descent = _EndToEnd(plan, loss, training, decodings)
    course = training.course(descent.train, generator(plan.seed, name))
    knobs = [knob for decoding in decodings.values() for knob in decoding.knobs]
    with quantizers(plan.view, plan.method, range(len(plan.view.blocks)) if training.quantize_inputs else ()):
        return minimise(knobs, course, descent, partial(plan.progress, f"learn {name}"), memory)


class _EndToEnd(Descent):
    """The next token's loss in what decodes the codes of all layers."""

    def __init__(self, plan: Plan, loss: NextToken, training: Training, decodings: Decodings) -> None:
        self.plan, self.loss, self.training, self.decodings = plan, loss, training, decodings
        self.candidate = Candidate(plan.view, [])
        self.train, self.held_out = training.split(len(loss.tokens))

    def step(self, chosen: Sequence[int]) -> float:
        """Return the loss; micro-batches have gradients one after the other."""
        micro, total = self.training.micro or len(chosen), 0.0
        for some in (chosen[i : i + micro] for i in range(0, len(chosen), micro)):
            share = len(some) / len(chosen)
            total += share * self.loss.descend(self._answer, some, share=share)
        return total

    def measure(self) -> float:
        """Return the loss of the sequences that are held out."""
        return self.loss.measure(self._answer, self.held_out)

    def _answer(self, block: int, x: Tensor) -> Tensor:
        weights = {}
        for layer in (a.name for a in self.plan.view.layers_of(block) if a.name in self.decodings):
            weights[f"{layer}.weight"] = self.plan.view.linear(layer).assembled(self.decodings[layer].rounded())
        made = Made(weights=weights)
        return self.candidate.answer(made, block, dict(made.weights), x, self.loss.kwargs[block])


class _Disk(Memory):
    """The state of a descent in the run's folder, replaced as a whole."""

    def __init__(self, run: Run, name: str) -> None:
        self.path = run.folder / "blocks" / f"{name}.state.safetensors"

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was saved last, None if nothing was."""
        if not self.path.exists():
            return None
        found = read(self.path)
        return found.tensors, found.facts

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace what was saved."""
        write(self.path, Finished({name: t.cpu().contiguous() for name, t in tensors.items()}, facts))
