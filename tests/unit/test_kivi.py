"""KIVI: its grid, its rule of who reads what exactly, and the attention door that follows the rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stage_members import member
from torch import Tensor, nn
from toy_models import distance, logits, tokens, view_of
from toy_recipes import recipe

from qexp.core.errors import UserError
from qexp.engine.transforming import transform_model
from qexp.kernels.range_codes import decode_range, encode_range, fake_range
from qexp.models.attention import Door, attention

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "opt")  # grouped queries, QK-norm, soft cap, windows, no rotary
EIGHTS = {"opt": {"num_attention_heads": 3}, "qwen3": {}}  # heads of 8 or 16


def kivi(bits: int = 2, group: int = 4, residual: int = 4, simulate: str = "causal_residual") -> Any:
    return replace(member("kv", "kivi", kv=bits), group=group, residual_tokens=residual, simulate=simulate)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def view_with(family: str, kv: Any, *transforms: str) -> Any:
    view = view_of(family, **EIGHTS.get(family, {"head_dim": 8}))
    transform_model(view, recipe(*transforms), 0)
    for block in range(len(view.blocks)):
        view.door(block).kv = kv
    return view


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [8, 16, 32])
def test_codes_decode_to_what_is_simulated(dtype, bits, group):
    x = drawn(3, 5, 32).to(dtype)
    codes = encode_range(x, bits, group)
    assert torch.equal(decode_range(codes, bits, group, dtype), fake_range(x, bits, group))
    assert (codes.packed.shape[-1], codes.scale.shape[-1]) == (32 * bits // 8, 32 // group)
    assert codes.scale.dtype == codes.low.dtype == torch.float16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_is_half_a_step_and_what_float16_leaves_of_the_range(bits):
    x = 3 * drawn(64, 32) + 10
    lo, hi = x.aminmax(dim=-1, keepdim=True)
    bound = (hi - lo) / (2**bits - 1) / 2 + 2**-10 * (hi - lo) + 2**-11 * lo.abs()
    assert ((fake_range(x, bits, 32) - x).abs() <= bound).all()


def test_constant_groups_come_out_as_they_are_and_broken_ones_as_nan():
    x = drawn(4, 8)
    x[0], x[1], x[2, 3], x[3, 0] = 0.0, 1.5, torch.nan, torch.inf
    got = fake_range(x, 2, 8)
    assert torch.equal(got[:2], x[:2]) and got[2:].isnan().all()
    assert decode_range(encode_range(x, 2, 8), 2, 8, x.dtype)[2:].isnan().all()
    assert distance(fake_range(torch.full((1, 8), 0.1), 2, 8), torch.tensor(0.1)) < 2**-11


def test_gradients_pass_straight_through():
    x = drawn(2, 16).requires_grad_()
    fake_range(x, 4, 8).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 1


def test_keys_share_a_scale_along_tokens_and_values_along_the_head():
    kv, k, v = kivi(group=8, residual=8), drawn(1, 2, 21, 16), drawn(1, 2, 21, 16, seed=1)
    k_hat, v_hat = kv(k, v)
    columns = k_hat[:, :, :16].unflatten(2, (2, 8)).transpose(-1, -2).reshape(-1, 8)
    assert max(len(row.unique()) for row in columns) <= 4
    assert max(len(row.unique()) for row in v_hat.reshape(-1, 8)) <= 4
    assert torch.equal(k_hat[:, :, 16:], k[:, :, 16:]), "a group that is not complete is not quantized"


def test_channels_far_from_zero_are_better_off_per_channel():
    k = torch.randn(1, 2, 128, 32, generator=torch.Generator().manual_seed(0))
    k[..., 3], k[..., 19] = k[..., 3] + 20, k[..., 19] - 15
    per_channel, per_token, turn = member("kv", "kivi", kv=4), member("kv", "per_head", kv=4), walsh(32)
    errors = [per_channel(k, k)[0] - k, per_token(k @ turn, k)[0] @ turn.T - k, per_token(k, k)[0] - k]
    assert float(errors[0].norm()) < float(errors[1].norm()) < float(errors[2].norm())


def walsh(size: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two."""
    half = torch.ones(1, 1) if size == 1 else walsh(size // 2)
    return half if size == 1 else torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)]) / 2**0.5


