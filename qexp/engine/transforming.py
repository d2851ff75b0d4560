"""Run a recipe's transforms: model scope once before the walk, block scope inside each block."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import torch

from qexp.core import rewrite
from qexp.core.rng import generator
from qexp.core.stages import Method
from qexp.core.words import Group, Insert, Site, Split
from qexp.engine.capture import observe
from qexp.engine.solving import Plan
from qexp.engine.streams import Kwargs, Stream
from qexp.engine.surroundings import SiteSurroundings, calls, damage_oracle
from qexp.models.view import ModelView

log = logging.getLogger(__name__)


@torch.no_grad()
def transform_model(view: ModelView, method: Method, seed: int) -> None:
    """Apply the transforms of model scope, which need no data; logs what was folded and what runs online."""
    chosen = method.stage("model")
    if chosen:
        view.untie()
    for name, transform in chosen:
        places: Counter[str] = Counter()
        for site in transform.sites(view):
            around = SiteSurroundings(view, site, None, None)
            change = transform.edit(site, around, generator(seed, name, site.name))
            if change is not None:
                folded = _apply(view, site, change)
                places[f"{site.kind} {'folded' if folded else 'online'}"] += 1
        log.info("%s: %s", name, ", ".join(f"{k} x{v}" for k, v in places.items()) or "nothing to do")


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


def _apply(view: ModelView, site: Site, change: Insert | Split | None) -> bool:
    """Carry out what a transform wants of a site; return whether it was folded."""
    if isinstance(change, Split):
        rewrite.split(view.model, site, change)
    return isinstance(change, Insert) and rewrite.insert(view.model, site, change)


def _group_behind(view: ModelView, site: Site) -> Group:
    """Return the group of layers that read ``site``."""
    assert site.block is not None
    return next(g for g in view.groups(site.block) if site.readers[0] in [layer.name for layer in g.layers])
