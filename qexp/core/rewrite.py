"""The only code that changes a weight for a transform.

An ``Insert`` replaces the activation x (a row) at a site by (x + shift) A. Where the site's writers can absorb
A it is folded into them; otherwise it runs online in front of the readers, which always get the dual. The arithmetic
is that of core/absorb.py, in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qexp.core.absorb import InPlace, dual_weight
from qexp.core.errors import UserError
from qexp.core.linear import QuantLinear
from qexp.core.maps import LinearMap, Permutation
from qexp.core.norms import ScaledRmsNorm, gain_of
from qexp.core.words import Insert, Site, Split

UNIT = 1e-12  # a folded gain g * (1 / g) is 1 up to the last bit


@torch.no_grad()
def insert(model: nn.Module, site: Site, change: Insert) -> bool:
    """Insert ``change`` at ``site`` and return whether it was folded (False: it runs online)."""
    if site.kind == "query_key":
        _named(model, site.readers[0]).door.rotation = change.map
        return False
    if site.kind == "keys":
        return _turn_keys(model, site, change)
    if site.kind == "output":
        return _turn_output(model, site, change)
    folded = change.kind in site.admits
    if site.kind == "residual":
        _prepare_residual(model, site, change)
    if folded:
        for writer in site.writers:
            InPlace(model).write(writer, change)
    elif change.shift is not None:
        raise UserError(f"a shift at {site.name}, which has no writers to take it", "a site behind a norm")
    if change.kind != "center":
        _give_readers(model, site, change, folded)
    return folded


def _give_readers(model: nn.Module, site: Site, change: Insert, folded: bool) -> None:
    """Let the readers undo the change, which runs online in front of them where it is not folded."""
    for name in site.readers:
        InPlace(model).read(name, change, folded)
    path = getattr(_named(model, site.readers[0]), "path", None)
    if folded or path is None:
        return
    if path.kept:
        raise UserError(
            f"a map at {site.name} behind outlier_columns, which would mix the kept channels",
            "outlier_columns last",
        )
    path.maps.append(change.map)


def split(model: nn.Module, site: Site, change: Split) -> None:
    """Put the kept channels of a site last, online, and out of reach of its quantizers."""
    insert(model, site, Insert("permutation", Permutation(change.order)))
    _named(model, site.readers[0]).path.kept = change.kept


def _turn_output(model: nn.Module, site: Site, change: Insert) -> bool:
    """Let a linear compute y A and take it back behind the product: A orthogonal, so that its inverse is known."""
    linear = _named(model, site.writers[0].name)
    assert change.kind in site.admits and change.shift is None and linear.unmap is None
    InPlace(model).write(site.writers[0], change)
    linear.unmap = change.map
    return False


def _turn_keys(model: nn.Module, site: Site, change: Insert) -> bool:
    """Let keys be written as k A and queries as q A^-T, both inside their linears or the norms behind them."""
    if change.kind not in site.admits or change.shift is not None:
        got = f"a {change.kind} map of keys at {site.name}, which rotary embeddings do not commute with"
        raise UserError(got, "one of " + ", ".join(sorted(site.admits)))
    InPlace(model).write(site.writers[0], change)
    InPlace(model).answer(site.readers[0], site.writers[0], change)
    return True


def _named(model: nn.Module, name: str) -> Any:
    """Return a module by name; its attributes are known to the site that named it, not to the type checker."""
    return model.get_submodule(name)


def _prepare_residual(model: nn.Module, site: Site, change: Insert) -> None:
    """Make the norms between the residual stream and its readers commute with the map."""
    assert change.kind in site.admits, f"{change.kind} at the residual stream, which only takes what it can absorb"
    for norm in site.norms:
        module = _named(model, norm.name)
        if change.kind == "center":
            assert isinstance(module, nn.LayerNorm)
            model.set_submodule(norm.name, ScaledRmsNorm(module))
        elif isinstance(module, nn.LayerNorm) or float((gain_of(module, norm.kind) - 1).abs().max()) > UNIT:
            raise UserError(
                f"a rotation of the residual stream in front of {norm.name}, which has a gain of its own",
                "fold_norm before it",
                "method/transform=[fold_norm,hadamard]",
            )


def reader_weight(module: Any, map: LinearMap, folded: bool) -> Tensor:
    """Return the reader weight float64 [O, I] after the dual of ``map``; a folded map acts before the online ones."""
    online: list[LinearMap] = module.path.maps if isinstance(module, QuantLinear) and folded else []
    return dual_weight(module.weight.double(), map, online)
