"""The attention door: transformers' own numbers when closed, and quantized keys that a cache does not change."""

from __future__ import annotations

import pytest
import torch
from stage_members import member
from torch import Tensor, nn
from toy_models import FAMILIES, distance, logits, tokens, toy, view_of
from toy_recipes import recipe

from qexp.engine.transforming import transform_model
from qexp.models.attention import Door
from qexp.models.view import ModelView

EXACT = 1e-9
CACHED = ("llama", "qwen3", "gemma2", "gemma3", "opt")  # grouped queries, QK-norm, soft cap, windows, learned positions
every_family = pytest.mark.parametrize("family", FAMILIES)


def identity(k_BASE: Tensor, v_BASE: Tensor) -> tuple[Tensor, Tensor]:
    """Leave keys and values, so that the rotation in front of the quantizer acts alone."""
    return k_BASE, v_BASE


def doors(view: ModelView) -> list[Door]:
    found = [view.door(block) for block in range(len(view.blocks))]
    assert all(door is not None for door in found)
    return found


def quantize_keys(view: ModelView, bits: int = 4) -> ModelView:
    """Rotate and quantize keys and values of every block."""
    transform_model(view, recipe("fold_norm", "hadamard"), 0)
    for door in doors(view):
        assert door.rotation is not None
        door.kv = member("kv", "per_head", kv=bits)
    return view


@every_family
def test_keys_rotated_after_the_positions_leave_the_logits(family):
    view = view_of(family)
    before = logits(view.model)
    transform_model(view, recipe("fold_norm", "hadamard"), 0)
    for door in doors(view):
        assert door.rotation is not None and door.rotation.size == view.head_size
        door.kv = identity
    assert distance(logits(view.model), before) < EXACT


def test_rotated_queries_and_keys_have_the_same_products():
    view = view_of("qwen3")
    transform_model(view, recipe("fold_norm", "hadamard"), 0)
    rotation = doors(view)[0].rotation
    q, k = torch.randn(2, 4, 9, 16, dtype=torch.float64), torch.randn(2, 4, 9, 16, dtype=torch.float64)
    turned = rotation.apply(q) @ rotation.apply(k).mT
    torch.testing.assert_close(turned, q @ k.mT, rtol=0, atol=1e-12)
    assert distance(rotation.apply(q) @ k.mT, q @ k.mT) > 0.1


def test_the_rotation_rests_where_keys_are_not_quantized():
    view = view_of("llama")
    before = logits(view.model)
    for door in doors(view):
        door.rotation = pytest.fail  # has no apply: touching it is an error
    assert torch.equal(logits(view.model), before)


@every_family
def test_every_block_is_quantized_where_asked(family):
    view = view_of(family)
    before = logits(view.model)
    errors = []
    for bits in (8, 4, 2):
        for door in doors(view):
            door.kv = member("kv", "per_head", kv=bits)
        errors.append(distance(logits(view.model), before))
    assert 0 < errors[0] < errors[1] < errors[2]
    for door in doors(view)[1:]:
        door.kv = None
    assert 0 < distance(logits(view.model), before) != errors[2]


@pytest.mark.parametrize("which", ["keys", "values"])
@every_family
def test_what_attention_reads_is_what_the_quantizer_gives(family, which):
    """Zeros for keys make attention an average over what is seen, zeros for values leave the biases of o."""
    view = view_of(family)
    before, given = logits(view.model), []

    def zeros(k_BASE: Tensor, v_BASE: Tensor) -> tuple[Tensor, Tensor]:
        given.append((k_BASE.shape, v_BASE.shape))
        return (0 * k_BASE, v_BASE) if which == "keys" else (k_BASE, 0 * v_BASE)

    for door in doors(view):
        door.kv = zeros
    assert distance(logits(view.model), before) > 1e-3
    shape = torch.Size((4, view.kv_heads, 12, view.head_size))
    assert given == [(shape, shape)] * 2, "once per block, before the heads are repeated"


@pytest.mark.parametrize("family", CACHED)
def test_cached_decoding_equals_the_full_forward_on_quantized_keys(family):
    view = quantize_keys(view_of(family))
    ids = tokens(3, 4)
    out = view.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, min_new_tokens=10, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    full = logits(view.model, out.sequences[:, :-1])[:, 3:]
    assert out.sequences.shape == (3, 14)  # beyond the sliding windows
    assert distance(torch.stack(out.logits, 1), full) < 1e-6  # generate returns float32
    for door in doors(view):
        door.kv = None
    assert distance(logits(view.model, out.sequences[:, :-1])[:, 3:], full) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bits", [4, 16])
def test_padding_changes_no_real_token(family, side, bits):
    view = view_of(family)
    if bits < 16:
        quantize_keys(view, bits)
    ids, pad = tokens(2, 8), torch.full((2, 7), 2)  # more padding than a sliding window
    real, none = torch.ones_like(ids), torch.zeros_like(pad)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = torch.cat([none, real] if side == "left" else [real, none], 1)
    batch, mask = torch.cat([padded, tokens(1, 15)]), torch.cat([mask, torch.ones(1, 15, dtype=torch.long)])
    given = {} if family == "opt" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}  # OPT counts by itself
    got = logits(view.model, batch, attention_mask=mask, **given)[:2]
    here = got[:, 7:] if side == "left" else got[:, :8]
    assert distance(here, logits(view.model, ids)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
def test_soft_caps_are_those_of_eager_attention(dtype, padded):
    ids = tokens(3)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = 0
    eager = toy("gemma2", torch.float32)  # in float64 it takes its softmax in float32 all the same
    eager.set_attn_implementation("eager")
    expected, got = (
        logits(eager, ids, attention_mask=mask),
        logits(view_of("gemma2", dtype).model, ids, attention_mask=mask),
    )
    assert distance(got[mask.bool()], expected[mask.bool()]) < 1e-5
    uncapped = logits(view_of("gemma2", dtype, attn_logit_softcapping=None).model, ids, attention_mask=mask)
    assert distance(uncapped[mask.bool()], expected[mask.bool()]) > 1e-3


def test_a_module_without_a_door_computes_what_sdpa_computes():
    plain, ours = toy("mistral"), toy("mistral")
    ours.set_attn_implementation(view_of("mistral").model.config._attn_implementation)
    assert ours.config._attn_implementation == "qexp" and not any(hasattr(m, "door") for m in ours.modules())
    assert torch.equal(logits(ours), logits(plain))


def test_doors_are_no_parameters():
    view, model = view_of("llama"), toy("llama")
    assert view.model.state_dict().keys() == model.state_dict().keys()
    assert not any(isinstance(child, nn.Module) for child in vars(doors(view)[0]).values())
