"""Keys quantized before RoPE: behind their projection or norm, unrotated, and never twice."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from packed_models import rounded
from stage_members import member
from torch import Tensor
from toy_models import distance, logits, tokens, view_of
from toy_recipes import recipe

from qexp.core.errors import UserError
from qexp.core.packed_kv import codec_of
from qexp.engine.checks import check_model
from qexp.engine.packing import check_packable, pack_model
from qexp.engine.transforming import transform_model
from qexp.models.view import ModelView

ROTARY = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3")
every_family = pytest.mark.parametrize("family", (*ROTARY, "opt"))


def per_head(pre_rope: bool = True, bits: int = 2) -> Any:
    return replace(member("kv", "per_head", kv=bits), pre_rope=pre_rope)


def view_with(family: str, kv: Any, *transforms: str) -> ModelView:
    view = view_of(family)
    transform_model(view, recipe(*transforms), 0)
    for block in range(len(view.blocks)):
        view.door(block).kv = kv
    return view


def keys_at_the_door(family: str, kv: Any) -> Tensor:
    """Return the keys [B, A, S, E] that attention reads in the first block."""
    read: list[Tensor] = []

    class Spy(type(kv)):  # type: ignore[misc]
        def __call__(self, k_BASE: Tensor, v_BASE: Tensor) -> tuple[Tensor, Tensor]:
            k_hat, v_hat = super().__call__(k_BASE, v_BASE)
            read.append(k_hat)
            return k_hat, v_hat

    logits(view_with(family, Spy(**vars(kv))).model)
    return read[0]


@pytest.mark.parametrize("family", ROTARY)
def test_the_grid_is_that_of_keys_that_no_position_has_turned(family):
    """The first position turns nothing: there, and only there, the two agree."""
    before, after = keys_at_the_door(family, per_head()), keys_at_the_door(family, per_head(pre_rope=False))
    torch.testing.assert_close(before[:, :, 0], after[:, :, 0])
    assert (before[:, :, 1:] - after[:, :, 1:]).abs().amax(-1).median() > 1e-3
    assert max(len(row.unique()) for row in after.reshape(-1, after.shape[-1])) <= 4


@every_family
def test_few_values_leave_the_projection_or_the_norm(family):
    view, seen = view_with(family, per_head()), []
    attention = view.model.get_submodule(view.path(0, view.family.attention))
    source = attention.k_norm if family in ("qwen3", "gemma3") else attention.k_proj
    source.register_forward_hook(lambda *given: seen.append(given[-1]))
    logits(view.model)
    assert max(len(row.unique()) for row in seen[0].reshape(-1, view.head_size)) <= 4


def test_without_rope_before_and_behind_are_the_same():
    early, late = (view_with("opt", per_head(pre_rope)) for pre_rope in (True, False))
    assert torch.equal(logits(early.model), logits(late.model))


@every_family
def test_more_bits_are_closer_and_16_are_exact(family):
    before = logits(view_of(family).model)
    errors = [distance(logits(view_with(family, per_head(bits=bits)).model), before) for bits in (8, 4, 2)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert torch.equal(logits(view_with(family, None).model), before)


def test_the_rotation_of_keys_and_queries_rests():
    view = view_with("llama", per_head(), "fold_norm", "hadamard")
    before = logits(view.model)
    for block in range(len(view.blocks)):
        assert view.door(block).rotation is not None
        view.door(block).rotation = pytest.fail  # has no apply: touching it is an error
    assert torch.equal(logits(view.model), before)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_cached_decoding_equals_the_full_forward(family):
    view, ids = view_with(family, per_head()), tokens(3, 4)
    out = view.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, min_new_tokens=10, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    full = logits(view.model, out.sequences[:, :-1])[:, 3:]
    assert distance(torch.stack(out.logits, 1), full) < 1e-6


def test_a_copy_looks_at_its_own_door():
    view = view_with("llama", per_head())
    quantized, twin = logits(view.model), copy.deepcopy(view)
    for block in range(len(view.blocks)):
        view.door(block).kv = None
    assert torch.equal(logits(twin.model), quantized) and not torch.equal(logits(view.model), quantized)


def test_what_cannot_be_done_is_refused():
    method = replace(recipe(grid="integer_symmetric"), kv=per_head())
    assert codec_of(method.kv, 16) is None
    message = r"kv\.pre_rope=true with a packed KV cache; need .*; set method\.kv\.pre_rope=false"
    with pytest.raises(UserError, match=message):
        check_packable(method)
    with pytest.raises(UserError, match=message):
        pack_model(rounded("llama", method), method)
    with pytest.raises(UserError, match=r"KV quantization on a phi3, .*; set bits\.kv=16"):
        check_model(view_of("phi3"), method)
    check_model(view_of("llama"), method)


def test_a_group_that_does_not_divide_the_head_is_told_before_any_forward():
    method = replace(recipe(), kv=replace(per_head(), group=5))
    with pytest.raises(UserError, match=r"kv\.group=5 does not divide head_size=6"):
        check_model(view_of("llama"), method)
