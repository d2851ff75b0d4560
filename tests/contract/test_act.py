"""What every activation quantizer owes: 16 bits change nothing, and a token's result ignores the other tokens."""

from __future__ import annotations

import pytest
import torch
from stage_members import assert_well_kept, member, names
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.stages import Act
from qexp.core.words import FULL_BITS

every_act = pytest.mark.parametrize("name", names("act"))
quantizers = pytest.mark.parametrize("name", [name for name in names("act") if name != "none"])


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(seed)) + 0.3


def test_all_acts_are_seen():
    assert len(names("act")) >= 4


@every_act
def test_it_is_an_act_and_well_kept(name):
    act = member("act", name)
    assert isinstance(act, Act)
    assert_well_kept("act", name, act)


@every_act
def test_16_bits_is_no_rounding_at_all(name):
    act, x = member("act", name, a=FULL_BITS), tokens()
    assert act.bits == FULL_BITS
    assert act.freeze(None)(x) is x


@quantizers
def test_bits_come_from_the_bits_of_the_run(name):
    errors = []
    for bits in (4, 6, 8):
        act = member("act", name, a=bits)
        assert act.bits == bits
        errors.append(float((act.freeze(None)(tokens()) - tokens()).clamp(-0.5, 0.5).norm()))
    assert errors[0] > errors[1] > errors[2] > 0


@quantizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shape_dtype_and_input_stay(name, dtype):
    x = tokens().to(dtype)
    before = x.clone()
    y = member("act", name).freeze(None)(x)
    assert (y.shape, y.dtype) == (x.shape, dtype) and torch.equal(x, before) and not torch.equal(x, y)


@quantizers
def test_a_token_ignores_the_others(name):
    quantize, x = member("act", name).freeze(None), tokens()
    changed = x.clone()
    changed[0], changed[1, :3], changed[1, 4:] = 100 * tokens(1)[0], torch.nan, 0
    assert torch.equal(quantize(changed)[1, 3], quantize(x)[1, 3])
    assert torch.equal(quantize(changed)[2], quantize(x)[2])


@quantizers
def test_a_token_takes_at_most_2_to_the_bits_values(name):
    y = member("act", name, a=4).freeze(None)(20 * tokens())
    counts = [len(row.unique()) for row in y.reshape(-1, 64)]
    assert 8 < max(counts) <= 16


@quantizers
def test_a_token_of_zeros_stays(name):
    assert (member("act", name).freeze(None)(torch.zeros(2, 64)) == 0).all()


def test_clip_and_symmetry_are_those_of_the_yaml():
    x = torch.linspace(0, 1, 64)
    top = {name: float(member("act", name).freeze(None)(x).max()) for name in names("act")}
    assert top["none"] == 1.0
    assert top["per_token"] == pytest.approx(1.0) and top["per_token_asymmetric"] == pytest.approx(1.0)
    assert top["per_token_clipped"] == pytest.approx(0.9)
    levels = {name: len(member("act", name).freeze(None)(x).unique()) for name in ("per_token", "per_token_asymmetric")}
    assert levels == {"per_token": 8, "per_token_asymmetric": 16}  # a one-sided token leaves half of ±7 idle


@pytest.mark.parametrize(
    ("keys", "message"), [({"bits": 1}, r"set bits\.act=8"), ({"clip": 1.5}, r"method\.act\.clip=1\.0")]
)
def test_settings_that_mean_nothing_are_refused(keys, message):
    with pytest.raises(Exception, match="Error in call to target") as caught:
        member("act", "per_token", **keys)
    assert isinstance(caught.value.__cause__, UserError)
    with pytest.raises(UserError, match=message):
        raise caught.value.__cause__
