"""Run a recipe's transforms: model scope once before the walk, block scope inside each block."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import torch

from qexp.core import rewrite
from qexp.core.rng import generator
from qexp.core.stages import Method
from qexp.core.words import Group, Site
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
                folded = rewrite.insert(view.model, site, change)
                places[f"{site.kind} {'folded' if folded else 'online'}"] += 1
        log.info("%s: %s", name, ", ".join(f"{k} x{v}" for k, v in places.items()) or "nothing to do")


@torch.no_grad()
def transform_block(plan: Plan, block: int, source: Stream, kwargs: Kwargs) -> None:
    """Apply the transforms of block scope to one block, from the statistics of ``source``."""
    view = plan.view
    for name, transform in plan.method.stage("block"):
        sites = [site for site in transform.sites(view) if site.block == block]
        behind = {site.name: _group_behind(view, site) for site in sites}
        groups = [group for group in view.groups(block) if group in behind.values()]
        raw = {behind[site.name].site for site in sites if "diagonal" in site.admits}  # folded: in front of online maps
        known = observe(view, block, groups, source, kwargs, raw) if groups else {}
        for site in sites:
            group = behind[site.name]
            record = partial(calls, view, group, source, kwargs)
            damage = damage_oracle(plan, group, "diagonal" in site.admits, record, known[group.site])
            around = SiteSurroundings(view, site, known[group.site], damage)
            change = transform.edit(site, around, generator(plan.seed, name, site.name))
            if change is not None:
                rewrite.insert(view.model, site, change)


def _group_behind(view: ModelView, site: Site) -> Group:
    """Return the group of layers that read ``site``."""
    assert site.block is not None
    return next(g for g in view.groups(site.block) if site.readers[0] in [layer.name for layer in g.layers])
