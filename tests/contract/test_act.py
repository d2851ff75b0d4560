"""What every activation quantizer owes: 16 bits change nothing, and a token's result ignores the other tokens.

A quantizer that cannot keep the latter says so by ``causal = False``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hydra.errors import InstantiationException
from stage_members import assert_well_kept, member, names
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.stages import Act
from qexp.core.words import FULL_BITS

every_act = pytest.mark.parametrize("name", names("act"))
QUANTIZERS = [name for name in names("act") if name != "none"]
CAUSAL = [name for name in QUANTIZERS if getattr(member("act", name), "causal", True)]
quantizers = pytest.mark.parametrize("name", QUANTIZERS)


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(seed)) + 0.3


def frozen(act: Act, x: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return the quantizer of inputs like x."""
    rows = (tokens() if x is None else x).flatten(0, -2).float()
    return act.freeze(act.fit(rows.amin(0), rows.amax(0)) if act.needs else {})


def has(name: str, bits: int) -> bool:
    """Return whether a quantizer has this width."""
    try:
        member("act", name, a=bits)
    except InstantiationException:
        return False
    return True


def test_all_acts_are_seen():
    assert len(names("act")) >= 7
    assert set(QUANTIZERS) - set(CAUSAL) == {"crossquant"}


@every_act
def test_it_is_an_act_and_well_kept(name):
    act = member("act", name)
    assert isinstance(act, Act)
    assert_well_kept("act", name, act)


@every_act
def test_16_bits_is_no_rounding_at_all(name):
    act, x = member("act", name, a=FULL_BITS), tokens()
    assert act.bits == FULL_BITS
    assert act.freeze({})(x) is x


@quantizers
def test_bits_come_from_the_bits_of_the_run(name):
    errors = []
    for bits in (4, 6, 8):
        if not has(name, bits):
            continue
        act = member("act", name, a=bits)
        assert act.bits == bits
        errors.append(float((frozen(act)(tokens()) - tokens()).clamp(-0.5, 0.5).norm()))
    assert errors[0] > errors[-1] > 0
    if not hasattr(act, "elements"):  # e2m3 in blocks is nearer than e4m3: as long a mantissa, nothing cut
        assert errors[0] > errors[1] > errors[2]


@quantizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_shape_dtype_and_input_stay(name, dtype):
    x = tokens().to(dtype)
    before = x.clone()
    y = frozen(member("act", name))(x)
    assert (y.shape, y.dtype) == (x.shape, dtype) and torch.equal(x, before) and not torch.equal(x, y)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_token_ignores_the_others(name):
    quantize, x = frozen(member("act", name)), tokens()
    changed = x.clone()
    changed[0], changed[1, :3], changed[1, 4:] = 100 * tokens(1)[0], torch.nan, 0
    assert torch.equal(quantize(changed)[1, 3], quantize(x)[1, 3])
    assert torch.equal(quantize(changed)[2], quantize(x)[2])


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "crossquant"])
def test_what_shares_a_step_takes_at_most_2_to_the_bits_values(name):
    act = member("act", name, a=4)
    y = frozen(act, 20 * tokens())(20 * tokens())
    group = getattr(act, "group", -1)
    counts = [len(row.unique()) for row in y.reshape(-1, group if group > 0 else 64)]
    assert 8 < max(counts) <= 16


@quantizers
def test_a_token_of_zeros_stays(name):
    assert (frozen(member("act", name))(torch.zeros(2, 64)) == 0).all()
    assert (frozen(member("act", name), torch.zeros(2, 64))(torch.zeros(2, 64)) == 0).all()


def test_clip_and_symmetry_are_those_of_the_yaml():
    x = torch.linspace(0, 1, 64)
    top = {name: float(frozen(member("act", name), x[None])(x).max()) for name in names("act")}
    assert top["none"] == 1.0
    assert top["per_token"] == pytest.approx(1.0) and top["per_token_asymmetric"] == pytest.approx(1.0)
    assert top["per_token_clipped"] == pytest.approx(0.9)
    levels = {name: len(member("act", name).freeze({})(x).unique()) for name in ("per_token", "per_token_asymmetric")}
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


class TestPerTensor:
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_one_grid_for_all_that_was_calibrated(self, symmetric):
        x = tokens()
        act = member("act", "per_tensor", a=4, symmetric=symmetric)
        kept = act.fit(x.flatten(0, 1).amin(0), x.flatten(0, 1).amax(0))
        y = act.freeze(kept)(x)
        assert 8 < len(y.unique()) <= 16
        assert float((y - x).abs().max()) <= float(kept["scale"]) / 2 * (1 + 1e-5)
        assert float(act.freeze(kept)(1000 * x).max()) == pytest.approx(float(y.max()), rel=1e-5)  # clipped

    def test_a_range_without_zero_is_widened_to_it(self):
        act = member("act", "per_tensor", a=8, symmetric=False)
        kept = act.fit(torch.full((4,), 5.0), torch.full((4,), 6.0))
        assert float(kept["scale"]) == pytest.approx(6 / 255) and float(kept["zero"]) == 0


class TestPerGroup:
    def test_groups_ignore_each_other(self):
        quantize, x = member("act", "per_group").freeze({}), tokens()
        loud = x.clone()
        loud[..., :32] *= 1e6
        assert torch.equal(quantize(loud)[..., 32:], quantize(x)[..., 32:])

    def test_a_group_that_does_not_divide_is_refused(self):
        with pytest.raises(UserError, match=r"act\.group=32 does not divide an input of 48 channels"):
            member("act", "per_group").check(48)


class TestCrossQuant:
    """methods/crossquant.md section 6."""

    @pytest.mark.parametrize("bits", [4, 8])
    def test_alpha_1_is_per_token_and_0_per_channel(self, bits):
        x = tokens()
        every_token = member("act", "per_token", a=bits).freeze({})
        assert torch.equal(member("act", "crossquant", a=bits, alpha=1).freeze({})(x), every_token(x))
        by_channel = member("act", "crossquant", a=bits, alpha=0).freeze({})(x)
        assert torch.allclose(by_channel, every_token(x.transpose(1, 2)).transpose(1, 2), atol=1e-6)

    @pytest.mark.parametrize("alpha", [0, 0.15, 0.5, 1])
    def test_no_code_leaves_the_range(self, alpha):
        rng = torch.Generator().manual_seed(3)
        x = torch.randn(2, 40, 24, generator=rng) * torch.randn(24, generator=rng).mul(3).exp()
        y = member("act", "crossquant", a=4, alpha=alpha).freeze({})(x)
        step = x.abs().amax(2, keepdim=True) ** alpha * x.abs().amax(1, keepdim=True) ** (1 - alpha) / 7
        assert float((y / step).abs().max()) <= 7 + 1e-4
        assert float(((y - x).abs() / step).max()) <= 0.5 + 1e-4

    def test_fewer_elements_become_zero_than_per_token(self):
        x = tokens()
        x[..., 5] *= 100
        zeros = [
            float((member("act", name, a=8).freeze({})(x) == 0).float().mean()) for name in ("crossquant", "per_token")
        ]
        assert zeros[0] < zeros[1] / 4

    def test_permuting_tokens_permutes_and_sequences_are_apart(self):
        quantize, x = member("act", "crossquant").freeze({}), tokens()
        assert torch.equal(quantize(x.flip(1)), quantize(x).flip(1))
        assert torch.equal(quantize(x)[:1], quantize(x[:1]))
