"""Packing is lossless and laid out as documented; fake quantization is the formula, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexp.kernels import quantize
from qexp.kernels.pack import pack_codes, pack_int4, pack_wide, unpack_codes, unpack_int4, unpack_wide
from qexp.kernels.quantize import fake_quantize_groups, fake_quantize_per_token


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(0, 40), rows=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_codes_survive_packing(bits: int, count: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 2, count), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, 2, -(-count // 8) * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bytes_are_the_little_endian_bit_stream(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (19,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    stream = [(int(code) >> i) & 1 for code in codes for i in range(bits)]
    stream += [0] * (3 * 8 * bits - len(stream))
    expected = np.packbits(np.array(stream, dtype=np.uint8), bitorder="little")
    assert pack_codes(codes, bits).tolist() == expected.tolist()


def test_packing_works_on_strided_input() -> None:
    codes = torch.arange(48, dtype=torch.uint8).reshape(16, 3).T % 8
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, 16), codes)


def test_packing_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="codes reach 8"):
        pack_codes(torch.tensor([0, 8], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="int64"):
        pack_codes(torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="bits=9"):
        pack_codes(torch.tensor([0], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="expected 6"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 3, 9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 62), min_size=1, max_size=3), st.integers(0, 40), st.data())
def test_wide_records_are_one_stream_of_bits(widths: list[int], count: int, data: st.DataObject) -> None:
    records = [[data.draw(st.integers(0, 2**bits - 1)) for bits in widths] for _ in range(count)]
    stream, at = 0, 0
    for value, bits in ((value, bits) for record in records for value, bits in zip(record, widths, strict=True)):
        stream |= value << at
        at += bits
    tensor = torch.tensor(records, dtype=torch.int64).view(count, len(widths))
    packed = pack_wide(tensor, widths)
    assert bytes(packed.tolist()) == stream.to_bytes(-(-at // 8), "little")
    assert torch.equal(unpack_wide(packed, widths, count), tensor)


def test_wide_packing_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="expected 3 unsigned bits"):
        pack_wide(torch.tensor([[8]]), [3])
    with pytest.raises(ValueError, match="codes span -1"):
        pack_wide(torch.tensor([[-1]]), [3])
    with pytest.raises(ValueError, match="1 to 62 bits"):
        pack_wide(torch.tensor([[1]]), [63])
    with pytest.raises(ValueError, match=r"expected torch\.int64"):
        pack_wide(torch.tensor([[1]], dtype=torch.int32), [3])
    with pytest.raises(ValueError, match="expected 2 bytes"):
        unpack_wide(torch.zeros(3, dtype=torch.uint8), [3], 4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-8, 7), st.integers(-8, 7)), min_size=1, max_size=20))
def test_int4_is_two_nibbles_low_first(pairs: list[tuple[int, int]]) -> None:
    q = torch.tensor(pairs, dtype=torch.int8).reshape(-1)
    packed = pack_int4(q)
    assert packed.tolist() == [(low % 16) + 16 * (high % 16) for low, high in pairs]
    assert torch.equal(unpack_int4(packed), q)


def test_int4_refuses_what_it_cannot_hold() -> None:
    for bad in (torch.tensor([8, 0], dtype=torch.int8), torch.tensor([-9, 0], dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"-8\.\.7"):
            pack_int4(bad)
    with pytest.raises(ValueError, match="even"):
        pack_int4(torch.zeros(3, dtype=torch.int8))
    with pytest.raises(ValueError, match="uint8"):
        unpack_int4(torch.zeros(3, dtype=torch.int8))


def by_formula(row: np.ndarray, bits: int, symmetric: bool, clip: float, with_zero: bool) -> np.ndarray:
    """QuaRot's formulas for one row, float64."""
    low, high = float(row.min()), float(row.max())
    if symmetric:
        top = 2 ** (bits - 1) - 1
        s = clip * max(-low, high) / top or 1.0
        return s * np.clip(np.round(row / s), -top - 1, top)
    if with_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    s = clip * (high - low) / (2**bits - 1) or 1.0
    z = np.round(-clip * low / s)
    return s * (np.clip(np.round(row / s) + z, 0, 2**bits - 1) - z)


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fake_quantization_is_the_formula(bits: int, symmetric: bool, clip: float) -> None:
    x = draw(6, 64).double() * torch.tensor([1, 1e-3, 30, 1, 1, 1]).double()[:, None]
    x[3:] += torch.tensor([5.0, -5.0, 0.0])[:, None]  # ranges that do not contain 0
    tokens = fake_quantize_per_token(x.view(2, 3, 64), bits, symmetric, clip).view(6, 64)
    groups = fake_quantize_groups(x.view(2, 3, 64), bits, 16, symmetric, clip).view(24, 16)
    for got, row in zip(tokens, x, strict=True):
        np.testing.assert_allclose(got, by_formula(row.numpy(), bits, symmetric, clip, True), rtol=1e-12, atol=1e-12)
    for got, row in zip(groups, x.view(24, 16), strict=True):
        np.testing.assert_allclose(got, by_formula(row.numpy(), bits, symmetric, clip, False), rtol=1e-12, atol=1e-12)


