"""Solvers that learn: the roundings of all layers of a block together, against the block's float answer.

Each layer has its own rounding (core/learned.py); the engine runs the block with all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qexp.core.learned import LearnedSolver, Made, Part, Rounding
from qexp.core.minimise import Knobs
from qexp.core.placed import wide
from qexp.core.rng import generator
from qexp.core.words import Layer, LayerReport, Quantized, Stats
from qexp.engine.reconstruct import Lesson, Scene, Story, reconstruct
from qexp.engine.solving import Plan, first_columns, fitted_grid, installed


@torch.no_grad()
def learn_roundings(
    plan: Plan, scene: Scene, solver: LearnedSolver, known: Mapping[str, Stats]
) -> tuple[list[LayerReport], Story | None]:
    """Quantize all layers of a block in place; return a report on each, and how learning went.

    ``known`` are statistics by site, where there are any.
    """
    groups = plan.view.groups(scene.block)
    layers = {layer: group.site for group in groups for layer in group.layers if layer.name in plan.grids}
    if not layers:
        return [], None
    roundings = {layer: _begin(plan, solver, layer, known.get(site)) for layer, site in layers.items()}
    before = {layer: rounding.quantized().codes for layer, rounding in roundings.items()}
    parts = [weights_part(plan, roundings)]
    rate = solver.norms_rate(min(plan.grids[layer.name].bits for layer in layers))
    if rate:
        parts.append(norms_part(plan, scene.block, rate))
    story = reconstruct(plan, scene, Lesson("solver", solver.training, parts))
    reports, moved = [], 0.0
    for layer, site in layers.items():
        linear, own = plan.view.linear(layer.name), roundings[layer].quantized()
        moved += float((own.codes != before[layer]).sum())
        if linear.path.kept:
            own = Quantized(own.codes, own.params, linear.weight[:, -linear.path.kept :].float())
        reports.append(installed(layer, linear, own, plan.grids[layer.name], known.get(site)))
    story.more["codes_changed"] = moved / sum(layer.weights for layer in layers)
    put_norms(plan, story.made.weights)
    return reports, story


def _begin(plan: Plan, solver: LearnedSolver, layer: Layer, stats: Stats | None) -> Rounding:
    """Return the rounding of a layer at its start."""
    linear = plan.view.linear(layer.name)
    W_OI, rng = linear.left().float().clone(), generator(plan.seed, layer.name)
    seen = None if stats is None else first_columns(stats, W_OI.shape[1])
    return solver.rounding(W_OI, seen, fitted_grid(plan, [layer.name]), rng)


def weights_part(plan: Plan, roundings: Mapping[Layer, Rounding]) -> Part:
    """Return the roundings of all layers as one part: equal groups of tensors have one rate."""
    groups: dict[tuple[str, float], list[Tensor]] = {}
    for rounding in roundings.values():
        for knob in rounding.knobs:
            groups.setdefault((knob.name, knob.rate), []).extend(knob.tensors)

    def make() -> Made:
        weights = {}
        for layer, rounding in roundings.items():
            weights[f"{layer.name}.weight"] = plan.view.linear(layer.name).assembled(rounding.rounded())
        return Made(weights=weights)

    def project() -> None:
        for rounding in roundings.values():
            rounding.project()

    return Part([Knobs(name, tensors, rate) for (name, rate), tensors in groups.items()], make, project)


def norms_of(plan: Plan, block: int) -> dict[str, Tensor]:
    """Return the weights and biases of the norms in front of a block's linears, float32 copies by full name."""
    names = [w.name for site in plan.view.sites("attn_in", "mlp_in") if site.block == block for w in site.writers]
    found = {f"{n}.{leaf}": p for n in names for leaf, p in plan.view.model.get_submodule(n).named_parameters()}
    return {name: wide(p.detach()).clone() for name, p in found.items()}


def norms_part(plan: Plan, block: int, rate: float) -> Part:
    """Return the norms of a block, learned as they are."""
    norms = {name: p.requires_grad_() for name, p in norms_of(plan, block).items()}
    return Part([Knobs("norms", list(norms.values()), rate)], lambda: Made(weights=norms))


@torch.no_grad()
def put_norms(plan: Plan, weights: Mapping[str, Tensor]) -> None:
    """Put learned norms into the model; weights of linears are there already, as codes."""
    linears = {f"{layer.name}.weight" for layer in plan.view.layers}
    for name, value in weights.items():
        if name not in linears:
            plan.view.model.get_parameter(name).copy_(value)
