"""Toy models rounded to the nearest, quantizers on: what packing starts from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from stage_members import member
from toy_models import tokens, view_of
from toy_recipes import recipe, scene_of

from qexp.core.method import Method
from qexp.engine.acting import calibrate
from qexp.engine.blocks import activate
from qexp.engine.capture import observe
from qexp.engine.solving import plan_of, solve_group
from qexp.engine.streams import advance, embed
from qexp.engine.transforming import transform_block, transform_model
from qexp.models.view import ModelView

RECIPES: dict[str, Method] = {
    "w4a8g8": replace(recipe(act="per_token", a=8), grid=member("grid", "integer", w=4, g=8)),
    "w4a8_channel": recipe(grid="integer_half_step", act="per_token", a=8),
    "w4a4": recipe(grid="integer_symmetric", act="per_token_clipped", a=4),
    "w4a4_quarot": recipe("fold_norm", "hadamard", grid="integer_symmetric", act="per_token_clipped", a=4),
    "w4a8_asymmetric": recipe(act="per_token_asymmetric", a=8),
    "w4a4_asymmetric": recipe(act="per_token_asymmetric", a=4),
    "w4a16": recipe(),
    "w3a16": recipe(w=3),
    "w2a16g8": replace(recipe(w=2), grid=member("grid", "integer", w=2, g=8)),
    "w8a8": recipe(grid="integer_symmetric", w=8, act="per_token", a=8),
    "w8a16g8": replace(recipe(w=8), grid=member("grid", "integer", w=8, g=8)),
    "w4a4_outliers": recipe("outlier_columns", grid="integer_symmetric", act="per_token_asymmetric", a=4),
    "w2a16_quip": recipe("incoherence", grid="midrise", w=2),
    "w4a8_static": recipe(grid="integer_symmetric", act="per_tensor", a=8),
    "w6a6": recipe(w=6, act="per_token", a=6),
}


def rounded(family: str, method: Method, dtype: torch.dtype = torch.float32, **keys: Any) -> ModelView:
    """Return a toy model with the recipe's model-scope transforms, every layer rounded and the quantizers on."""
    view = view_of(family, dtype, **keys)
    transform_model(view, method, 0)
    plan = plan_of(view, method, 0)
    stream, kwargs = embed(view, tokens(4))
    for block in range(len(view.blocks)):
        transform_block(plan, scene_of(view, block, stream, kwargs[block]), stream)
        known = observe(view, block, view.groups(block), stream, kwargs[block])
        for group in view.groups(block):
            calibrate(view, method.act, group, known[group.site])
            solve_group(plan, group, None)
        stream = advance(view, block, stream, kwargs[block])
    activate(view, range(len(view.blocks)), method)
    return view
