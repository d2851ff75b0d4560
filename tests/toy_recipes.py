"""Recipes put together from the YAML files, and run on toy models as far as their transforms go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stage_members import member
from torch import Tensor

from qexp.core.linear import InputPath, QuantLinear
from qexp.core.method import Method
from qexp.core.stages import Transform
from qexp.engine.context import Run, quiet
from qexp.engine.fisher import take_fisher
from qexp.engine.reconstruct import Scene
from qexp.engine.solving import plan_of
from qexp.engine.store import Store
from qexp.engine.streams import Stream, advance, embed
from qexp.engine.transforming import transform_block, transform_model
from qexp.engine.whole_model import Learning
from qexp.models.view import ModelView


def transform_named(name: str, **settings: Any) -> Transform:
    """Return the transform of a YAML file; ``settings`` replace its own, those of its ``training`` one by one."""
    return short(member("transform", name)[name], **settings)


def short(learner: Any, **settings: Any) -> Any:
    """Return a member with other settings; ``training`` is a mapping of some of its own."""
    training = {"training": replace(learner.training, **settings.pop("training"))} if "training" in settings else {}
    return replace(learner, **settings, **training)


def scene_of(view: ModelView, block: int, stream: Stream, kwargs: Any, floating: Stream | None = None) -> Scene:
    """Return what a block is learned from, all that could be read; ``floating`` is the float model's stream."""
    y = stream if floating is None else floating
    return Scene(block, kwargs, stream, y, advance(view, block, y, kwargs), []).answered(view, Tensor.cpu)


def recipe(*transforms: str, grid: str = "integer", act: str = "none", w: int = 4, a: int = 16, **keys: Any) -> Method:
    """Return a method of rounding with these transforms; ``keys`` are settings by transform, such as smooth={...}."""
    return Method(
        name="toy",
        transform={name: transform_named(name, **keys.get(name, {})) for name in transforms},
        grid=member("grid", grid, w=w, g=-1),
        solver=member("solver", "rtn"),
        act=member("act", act, a=a),
        kv=member("kv", "none"),
        tuner={},
        allocation=member("allocation", "uniform", w=w),
        inputs="quantized",
        quantize_stream=False,
    )


def a_run(folder: Path) -> Run:
    """Return a run in ``folder`` that shows no progress."""
    return Run(
        folder=folder, name="toy", fingerprint="f", seed=0, device="cpu", progress=quiet, cache=folder / "cache",
        model_identity="m",
    )  # fmt: skip


def transform(view: ModelView, method: Method, ids: Tensor, seed: int = 0) -> ModelView:
    """Apply a recipe's transforms to the whole model, block by block as a run does, and round nothing."""
    with TemporaryDirectory() as folder:
        transform_model(view, method, seed, Learning(ids, Store(Path(folder), []), quiet))
        take_fisher(view, ids, method, a_run(Path(folder)))
    plan = plan_of(view, method, seed)
    stream, kwargs = embed(view, ids)
    for block in range(len(view.blocks)):
        transform_block(plan, scene_of(view, block, stream, kwargs[block]), stream)
        stream = advance(view, block, stream, kwargs[block])
    return view


def stream_into(view: ModelView, block: int, ids: Tensor) -> tuple[Stream, dict[str, Any]]:
    """Return the inputs of a block and its keyword arguments."""
    stream, kwargs = embed(view, ids)
    for before in range(block):
        stream = advance(view, before, stream, kwargs[before])
    return stream, kwargs[block]


def linear_of(view: ModelView, role: str, block: int = 0) -> QuantLinear:
    """Return the linear of a role."""
    return view.linear(next(a.name for a in view.layers if (a.role, a.block) == (role, block)))


def path_of(view: ModelView, role: str, block: int = 0) -> InputPath:
    """Return the input path of the linear of a role."""
    return linear_of(view, role, block).path
