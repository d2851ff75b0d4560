"""The only code that changes a weight for a transform.

An ``Insert`` replaces the activation x (a row) at a site by (x + shift) A. Where the site's writers can absorb
A it is folded into them; otherwise it runs online in front of the readers. The readers always get the dual:
W <- W A^{-T}, b <- b - W shift, so that the function stays what it was. All arithmetic is float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qexp.core.errors import UserError
from qexp.core.linear import QuantLinear
from qexp.core.maps import LinearMap, Permutation
from qexp.core.norms import NORM, OFFSET_NORM, ScaledRmsNorm, bias_of, gain_of, set_gain
from qexp.core.words import Insert, Site, Split, Writer

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
        return _turn_output(_named(model, site.writers[0].name), site, change)
    folded = change.kind in site.admits
    if site.kind == "residual":
        _prepare_residual(model, site, change)
    if folded:
        for writer in site.writers:
            write(_named(model, writer.name), writer, change)
    elif change.shift is not None:
        raise UserError(f"a shift at {site.name}, which has no writers to take it", "a site behind a norm")
    if change.kind != "center":
        _give_readers(model, site, change, folded)
    return folded


def _give_readers(model: nn.Module, site: Site, change: Insert, folded: bool) -> None:
    """Let the readers undo the change, which runs online in front of them where it is not folded."""
    for name in site.readers:
        _read(_named(model, name), change, folded)
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


def _turn_output(linear: QuantLinear, site: Site, change: Insert) -> bool:
    """Let a linear compute y A and take it back behind the product: A orthogonal, so that its inverse is known."""
    assert change.kind in site.admits and change.shift is None and linear.unmap is None
    write(linear, site.writers[0], change)
    linear.unmap = change.map
    return False


def _turn_keys(model: nn.Module, site: Site, change: Insert) -> bool:
    """Let keys be written as k A and queries as q A^-T, both inside their linears or the norms behind them."""
    if change.kind not in site.admits or change.shift is not None:
        got = f"a {change.kind} map of keys at {site.name}, which rotary embeddings do not commute with"
        raise UserError(got, "one of " + ", ".join(sorted(site.admits)))
    writer, queries = site.writers[0], _named(model, site.readers[0])
    write(_named(model, writer.name), writer, change)
    if writer.kind in (NORM, OFFSET_NORM):
        set_gain(queries, writer.kind, change.map.dual(gain_of(queries, writer.kind)))
        return True
    queries.weight.copy_(dual_written(change.map, queries.unmap, queries.weight.double().T.contiguous()).T)
    if queries.bias is not None:
        queries.bias.copy_(dual_written(change.map, queries.unmap, queries.bias.double()))
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


def write(module: Any, writer: Writer, change: Insert) -> None:
    """Let the writer produce (x + shift) A."""
    apply, shift = change.map.apply, change.shift
    if writer.kind in (NORM, OFFSET_NORM):
        bias = bias_of(module)
        if shift is not None:
            assert bias is not None
            bias = bias + shift.to(bias)
        set_gain(module, writer.kind, _or(1.0, apply(gain_of(module, writer.kind))))
        if bias is not None:
            module.bias.copy_(_or(0.0, apply(bias)))
        return
    weight = module.weight
    if writer.kind == "embedding":
        assert shift is None
        weight.copy_(apply(weight.double()))
        return
    unmap: LinearMap | None = getattr(module, "unmap", None)
    weight.copy_(written(change.map, unmap, weight.double().T.contiguous()).T)
    if module.bias is not None:
        bias = module.bias.double() if shift is None else module.bias.double() + shift.to(module.bias.double())
        module.bias.copy_(written(change.map, unmap, bias))
    else:
        assert shift is None, "a shift at a linear without a bias"


def written(map: LinearMap, unmap: LinearMap | None, outputs: Tensor) -> Tensor:
    """Return a writer's outputs [..., O] mapped, in front of a map that is taken back behind its product."""
    return map.apply(outputs) if unmap is None else unmap.apply(map.apply(unmap.undual(outputs)))


def dual_written(map: LinearMap, unmap: LinearMap | None, outputs: Tensor) -> Tensor:
    """Return outputs [..., O] with the dual of a map, in front of a map that is taken back behind the product."""
    return map.dual(outputs) if unmap is None else unmap.apply(map.dual(unmap.undual(outputs)))


def _or(value: float, products: Tensor) -> Tensor:
    """Return products with ``value`` where they are 0 * inf: a silent channel, which ``unit_gain`` gives up."""
    return torch.where(products.isnan(), value, products)


def reader_weight(module: Any, map: LinearMap, folded: bool) -> Tensor:
    """Return the reader weight float64 [O, I] after the dual of ``map``; a folded map acts before the online ones."""
    online: list[LinearMap] = module.path.maps if isinstance(module, QuantLinear) and folded else []
    return dual_weight(module.weight.double(), map, online)


def dual_weight(W: Tensor, map: LinearMap, online: list[LinearMap]) -> Tensor:
    """Return a reader's weight [O, I] after the dual of ``map``, which acts before the ``online`` maps."""
    W = map.dual(undo(W, online))
    for step in online:
        W = step.dual(W)
    return W


def undo(W: Tensor, online: list[LinearMap]) -> Tensor:
    """Return a reader's weight [O, I] as it would be without the ``online`` maps in front of it."""
    for step in reversed(online):
        W = step.undual(W)
    return W


def _read(module: Any, change: Insert, folded: bool) -> None:
    """Give the reader the dual of the map and the bias that undoes the shift."""
    if change.shift is not None:
        online = module.path.maps if isinstance(module, QuantLinear) and folded else []
        W = undo(module.weight.double(), online)
        _add_bias(module, -(W @ change.shift.to(W)))
    module.weight.copy_(reader_weight(module, change.map, folded))


def _add_bias(module: Any, addition: Tensor) -> None:
    if module.bias is None:
        module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0]), requires_grad=False)
    module.bias.copy_(module.bias.double() + addition)
