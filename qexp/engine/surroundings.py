"""What a transform sees around a site, and the oracle that tells what a candidate map would cost.

The damage of a map is the mean squared error of the module behind the site (attention for q/k/v, MLP for gate/up, the
linear itself for o and down), against its float answer, when the map is inserted and the recipe's grid (plain
rounding) and activation quantizer are applied. Source of the choice of modules: arXiv:2306.00978, official code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from qexp.core.absorb import undo
from qexp.core.linear import QuantLinear
from qexp.core.maps import LinearMap
from qexp.core.rewrite import reader_weight
from qexp.core.stages import Grid
from qexp.core.words import Group, Site, Stats
from qexp.engine.acting import act_of, search_quantizer
from qexp.engine.solving import Plan
from qexp.engine.streams import Kwargs, StopForward, Stream, answers, hidden_states
from qexp.models.view import ModelView

Call = tuple[Any, Any, Tensor]
SEARCH_SEQUENCES = 16  # the paper's Fig. 8: 16 sequences suffice for the search


class SiteSurroundings:
    """One site during block ``block``'s transforms; nothing is left changed behind any call."""

    def __init__(
        self,
        view: ModelView,
        site: Site,
        stats: Stats | None,
        damage: Callable[[LinearMap], float] | None,
        folded: bool = True,
    ) -> None:
        self._view, self._site, self._stats, self._damage, self._folded = view, site, stats, damage, folded

    @property
    def weights(self) -> list[Tensor]:
        """Return the readers' weights, each [O, I] float32, as what is inserted here meets them.

        A folded map acts in front of the online ones, so the weights are without these; another behind them.
        """
        readers = [self._view.linear(name) for name in self._site.readers]
        return [undo(r.weight.double(), r.path.maps if self._folded else []).float() for r in readers]

    @property
    def gain(self) -> Tensor | None:
        """Return the gain of the norm that writes the site, float64, or None."""
        return self._view.gain(self._site)

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the norm that writes the site, float64, or None."""
        return self._view.bias(self._site)

    @property
    def stats(self) -> Stats:
        """Return the statistics of the site's activation."""
        assert self._stats is not None, "statistics of a site that has none: model scope, or read by no linear"
        return self._stats

    @property
    def fisher(self) -> list[Tensor]:
        """Return the readers' mean squared gradients."""
        return [self._view.fisher_of(name) for name in self._site.readers]

    def damage(self, candidate: LinearMap) -> float:
        """Return the mean squared output error with ``candidate`` inserted and everything rounded."""
        assert self._damage is not None, "damage at a site that has none: model scope, or read by no linear"
        return self._damage(candidate)


def inspected(view: ModelView, group: Group) -> nn.Module:
    """Return the module whose output tells the damage at a group's input."""
    block, kind = group.site.split(".", 1)
    family = view.family
    if family is not None and kind == "attn_in":
        return view.model.get_submodule(view.path(int(block), family.attention))
    if family is not None and kind == "mlp_in" and family.mlp is not None:
        return view.model.get_submodule(view.path(int(block), family.mlp))
    return view.linear(group.layers[-1].name)


@torch.no_grad()
def calls(view: ModelView, group: Group, stream: Stream, kwargs: Kwargs) -> list[Call]:
    """Return (args, kwargs, float answer) of the inspected module for the first sequences of the stream."""
    module = inspected(view, group)
    seen: list[tuple[Any, Any]] = []

    def take(_: nn.Module, args: Any, given: Any) -> None:
        seen.append((args, given))
        raise StopForward

    handle = module.register_forward_pre_hook(take, with_kwargs=True)
    count, head = 0, []
    for x in stream:
        if count < SEARCH_SEQUENCES:
            head.append(x[: SEARCH_SEQUENCES - count])
            count += len(x)
    try:
        for _ in answers(view, group.layers[0].block, head, kwargs):
            pass
    finally:
        handle.remove()
    return [(args, given, hidden_states(module(*args, **given))) for args, given in seen]


def damage_oracle(
    plan: Plan, group: Group, folded: bool, record: Callable[[], list[Call]], stats: Stats | None = None
) -> Callable[[LinearMap], float]:
    """Return the function candidate -> damage for one group; ``record`` (:func:`calls`) runs if it is ever asked.

    Where the module is a linear and its input is not rounded, the ``stats`` of that input say it all: no forward.
    """
    view, act = plan.view, act_of(plan.method, group)
    module, layers = inspected(view, group), [view.linear(layer.name) for layer in group.layers]
    path, quantizer = layers[0].path, search_quantizer(act)
    if stats is not None and layers == [module] and quantizer is None:
        return partial(_linear_damage, layers[0], plan.grids.get(group.layers[0].name), folded, stats.H_II)

    recorded = cache(record)

    @torch.no_grad()
    def damage(candidate: LinearMap) -> float:
        truth = recorded()
        kept = [layer.weight for layer in layers]
        rounded = [
            _rounded(layer, candidate, folded, plan.grids.get(about.name))
            for layer, about in zip(layers, group.layers, strict=True)
        ]
        path.maps.insert(0 if folded else len(path.maps), candidate)
        path.act = quantizer
        for layer, W in zip(layers, rounded, strict=True):
            layer.weight = nn.Parameter(W, requires_grad=False)
        try:
            errors = [
                (hidden_states(module(*args, **given)) - answer).float().pow(2).sum() for args, given, answer in truth
            ]
        finally:
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight = weight
            path.maps.remove(candidate)
            path.act = None
        return float(torch.stack(errors).sum()) / sum(answer.numel() for *_, answer in truth)

    return damage


@torch.no_grad()
def _linear_damage(layer: QuantLinear, grid: Grid | None, folded: bool, H_II: Tensor, candidate: LinearMap) -> float:
    """Return tr(D H Dᵀ) / O: the mean of (D x)² for D, what rounding changes of the weight that the site's x meets."""
    online = layer.path.maps if folded else []
    rounded = _rounded(layer, candidate, folded, grid).double()
    D_OI = (candidate.undual(undo(rounded, online)) - undo(layer.weight.double(), online)).to(H_II)
    return float(((D_OI @ H_II) * D_OI).sum()) / len(D_OI)


def _rounded(layer: QuantLinear, candidate: LinearMap, folded: bool, grid: Grid | None) -> Tensor:
    """Return the layer's weight after the candidate's dual, rounded to the nearest grid point."""
    W = reader_weight(layer, candidate, folded).float()
    if grid is not None:
        params = grid.fit(W, None)
        W = grid.decode(grid.encode(W, params), params)
    return W.to(layer.weight)