@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (1, 9), (3, 12)])
def test_the_rule_is_that_of_the_paper(queries, keys):
    k_exact, v_exact = kivi(residual=4).exact(queries, keys, torch.device("cpu"))
    for row, t in enumerate(range(keys - queries, keys)):
        for j in range(t + 1):
            assert bool(k_exact[row, j]) == (j >= t // 4 * 4) and bool(v_exact[row, j]) == (j >= t - 4)
    assert kivi(simulate="all").exact(queries, keys, torch.device("cpu")) is None


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_door_computes_each_query_by_itself(mask, softcap, monkeypatch):
    """Against a loop over queries, each with the keys and values that the rule gives it."""
    S, kv = 19, kivi()
    q, k, v = drawn(2, 4, S, 8), drawn(2, 2, S, 8, seed=1), drawn(2, 2, S, 8, seed=2)
    module = nn.Module()
    module.door, module.num_key_value_groups = Door(kv=kv), 2
    monkeypatch.setattr("qexp.models.plain_attention.SCORES", 2 * 4 * S * 5)
    seen = torch.ones(S, S).tril().bool()[None, None] if mask else None
    got = attention(module, q, k, v, seen, scaling=0.4, softcap=softcap)[0]
    k_hat, v_hat = kv(k, v)
    for t in range(S):
        k_t, v_t = k_hat[:, :, : t + 1].clone(), v_hat[:, :, : t + 1].clone()
        k_t[:, :, t // 4 * 4 :], v_t[:, :, max(0, t - 4) :] = (
            k[:, :, t // 4 * 4 : t + 1],
            v[:, :, max(0, t - 4) : t + 1],
        )
        scores = torch.einsum("bae,bake->bak", q[:, :, t], k_t.repeat_interleave(2, 1)) * 0.4
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        expected = torch.einsum("bak,bake->bae", scores.softmax(-1), v_t.repeat_interleave(2, 1))
        torch.testing.assert_close(got[:, t], expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_residual_as_long_as_the_window_leaves_the_logits_and_a_shorter_one_does_not(family):
    before, ids = logits(view_of(family, **EIGHTS.get(family, {"head_dim": 8})).model), tokens()
    assert distance(logits(view_with(family, kivi(residual=12)).model, ids), before) < 1e-9
    errors = [distance(logits(view_with(family, kivi(bits)).model, ids), before) for bits in (8, 4, 2)]
    assert 0 < errors[0] < errors[1] < errors[2]
    pessimistic = distance(logits(view_with(family, kivi(4, simulate="all")).model, ids), before)
    assert 0 < pessimistic != errors[1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_later_tokens_change_nothing(family):
    view, ids = view_with(family, kivi()), tokens()
    other = torch.cat([ids[:, :7], 3 + ids[:, 7:].flip(1) % 50], dim=1)
    assert distance(logits(view.model, other)[:, :7], logits(view.model, ids)[:, :7]) < 1e-9
    assert distance(logits(view.model, ids[:, :7]), logits(view.model, ids)[:, :7]) < 1e-9


@pytest.mark.parametrize("transforms", [(), ("fold_norm", "hadamard")])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "opt"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(family, transforms):
    view, ids = view_with(family, kivi(), *transforms), tokens(3, 4)
    out = view.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, min_new_tokens=10, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    full = logits(view.model, out.sequences[:, :-1])[:, 3:]
    assert distance(torch.stack(out.logits, 1), full) < 1e-6  # generate returns float32


@torch.no_grad()
def test_a_cache_that_drops_positions_is_refused():
    view, ids = view_with("gemma2", kivi()), tokens(1, 9)
    with pytest.raises(UserError, match=r"sliding windows; need .*; set method/kv=per_head"):
        view.model.generate(ids, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def test_padding_on_the_right_changes_no_real_token():
    view, ids = view_with("llama", kivi()), tokens(2, 8)
    padded = torch.cat([ids, torch.full((2, 7), 2)], 1)
    mask = (padded != 2).long()
    assert distance(logits(view.model, padded, attention_mask=mask)[:, :8], logits(view.model, ids)) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_padding_on_the_left_is_refused(family):
    view, ids = view_with(family, kivi()), tokens(2, 4)
    padded = torch.cat([torch.full((2, 1), 2), ids], 1)
    with pytest.raises(UserError, match="padded on the left; need padding on the right"):
        logits(view.model, padded, attention_mask=(padded != 2).long())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bits": 9}, r"kv\.bits=9; need 2 to 8.*set bits\.kv=4"),
        ({"group": 0}, r"kv\.group=0; .*set method\.kv\.group=32"),
        ({"residual_tokens": 48}, r"kv\.residual_tokens=48 with kv\.group=32; .*residual_tokens=128"),
        ({"residual_tokens": 0}, r"kv\.residual_tokens=0"),
        ({"simulate": "some"}, r"kv\.simulate='some' is unknown.*all, causal_residual"),
    ],
)
def test_wrong_settings(keys, message):
    with pytest.raises(UserError, match=message):
        replace(member("kv", "kivi"), **keys)


def test_a_head_that_the_group_does_not_divide():
    with pytest.raises(UserError, match=r"kv\.group=32 does not divide head_size=80; .*; set method\.kv\.group=16"):
        member("kv", "kivi").cost(80)
