"""What every KV quantizer owes: causality, one range per group of a head, and a cost that counts scales and zeros."""

from __future__ import annotations

import pytest
import torch
from stage_members import assert_well_kept, member, names
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.stages import Kv
from qexp.core.words import FULL_BITS

every_kv = pytest.mark.parametrize("name", names("kv"))
quantizers = pytest.mark.parametrize("name", [name for name in names("kv") if name != "none"])


def heads(seed: int = 0) -> Tensor:
    """Keys or values [B, A, S, E], off centre as keys are."""
    return torch.randn(2, 3, 9, 32, generator=torch.Generator().manual_seed(seed)) + 1.5


def test_all_kvs_are_seen():
    assert len(names("kv")) >= 3


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
    torch.testing.assert_close(kv(v, k)[0], v_hat)
    assert torch.equal(k, heads(0)) and torch.equal(v, 10 * heads(1))


@every_kv
def test_a_position_ignores_later_ones(name):
    kv, k, v = member("kv", name), heads(0), heads(1)
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, 5:], later_v[:, :, 5:] = 99.0, torch.nan
    for full, changed, prefix in zip(kv(k, v), kv(later_k, later_v), kv(k[:, :, :5], v[:, :, :5]), strict=True):
        assert torch.equal(full[:, :, :5], changed[:, :, :5])
        assert torch.equal(full[:, :, :5], prefix)


@quantizers
def test_a_group_takes_at_most_2_to_the_bits_values_and_more_bits_are_closer(name):
    errors = []
    for bits in (2, 3, 4, 8):
        k_hat, _ = member("kv", name, kv=bits)(heads(), heads())
        assert max(len(row.unique()) for row in k_hat.reshape(-1, 32)) <= 2**bits
        errors.append(float((k_hat - heads()).norm()))
    assert errors == sorted(errors, reverse=True)


@quantizers
def test_error_is_half_a_step_inside_the_clipped_range(name):
    kv = member("kv", name, kv=4)
    k = heads()
    k_hat, _ = kv(k, k)
    lo, hi = k.aminmax(dim=-1, keepdim=True)
    step = kv.clip * (hi - lo) / 15
    inside = k.clamp(kv.clip * lo + step, kv.clip * hi - step) == k
    assert inside.float().mean() > 0.5
    assert ((k_hat - k).abs() <= step * 0.5001)[inside].all()


@quantizers
def test_groups_of_a_head_have_their_own_range(name):
    whole, halves = member("kv", name), member("kv", name, group=16)
    k = heads()
    k[..., 16:] *= 100
    assert (halves(k, k)[0] - k)[..., :16].norm() < 0.1 * (whole(k, k)[0] - k)[..., :16].norm()
    with pytest.raises(UserError, match=r"kv\.group=24 does not divide head_size=32.*set method\.kv\.group=-1"):
        member("kv", name, group=24)(k, k)


@pytest.mark.parametrize(
    ("keys", "head_size", "expected"),
    [({}, 128, 4.25), ({"group": 32}, 128, 5.0), ({"symmetric": True}, 128, 4.125), ({}, 64, 4.5)],
)
def test_cost_counts_scales_and_zeros(keys, head_size, expected):
    assert member("kv", "per_head", kv=4, **keys).cost(head_size) == expected


def test_clip_is_that_of_the_yaml():
    assert {name: member("kv", name).clip for name in names("kv") if name.startswith("per_head")} == {
        "per_head": 1.0,
        "per_head_clipped": 0.95,
    }
