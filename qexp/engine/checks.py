"""All mistakes of a recipe on a model, told before any forward."""

from __future__ import annotations

from torch import Tensor

from qexp.core.errors import UserError, choose
from qexp.core.stages import Method
from qexp.core.words import FULL_BITS
from qexp.engine.solving import grids_of
from qexp.models.view import ModelView


def check_method(method: Method) -> None:
    """Raise UserError for what is wrong with a recipe on any model."""
    choose("method.inputs", method.inputs, ("quantized", "float"), "method.inputs")
    scopes = [transform.scope for transform in method.transform.values()]
    if scopes != sorted(scopes, key=("model", "block").index):
        order = sorted(method.transform, key=lambda name: method.transform[name].scope != "model")
        raise UserError(
            f"transforms in the order {','.join(method.transform)}",
            "transforms of model scope first",
            f"method.transform=[{','.join(order)}]",
        )
    if method.tuner:
        raise UserError(f"method.tuner has {', '.join(method.tuner)}", "no tuner in this version", "method/tuner=[]")


def check_model(view: ModelView, method: Method, tokens: Tensor) -> None:
    """Raise UserError for what is wrong with a recipe on this model and calibration."""
    grids = grids_of(view, method)
    for layer in view.layers:
        if layer.name in grids:
            grids[layer.name].check(layer)
    for transform in method.transform.values():
        transform.sites(view)
    needs = {name for name, member in _statistical(method) if "activations" in member}
    if grids and needs and not len(tokens):
        raise UserError(f"calibration=none with {', '.join(sorted(needs))}, which read activations", "data", "calibration=generated")
    if method.kv.bits < FULL_BITS and not view.has_door:
        raise UserError(f"KV quantization on a {view.config.model_type}, which has no attention interface", "kv bits 16", "bits.kv=16")


def _statistical(method: Method) -> list[tuple[str, frozenset[str]]]:
    members = {"grid": method.grid, "solver": method.solver, **method.transform}
    return [(name, member.needs) for name, member in members.items()]
