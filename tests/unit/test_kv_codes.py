"""Codes of keys and values: fake quantization in bytes, the same bits on every tier and in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexp.kernels import build
from qexp.kernels.kv_codes import (
    DTYPES,
    Codes,
    dequantize_codes,
    dequantize_codes_reference,
    quantize_codes,
    quantize_codes_reference,
)
from qexp.kernels.pack import unpack_codes
from qexp.kernels.quantize import fake_quantize_groups, fake_quantize_reference

TIERS = ("scalar", "avx2", "avxvnni", "avx512bw", "avx512vnni")


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The compiled kernels on one tier; bit equality with the references is what the tests below ask of each."""
    if not build.load():
        pytest.skip(f"no compiled kernels: {build.info()['reason']}")
    try:
        build.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    build.force_isa(None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hard(d: int, dtype: torch.dtype) -> Tensor:
    """Rows that are zero, constant, far from zero, subnormal, not finite, and near the largest number."""
    x = draw(12, d)
    x[0], x[1], x[2] = 0.0, 3.7, x[2] + 1000
    x[3], x[4] = 1e-40, -x[4].abs() * 1e-4
    x[5, 0], x[6, d - 1], x[7, d // 2] = float("nan"), float("inf"), -float("inf")
    x[8, 0], x[8, 1:] = 1e-45, 0.0
    x[9, 0], x[9, -1] = 3e38, -3e38
    return x.to(dtype)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal bits, any NaN for any NaN, -0 apart from 0."""
    if got.shape != want.shape or got.dtype != want.dtype or not torch.equal(got.isnan(), want.isnan()):
        return False
    number = ~want.isnan()
    return torch.equal(got[number], want[number]) and torch.equal(got[number].signbit(), want[number].signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "group"), [(128, 0), (64, 32), (80, 0), (48, 16), (24, 4)])
@pytest.mark.parametrize("half", [False, True])
def test_codes_are_fake_quantization_in_bytes(tier: str, d: int, group: int, dtype: torch.dtype, half: bool) -> None:
    x = hard(d, dtype)
    for bits in (2, 4, 8):
        for symmetric, clip in ((True, 1.0), (False, 1.0), (True, 0.9), (False, 0.5)):
            made = quantize_codes(x, bits, group=group, symmetric=symmetric, clip=clip, half=half)
            want = Codes(*quantize_codes_reference(x, bits, group, symmetric, clip, half))
            assert torch.equal(made.packed, want.packed)
            assert same(made.scale, want.scale) and torch.equal(made.zero, want.zero)
            back = dequantize_codes(made, bits, group=group, dtype=dtype)
            fake = fake_quantize_groups(x, bits, group or d, symmetric, clip, half)
            assert torch.equal(back.nan_to_num(7.0), fake.nan_to_num(7.0)) and torch.equal(back.isnan(), fake.isnan())
            assert back[5:8].isnan().any(-1).all() and not back[:5].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "group"), [(128, 0), (64, 32), (80, 16), (7, 0), (12, 3)])
def test_fake_quantization_has_the_bits_of_plain_torch(tier: str, d: int, group: int, dtype: torch.dtype) -> None:
    x = hard(d, dtype)
    for bits in (2, 3, 4, 7, 8):
        for symmetric, widen, clip in ((True, True, 1.0), (False, True, 0.9), (False, False, 1.0), (True, False, 0.3)):
            for half in (False, True):
                got = torch.ops.qexp.fake_quantize(x, bits, group, symmetric, widen, clip, half)
                assert same(got, fake_quantize_reference(x, bits, group, symmetric, widen, clip, half))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 4, 8]))
    group = data.draw(st.integers(1, 40)) * 4
    groups = data.draw(st.integers(1, 4)) * (1 + group // 4 % 2)
    shape = (*data.draw(st.lists(st.integers(0, 5), max_size=3)), group * groups)
    values = draw(math.prod(shape) + 1, seed=group)[1:] * 10.0 ** data.draw(st.integers(-42, 38))
    x = values.to(data.draw(st.sampled_from(DTYPES))).reshape(shape)
    if x.dim() > 2 and data.draw(st.booleans()):
        x = x.transpose(0, 1)
    symmetric, clip, half = data.draw(st.booleans()), data.draw(st.floats(0.01, 1.0)), data.draw(st.booleans())
    made = torch.ops.qexp.quantize_codes(x, bits, group, symmetric, clip, half)
    for got, want in zip(made, quantize_codes_reference(x, bits, group, symmetric, clip, half), strict=True):
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and got.dtype == want.dtype
    back = dequantize_codes(Codes(*made), bits, group=group, dtype=x.dtype)
    assert same(back, dequantize_codes_reference(*made, bits, group, x.dtype))
    if half:
        kept = made[0], made[1].half().float(), made[2].half().float()
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(made, kept, strict=True))
    fake = torch.ops.qexp.fake_quantize(x, bits, group, symmetric, False, clip, half)
    assert same(fake, fake_quantize_reference(x, bits, group, symmetric, False, clip, half))


def test_bytes_are_the_dense_packing_and_symmetric_codes_are_centred() -> None:
    x = torch.tensor([[-7.0, 7.0, 0.0, 1.0, 2.5, -0.5, 3.0, -8.0]])
    made = quantize_codes(x, 4, symmetric=True, clip=7 / 8)  # a scale of 1
    assert made.scale.item() == 1 and made.zero.item() == 8
    assert unpack_codes(made.packed, 4, 8).tolist() == [[1, 15, 8, 9, 10, 8, 11, 0]]
    low = quantize_codes(torch.tensor([[1.0, 4.0, 2.0, 3.0, 4.0, 4.0, 1.0, 1.0]]), 2)
    assert low.packed.tolist() == [[0b10_01_11_00, 0b00_00_11_11]] and low.zero.item() == -1


def test_operators_pass_torchs_own_checks_and_compile() -> None:
    x = draw(2, 3, 64).transpose(0, 1)
    torch.library.opcheck(torch.ops.qexp.quantize_codes.default, (x, 4, 32, False, 0.9, True))
    made = quantize_codes(x, 4, group=32)
    torch.library.opcheck(torch.ops.qexp.dequantize_codes.default, (*made, 4, 32, torch.bfloat16))
    torch.library.opcheck(torch.ops.qexp.fake_quantize.default, (x, 4, 32, True, True, 1.0))

    def trip(v: Tensor) -> Tensor:
        return dequantize_codes(quantize_codes(v, 8), 8)

    assert torch.equal(torch.compile(trip, fullgraph=True, backend="aot_eager")(x), trip(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.int8)}, "x: got .*float16"),
        ({"x": torch.zeros(2, 64, requires_grad=True)}, "requires"),
        ({"x": torch.zeros(2, 3), "bits": 4}, "x: got d=3, expected a multiple of 8"),
        ({"bits": 3}, "bits: got 3, expected 2, 4 or 8"),
        ({"group": 5}, "group: got 5, expected 0 or a divisor"),
        ({"clip": 1.5}, "clip: got 1.5"),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_wrong_input_is_told_by_name(compiled: bool, change: dict[str, object], message: str) -> None:
    arguments = {"x": draw(2, 64), "bits": 4, "group": 0, "symmetric": False, "clip": 1.0, **change}
    function = torch.ops.qexp.quantize_codes if compiled else quantize_codes_reference
    with pytest.raises(RuntimeError, match=message):
        function(*arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(2, 32)}, "packed: got"),
        ({"scale": torch.zeros(2, 2)}, "scale: got .*expected"),
        ({"zero": torch.zeros(2, 1, dtype=torch.float64)}, "zero: got"),
        ({"bits": 5}, "bits: got 5"),
        ({"group": 7}, "group: got 7"),
        ({"dtype": torch.float64}, "dtype: got"),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_wrong_codes_are_told_by_name(compiled: bool, change: dict[str, object], message: str) -> None:
    made = quantize_codes(draw(2, 64), 4)
    arguments = {**made._asdict(), "bits": 4, "group": 0, "dtype": torch.float32, **change}
    function = torch.ops.qexp.dequantize_codes if compiled else dequantize_codes_reference
    with pytest.raises(RuntimeError, match=message):
        function(*arguments.values())


def test_nothing_is_no_trouble() -> None:
    made = quantize_codes(torch.zeros(0, 5, 64), 2, group=32)
    assert made.packed.shape == (0, 5, 16) and made.scale.shape == (0, 5, 2)
    assert dequantize_codes(made, 2, group=32).shape == (0, 5, 64)


@pytest.mark.parametrize("symmetric", [True, False])
def test_parameters_in_float16_take_no_gradient_away(symmetric: bool) -> None:
    """A mean over many tokens has gradients that float16 cannot hold."""
    grads = []
    for weight in (1.0, 1e-9):
        x = draw(64, 32).requires_grad_()
        target = fake_quantize_groups(x, 4, 32, symmetric, 1.0, half=True)
        (weight * (target * draw(64, 32, seed=1)).sum()).backward()
        assert x.grad is not None
        grads.append(x.grad / weight)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)
