"""Run a recipe's transforms: model scope once before the walk, block scope inside each block."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import torch

from qexp.core import rewrite
from qexp.core.learned import Clips, Learner, Part, RangeTuner, Trained
from qexp.core.method import Method
from qexp.core.rng import generator
from qexp.core.sparse import Sparse
from qexp.core.stages import Transform
from qexp.core.words import Group, Insert, Outliers, Site, Split
from qexp.engine.acting import is_calibrated
from qexp.engine.capture import Look, observe
from qexp.engine.reconstruct import Lesson, Scene, Story, reconstruct
from qexp.engine.solving import Plan
from qexp.engine.streams import Kwargs, Stream
from qexp.engine.surroundings import SiteSurroundings, calls, damage_oracle
from qexp.engine.whole_model import Learning, learned_once
from qexp.models.view import ModelView

log = logging.getLogger(__name__)

Change = Insert | Split | Outliers | None


@torch.no_grad()
def transform_model(
    view: ModelView, method: Method, seed: int, learning: Learning | None = None
) -> dict[str, list[float]]:
    """Apply the transforms of model scope; log what was folded and what runs online.

    Returns the losses of those that were learned, by name.
    """
    chosen, losses = method.stage("model"), dict[str, list[float]]()
    if chosen:
        view.untie()
    for name, transform in chosen:
        sites = transform.sites(view)
        if isinstance(transform, Learner):
            assert learning is not None, "a learned transform without calibration"
            found = learned_once(view, method, name, transform, seed, learning)
            losses[name], changes = found.losses, [found.inserts[site.name] for site in sites]
            places = Counter(_where(site, _apply(view, site, c)) for site, c in zip(sites, changes, strict=True))
        else:
            places = Counter(place for site in sites if (place := _edited(view, name, transform, site, seed)))
        log.info("%s: %s", name, ", ".join(f"{k} x{v}" for k, v in places.items()) or "nothing to do")
    return losses


@torch.no_grad()
def transform_block(plan: Plan, scene: Scene, source: Stream) -> dict[str, Story]:
    """Apply the transforms of block scope to one block, and learn the ranges of its weights where a tuner wants it.

    Statistics come from ``source``. Ranges are learned together with the last transform if that one is learned, else
    alone behind all transforms. Returns what was learned by name.
    """
    view, chosen, stories = plan.view, plan.method.stage("block"), dict[str, Story]()
    last = chosen[-1][0] if chosen and isinstance(chosen[-1][1], Trained) else None
    for name, transform in chosen:
        sites = [site for site in transform.sites(view) if site.block == scene.block]
        around = _surroundings(plan, scene.block, transform, sites, source, scene.kwargs)
        changes: dict[str, Change]
        if isinstance(transform, Trained):
            parts = [transform.part(sites, around, generator(plan.seed, name, scene.block))]
            parts += _range_parts(plan, scene.block) if name == last else []
            lesson = Lesson(name, transform.training, parts, sites, plan.grids)
            stories[name] = reconstruct(plan, scene, lesson)
            changes = {site.name: stories[name].made.inserts.get(site.name) for site in sites}
            _keep_clips(plan, sites, stories[name].made.clips)
        else:
            changes = {
                site.name: transform.edit(site, around[site.name], generator(plan.seed, name, site.name))
                for site in sites
            }
        for site in sites:
            _apply(view, site, changes[site.name])
    for name, tuner in plan.method.tuner.items():
        if last is None and isinstance(tuner, RangeTuner) and (parts := _range_parts(plan, scene.block)):
            stories[name] = reconstruct(plan, scene, Lesson(name, tuner.training, parts, grids=plan.grids))
            _keep_clips(plan, [], stories[name].made.clips)
    return stories


def _range_parts(plan: Plan, block: int) -> list[Part]:
    """Return what the recipe's tuners learn of the ranges of a block's weights."""
    slices = {}
    for layer in (layer for layer in plan.view.layers_of(block) if layer.name in plan.grids):
        columns, group = layer.inputs - plan.view.linear(layer.name).path.kept, plan.grids[layer.name].group
        slices[layer.name] = (layer.outputs, columns // group if group > 0 else 1)
    return [tuner.ranges(slices) for tuner in plan.method.tuner.values() if isinstance(tuner, RangeTuner) and slices]


def _keep_clips(plan: Plan, sites: list[Site], clips: Clips) -> None:
    """Leave learned ratios where the quantizers of activations and the solver find them."""
    readers = {site.name: site.readers[0] for site in sites}
    for place, clip in ({} if is_calibrated(plan.method.act) else clips.acts).items():
        plan.view.linear(readers[place]).path.ranges = {"clip": clip}
    for name, ratios in clips.weights.items():
        plan.view.linear(name).clips = ratios


def _surroundings(
    plan: Plan, block: int, transform: Transform, sites: list[Site], source: Stream, kwargs: Kwargs
) -> dict[str, SiteSurroundings]:
    """Return what a transform may look at around each site of a block."""
    view = plan.view
    behind = {site.name: group for site in sites if (group := _group_behind(view, site)) is not None}
    groups = [group for group in view.groups(block) if group in behind.values()]
    kinds = {s.name: transform.kind_at(s) if isinstance(transform, Trained) else transform.inserts for s in sites}
    folded = {site.name for site in sites if kinds[site.name] in site.admits}
    raw = {behind[site].site for site in folded & behind.keys()}  # folded: in front of online maps
    look = Look(raw, loud="rows" in transform.needs)
    known = observe(view, block, groups, source, kwargs, look) if groups and transform.needs else {}
    around = {}
    for site in sites:
        stats, damage = None, None
        if site.name in behind and transform.needs:
            group = behind[site.name]
            stats, record = known[group.site], partial(calls, view, group, source, kwargs)
            damage = damage_oracle(plan, group, site.name in folded, record, stats)
        around[site.name] = SiteSurroundings(view, site, stats, damage, site.name in folded)
    return around


def _edited(view: ModelView, name: str, transform: Transform, site: Site, seed: int) -> str:
    """Apply what a transform of model scope does to one site; return where it went, or nothing."""
    change = transform.edit(site, SiteSurroundings(view, site, None, None), generator(seed, name, site.name))
    return "" if change is None else _where(site, _apply(view, site, change))


def _where(site: Site, folded: bool) -> str:
    return f"{site.kind} {'folded' if folded else 'online'}"


def _apply(view: ModelView, site: Site, change: Change) -> bool:
    """Carry out what a transform wants of a site; return whether it was folded."""
    if isinstance(change, Split):
        rewrite.split(view.model, site, change)
    if isinstance(change, Outliers):
        for name, mask in zip(site.readers, change.masks, strict=True):
            linear = view.linear(name)
            linear.sparse = Sparse.of(mask, linear.weight)
    return isinstance(change, Insert) and rewrite.insert(view.model, site, change)


def _group_behind(view: ModelView, site: Site) -> Group | None:
    """Return the group of layers that read ``site``; None where no linear does (queries and keys, outputs)."""
    assert site.block is not None
    return next((g for g in view.groups(site.block) if {layer.name for layer in g.layers} & set(site.readers)), None)
