"""All mistakes of a recipe on a model, told before any forward."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qexp.core.decoding import BlockDecoder
from qexp.core.errors import UserError, choose
from qexp.core.learned import BlockTuner, LearnedSolver, ModelTuner, NormFactors, RangeTuner, Trained
from qexp.core.measures import Measured
from qexp.core.method import Method
from qexp.core.ranges import Uniform
from qexp.core.stages import Grid, Transform
from qexp.core.words import FULL_BITS
from qexp.engine.wants import changes_norms, model_trainings, needs_fisher, trainings

if TYPE_CHECKING:
    from qexp.models.view import ModelView  # transformers: seconds that a mistake in the recipe need not wait for


def check_method(method: Method, calibrated: bool) -> None:
    """Raise UserError for what is wrong with a recipe on any model; ``calibrated``: there is calibration data."""
    choose("method.inputs", method.inputs, ("quantized", "block", "float"), "method.inputs")
    scopes = [transform.scope for transform in method.transform.values()]
    if scopes != sorted(scopes, key=("model", "block").index):
        order = sorted(method.transform, key=lambda name: method.transform[name].scope != "model")
        raise UserError(
            f"transforms in the order {','.join(method.transform)}",
            "transforms of model scope first",
            f"method/transform=[{','.join(order)}]",
        )
    seen: list[str] = []
    for name, transform in method.transform.items():
        for needed in transform.after:
            if needed not in seen:
                right = ",".join([needed, *(other for other in method.transform if other != needed)])
                raise UserError(f"transform {name} without {needed} before it", needed, f"method/transform=[{right}]")
        seen.append(name)
    _check_kept_last(method)
    _check_fisher(method)
    learned = trainings(method) | model_trainings(method)
    for key, training in learned.items():
        training.check(f"method.{key}.training")
    _check_rates(method)
    _check_learners(method)
    members: list[Any] = [method.grid, method.solver, *method.transform.values()]
    members += [tuner for tuner in method.tuner.values() if isinstance(tuner, NormFactors)]
    members += [method.act] if method.act.bits < FULL_BITS else []
    needing = ["the allocation"] if isinstance(method.allocation, Measured) else []
    needing += [type(member).__name__ for member in members if member.needs & {"activations", "fisher"}] + list(learned)
    if needing and not calibrated:
        raise UserError(
            f"calibration=none, but {' and '.join(needing)} of {method.name} read activations",
            "calibration data",
            "calibration=generated",
        )


def _check_rates(method: Method) -> None:
    """Raise UserError for a rate of learning that is negative or no number; 0 learns nothing."""
    members: dict[str, Any] = {f"transform.{name}": t for name, t in method.transform.items()}
    members |= {"solver": method.solver, **{f"tuner.{name}": t for name, t in method.tuner.items()}}
    for key, member in members.items():
        for name, rate in vars(member).items():
            if name.endswith("rate") and not (isinstance(rate, int | float) and 0 <= rate < math.inf):
                raise UserError(f"method.{key}.{name}={rate}", "a number from 0 on", f"method.{key}.{name}=1.0e-4")


@runtime_checkable
class Particular(Protocol):
    """A solver or tuner that takes certain grids only, and says which."""

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid that it does not take."""


def _check_learners(method: Method) -> None:
    """Raise UserError for members that learn and cannot do so together, or on this grid."""
    for name, tuner in method.tuner.items():
        if not isinstance(tuner, RangeTuner | BlockTuner | BlockDecoder | NormFactors | ModelTuner):
            got = f"tuner {name}, which is of none of the kinds in core/learned.py"
            raise UserError(got, "ranges, norms, values, factors or decoding", "method/tuner=[]")
    particular = {n: m for n, m in {**method.tuner, "the solver": method.solver}.items() if isinstance(m, Particular)}
    for member in particular.values():
        member.check(method.grid)
    spacing = [name for name, tuner in method.tuner.items() if isinstance(tuner, ModelTuner)]
    spacing += ["the solver"] if isinstance(method.solver, LearnedSolver) else []
    spacing = [name for name in spacing if name not in particular]
    if spacing and not isinstance(method.grid, Uniform):
        got = f"{' and '.join(spacing)} learning the spacing of {type(method.grid).__name__}"
        raise UserError(got, "evenly spaced values", "method/grid=integer")
    blocks = [name for name, transform in method.transform.items() if transform.scope == "block"]
    own = [name for name in blocks if isinstance(t := method.transform[name], Trained) and t.learns_ranges]
    cutting = own + [name for name, tuner in method.tuner.items() if isinstance(tuner, RangeTuner)]
    if len(cutting) > 1:
        got = f"{' and '.join(cutting)} all learning the ranges of weights"
        raise UserError(got, "one that does", "method/tuner=[]")
    if own and own != blocks[-1:]:
        got = f"{blocks[-1]} behind {own[0]}, which learns the ranges of the weights it leaves"
        raise UserError(got, f"{own[0]} last", f"method.transform.{own[0]}.clip_rate=0")
    if cutting and method.grid.group == 0:
        got = f"{cutting[0]} learning ranges on a grid with one range for a whole weight"
        raise UserError(got, "rows or groups", "method.grid.group=-1")


