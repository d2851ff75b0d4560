"""What every KV quantizer owes: causality, ranges for keys and values apart, a cost that counts scales and zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stage_members import assert_well_kept, member, names
from torch import Tensor, nn

from qexp.core.errors import UserError
from qexp.core.kv_forms import ResidualKv
from qexp.core.stages import Kv
from qexp.core.words import FULL_BITS
from qexp.models.attention import Door, attention

every_kv = pytest.mark.parametrize("name", names("kv"))
quantizers = pytest.mark.parametrize("name", [name for name in names("kv") if name != "none"])


S, MIDDLE = 75, 37  # positions, and one inside a group of tokens


def heads(seed: int = 0) -> Tensor:
    """Keys or values [B, A, S, E], off centre as keys are."""
    return torch.randn(2, 3, S, 32, generator=torch.Generator().manual_seed(seed)) + 1.5


def attended(kv: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what attention answers behind the door, [B, S, A, E]."""
    module = nn.Module()
    module.door = Door(kv=kv)
    return attention(module, q, k, v, None, scaling=0.2)[0]


def small(kv: Any) -> Any:
    """Return the quantizer with a residual short enough for ``S`` positions to pass it."""
    return replace(kv, residual_tokens=kv.group) if isinstance(kv, ResidualKv) else kv


def test_all_kvs_are_seen():
    assert len(names("kv")) >= 4


@every_kv
def test_it_is_a_kv_and_well_kept(name):
    kv = member("kv", name)
    assert isinstance(kv, Kv)
    assert_well_kept("kv", name, kv)


@every_kv
def test_16_bits_is_no_rounding_at_all(name):
    kv, k, v = member("kv", name, kv=FULL_BITS), heads(0), heads(1)
    assert kv.bits == FULL_BITS and kv.cost(128) == 16
    assert all(got is given for got, given in zip(kv(k, v), (k, v), strict=True))


@quantizers
def test_both_are_quantized_each_by_its_own_range(name):
    kv, k, v = member("kv", name, kv=4), heads(0), 10 * heads(1)
    k_hat, v_hat = kv(k, v)
    assert (k_hat.shape, k_hat.dtype, v_hat.shape) == (k.shape, k.dtype, v.shape)
    assert not torch.equal(k_hat, k) and not torch.equal(v_hat, v)
    assert torch.equal(kv(k, v / 3)[0], k_hat) and torch.equal(kv(k / 3, v)[1], v_hat)
    assert torch.equal(k, heads(0)) and torch.equal(v, 10 * heads(1))


@every_kv
def test_a_position_ignores_later_ones(name):
    """In what attention answers, whichever positions a range is taken over."""
    kv, q, k, v = small(member("kv", name, kv=2)), heads(2) - 1.5, heads(0), heads(1)
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, MIDDLE:], later_v[:, :, MIDDLE:] = 99.0, 1e4
    full, changed = attended(kv, q, k, v), attended(kv, q, later_k, later_v)
    prefix = attended(kv, *(x[:, :, :MIDDLE] for x in (q, k, v)))
    torch.testing.assert_close(full[:, :MIDDLE], changed[:, :MIDDLE])
    torch.testing.assert_close(full[:, :MIDDLE], prefix)
    assert name == "none" or not torch.allclose(full, attended(None, q, k, v), atol=1e-2)


@pytest.mark.parametrize("name", [name for name in names("kv") if not isinstance(member("kv", name), ResidualKv)])
def test_without_a_residual_each_position_is_quantized_by_itself(name):
    kv, k, v = member("kv", name), heads(0), heads(1)
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, MIDDLE:], later_v[:, :, MIDDLE:] = 99.0, torch.nan
    prefix = kv(k[:, :, :MIDDLE], v[:, :, :MIDDLE])
    for full, changed, short in zip(kv(k, v), kv(later_k, later_v), prefix, strict=True):
        assert torch.equal(full[:, :, :MIDDLE], changed[:, :, :MIDDLE])
        assert torch.equal(full[:, :, :MIDDLE], short)


@quantizers
def test_a_group_takes_at_most_2_to_the_bits_values_and_more_bits_are_closer(name):
    errors = []
    for bits in (2, 3, 4, 8):
        k_hat, v_hat = member("kv", name, kv=bits)(heads(), heads())
        assert max(len(row.unique()) for row in v_hat.reshape(-1, 32)) <= 2**bits
        errors.append([float((k_hat - heads()).norm()), float((v_hat - heads()).norm())])
    assert all(list(one) == sorted(one, reverse=True) for one in zip(*errors, strict=True))


@quantizers
def test_error_is_half_a_step_inside_the_clipped_range(name):
    kv, v = member("kv", name, kv=4), heads()
    _, v_hat = kv(v, v)
    clip = getattr(kv, "clip", 1.0)
    lo, hi = v.aminmax(dim=-1, keepdim=True)
    step = clip * (hi - lo) / 15
    inside = v.clamp(clip * lo + step, clip * hi - step) == v
    assert inside.float().mean() > 0.5
    slack = 0.5001 if hasattr(kv, "clip") else 0.51  # a scale in float16
    assert ((v_hat - v).abs() <= step * slack)[inside].all()


@quantizers
def test_groups_of_a_head_have_their_own_range(name):
    whole, halves = member("kv", name), member("kv", name, group=16)
    v = heads()
    v[..., 16:] *= 100
    assert (halves(v, v)[1] - v)[..., :16].norm() < 0.1 * (whole(v, v)[1] - v)[..., :16].norm()
    with pytest.raises(UserError, match=r"kv\.group=24.* set method\.kv\."):
        replace(member("kv", name), group=24)(v, v)


@pytest.mark.parametrize("name", names("kv"))
def test_cost_is_never_below_the_bits_of_a_code(name):
    assert member("kv", name, kv=3).cost(64) >= min(3, member("kv", name, kv=3).bits)


@pytest.mark.parametrize(
    ("keys", "head_size", "expected"),
    [({}, 128, 4.25), ({"group": 32}, 128, 5.0), ({"symmetric": True}, 128, 4.125), ({}, 64, 4.5)],
)
def test_cost_counts_scales_and_zeros(keys, head_size, expected):
    assert member("kv", "per_head", kv=4, **keys).cost(head_size) == expected


@pytest.mark.parametrize(("bits", "group", "expected"), [(2, 32, 3.0), (4, 32, 5.0), (4, 128, 4.25)])
def test_cost_of_kivi_counts_scales_and_minima(bits, group, expected):
    assert member("kv", "kivi", kv=bits, group=group).cost(128) == expected


def test_clip_is_that_of_the_yaml():
    assert {name: member("kv", name).clip for name in names("kv") if name.startswith("per_head")} == {
        "per_head": 1.0,
        "per_head_clipped": 0.95,
    }