def test_extremes_and_ties() -> None:
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -7.0]])  # s = 1 exactly: halves go to even
    assert fake_quantize_per_token(x, 4, True, 1.0).tolist() == [[7.0, 0.0, 2.0, 2.0, 0.0, -7.0]]
    clipped = fake_quantize_per_token(torch.tensor([[-10.0, 10.0]]), 4, True, 0.7)
    torch.testing.assert_close(clipped, torch.tensor([[-8.0, 7.0]]))  # code -8 is reachable after clipping


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_zero_and_constant_rows_stay(symmetric: bool, dtype: torch.dtype) -> None:
    zero = torch.zeros(2, 8, dtype=dtype)
    assert torch.equal(fake_quantize_per_token(zero, 4, symmetric, 0.9), zero)
    assert torch.equal(fake_quantize_groups(zero, 4, 4, symmetric, 0.9), zero)
    for value in (0.3, -300.0):
        constant = torch.full((1, 8), value, dtype=dtype)
        torch.testing.assert_close(fake_quantize_groups(constant, 4, 4, symmetric, 1.0), constant)
    tiny = torch.tensor([[0.0, 1e-40]])  # a subnormal maximum must not make 0 * inf
    assert fake_quantize_per_token(tiny, 4, symmetric, 1.0).isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_is_marked_and_hurts_no_other(symmetric: bool, bad: float) -> None:
    x = draw(3, 16)
    good = fake_quantize_per_token(x, 4, symmetric, 0.9)
    x[1, 5] = bad
    got = fake_quantize_per_token(x, 4, symmetric, 0.9)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = draw(4, 64).to(dtype)
    got = fake_quantize_per_token(x, 4, True, 0.9)
    assert got.dtype == dtype
    assert torch.equal(got, fake_quantize_per_token(x.float(), 4, True, 0.9).to(dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_chunks_and_the_input_are_invisible(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(37, 24)
    before, whole = x.clone(), fake_quantize_per_token(x, 4, symmetric, 0.9)
    monkeypatch.setattr(quantize, "CHUNK_ELEMENTS", 100)
    assert torch.equal(fake_quantize_per_token(x, 4, symmetric, 0.9), whole)
    assert torch.equal(x, before)
    assert torch.equal(fake_quantize_per_token(x.T.contiguous().T, 4, symmetric, 0.9), whole)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_pass_straight_through_the_rounding(symmetric: bool) -> None:
    x = draw(4, 32).requires_grad_()
    y = fake_quantize_per_token(x, 4, symmetric, 0.5)
    value = x.detach()
    assert torch.equal(y.detach(), fake_quantize_per_token(value, 4, symmetric, 0.5))
    (grad,) = torch.autograd.grad(y.sum(), x)
    extreme = (value == value.amax(-1, keepdim=True)) | (value == value.amin(-1, keepdim=True))  # these set the scale
    share = value.abs() / value.abs().amax(-1, keepdim=True)
    inside, beyond = ~extreme & (share < 0.25), ~extreme & (share > 0.65)
    assert inside.any() and beyond.any()
    torch.testing.assert_close(grad[inside], torch.ones_like(grad[inside]))
    assert (grad[beyond] == 0).all()


def test_more_bits_give_less_error_and_a_group_must_divide() -> None:
    x = draw(16, 256)
    errors = [float((fake_quantize_groups(x, bits, 64, False, 1.0) - x).norm()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 * errors[0]
    with pytest.raises(ValueError, match="group=100"):
        fake_quantize_groups(x, 4, 100, True, 1.0)


def test_no_tokens_are_no_trouble() -> None:
    assert fake_quantize_per_token(torch.zeros(0, 8), 4, False, 1.0).shape == (0, 8)