def _check_fisher(method: Method) -> None:
    """Raise UserError for transforms that would change weights after their squared gradients were taken."""
    readers = needs_fisher(method)
    changing = [name for name, t in method.transform.items() if t.scope == "block" and not keeps_weights(t)]
    if readers and changing:
        got = f"{changing[0]} of a block changing weights whose squared gradients {' and '.join(readers)} reads"
        need = "weights as they were when the gradients were taken"
        fix = "method/transform=[]" if readers == ["grid"] else f"method/transform=[{','.join(changing)}]"
        raise UserError(got, need, "method.grid.weights=hessian" if readers == ["grid"] else fix)


def keeps_weights(transform: Transform) -> bool:
    """Return whether a transform leaves weights as they are, and at most says which are not to be quantized."""
    return bool(getattr(transform, "keeps_weights", False))


@runtime_checkable
class Keeping(Protocol):
    """A transform that keeps input channels out of quantization."""

    def kept(self, size: int) -> int:
        """Return how many of ``size`` channels."""


def _check_kept_last(method: Method) -> None:
    """Raise UserError for a transform behind kept channels or weights, which it would mix or search without."""
    names = list(method.transform)
    for name in names[:-1]:
        if isinstance(method.transform[name], Keeping) or keeps_weights(method.transform[name]):
            order = ",".join([other for other in names if other != name] + [name])
            raise UserError(f"transforms behind {name}", f"{name} last", f"method/transform=[{order}]")


def check_model(view: ModelView, method: Method) -> None:
    """Raise UserError for what is wrong with a recipe on this model, before anything is computed with it."""
    from qexp.engine.solving import plan_of

    _check_learned(view, method)
    grids = plan_of(view, method, 0).grids
    sites = [(transform, site) for transform in method.transform.values() for site in transform.sites(view)]
    kept = {reader: t.kept(site.size) for t, site in sites if isinstance(t, Keeping) for reader in site.readers}
    _check_options(view, method)
    for layer in view.layers:
        seen = replace(layer, inputs=layer.inputs - kept.get(layer.name, 0))
        if layer.name in grids:
            grids[layer.name].check(seen)
        if method.act.bits < FULL_BITS:
            method.act.check(seen.inputs)
    outputs = Counter(site.name for _, site in sites if site.kind == "output")
    if outputs and max(outputs.values()) > 1:
        raise UserError("two transforms that turn the outputs of linears", "one", "method/transform=[incoherence]")
    if method.kv.bits < FULL_BITS:
        if view.door(0) is None:
            raise UserError(
                f"KV quantization on a {view.config.model_type}, whose attention has no door",
                "kv bits 16",
                "bits.kv=16",
            )
        method.kv.cost(view.head_size)  # says it if the head cannot be divided as asked


def _check_options(view: ModelView, method: Method) -> None:
    """Raise UserError where an allocation has options that the grid cannot take, or a budget below all of them."""
    from qexp.engine.sensitivity import Table

    allocation = method.allocation
    if not isinstance(allocation, Measured) or method.grid.bits >= FULL_BITS:
        return
    if allocation.metric == "kl" and view.family is None:
        got = f"allocation.metric=kl on {view.config.model_type}, whose norm and head are not described"
        raise UserError(got, "a metric that needs no head", "method.allocation.metric=output")
    options = [bits for bits in allocation.options if bits < FULL_BITS]
    refused = {bits: error for bits in options if (error := _refusal(view, method, bits))}
    taken = [bits for bits in allocation.options if bits not in refused]
    if refused and not taken:
        raise next(iter(refused.values()))
    if refused:
        got = f"allocation.options={options}, of which {type(method.grid).__name__} refuses {list(refused)}"
        raise UserError(got, "bits that the grid has", f"method.allocation.options={taken}".replace(" ", ""))
    nothing = Table(method, {layer.name: dict.fromkeys(allocation.options, 0.0) for layer in view.layers})
    allocation.assign(view.layers, nothing)


def _refusal(view: ModelView, method: Method, bits: int) -> UserError | None:
    """Return why the grid cannot have so many bits in some layer."""
    for layer in view.layers:
        try:
            method.grid.for_layer(layer, bits).check(layer)
        except UserError as error:
            return error
    return None


def _check_learned(view: ModelView, method: Method) -> None:
    """Raise UserError for what is to be taken from other runs, or tuned, and is not there."""
    from qexp.engine.whole_model import loaded

    for name, transform in method.transform.items():
        loaded(view, name, transform)
    for key, training in trainings(method).items():
        files = [Path(training.load) / f"{block:05d}.safetensors" for block in range(len(view.blocks))]
        if training.load and not all(file.is_file() for file in files):
            override = f"method.{key}.training.load=''"
            raise UserError(f"{training.load} lacks files of some blocks", "the folder learned of a run", override)
    for key, training in model_trainings(method).items():
        if training.load:
            load = f"method.{key}.training.load"
            raise UserError(load, "nothing: it starts from the codes", f"{load}=''")
    if view.family is None and (changes_norms(method) or model_trainings(method)):
        got = f"norms, or the whole model, trained on {view.config.model_type}, whose norms and head are not described"
        override = "method/tuner=[] method.solver.norm_rate=0"
        raise UserError(got, "no such tuner, and a solver that leaves norms", override)
