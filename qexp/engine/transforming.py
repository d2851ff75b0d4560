"""Run a recipe's transforms: model scope once before the walk, block scope inside each block."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import torch

from qexp.core import rewrite
from qexp.core.rng import generator
from qexp.core.stages import Learner, Method, Transform
from qexp.core.words import Group, Insert, Site, Split
from qexp.engine.capture import observe
from qexp.engine.learning import Learning, learned_once
from qexp.engine.solving import Plan
from qexp.engine.streams import Kwargs, Stream
from qexp.engine.surroundings import SiteSurroundings, calls, damage_oracle
from qexp.models.view import ModelView

log = logging.getLogger(__name__)


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
def transform_block(plan: Plan, block: int, source: Stream, kwargs: Kwargs) -> None:
    """Apply the transforms of block scope to one block, from the statistics of ``source``."""
    view = plan.view
    for name, transform in plan.method.stage("block"):
        sites = [site for site in transform.sites(view) if site.block == block]
        behind = {site.name: _group_behind(view, site) for site in sites if site.readers}
        groups = [group for group in view.groups(block) if group in behind.values()]
        folded = {site.name for site in sites if transform.inserts in site.admits}
        raw = {behind[site].site for site in folded & behind.keys()}  # folded: in front of online maps
        known = observe(view, block, groups, source, kwargs, raw) if groups and transform.needs else {}
        for site in sites:
            stats, damage = None, None
            if site.name in behind and transform.needs:
                group = behind[site.name]
                stats, record = known[group.site], partial(calls, view, group, source, kwargs)
                damage = damage_oracle(plan, group, site.name in folded, record, stats)
            around = SiteSurroundings(view, site, stats, damage)
            _apply(view, site, transform.edit(site, around, generator(plan.seed, name, site.name)))


def _edited(view: ModelView, name: str, transform: Transform, site: Site, seed: int) -> str:
    """Apply what a transform of model scope does to one site; return where it went, or nothing."""
    change = transform.edit(site, SiteSurroundings(view, site, None, None), generator(seed, name, site.name))
    return "" if change is None else _where(site, _apply(view, site, change))


def _where(site: Site, folded: bool) -> str:
    return f"{site.kind} {'folded' if folded else 'online'}"


def _apply(view: ModelView, site: Site, change: Insert | Split | None) -> bool:
    """Carry out what a transform wants of a site; return whether it was folded."""
    if isinstance(change, Split):
        rewrite.split(view.model, site, change)
    return isinstance(change, Insert) and rewrite.insert(view.model, site, change)


def _group_behind(view: ModelView, site: Site) -> Group:
    """Return the group of layers that read ``site``."""
    assert site.block is not None
    return next(g for g in view.groups(site.block) if site.readers[0] in [layer.name for layer in g.layers])
