"""The compiled products: integers bit for bit, floats within the bounds of kernels.md section 8, on every tier here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from core_alone import ROOT, address, run_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_cases import TIERS, Case, draw, error, forced, tiers
from torch import Tensor

from qexp.kernels import build, int4, matmul

pytestmark = pytest.mark.skipif(not build.load(), reason="no compiled kernels here: no C++ compiler, or it failed")

SIZES = (1, 2, 7, 8, 15, 16, 17, 31, 33, 127, 129, 1000)
BOUNDS = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=tiers())
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param):
        yield request.param


def w4a8(case: Case, dtype: torch.dtype = torch.float32, sums: Tensor | None = None) -> Tensor:
    return matmul.w4a8(case.a, case.a_scale, sums, case.packed("cpu"), case.bias, dtype)


def check(case: Case) -> None:
    """Integers exactly; every output dtype is the fp32 result rounded once; 4-bit activations; float activations."""
    weight, n = case.packed("cpu"), case.q.shape[0]
    assert torch.equal(matmul.w4a8_i32(case.a, weight.w_p, n), case.integers())
    full = w4a8(case)
    assert error(full, case.answer(), case.size()) <= case.bound()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(w4a8(case, dtype), full.to(dtype))
    small = case.a >> 4
    args = (case.a_scale, None, weight, case.bias, torch.float32)
    four = matmul.w4a4(small, *args)
    assert error(four, case.answer(small), case.size(small)) <= case.bound()
    assert torch.equal(four, matmul.w4a4(int4.pack_int4(small), *args))
    check_float(case, weight)


def check_float(case: Case, weight: matmul.W4) -> None:
    x = case.a.float() / 37
    for dtype, bound in BOUNDS.items():
        given = x.to(dtype)
        want = given.double() @ case.weight().T
        size = case.size(given, torch.ones(len(x)))
        assert error(matmul.w4a16(given, weight, None), want, size) <= max(bound, 10 * case.bound())


@pytest.mark.parametrize("k", [s for s in SIZES if s % 2 == 0])
def test_all_sizes(tier: str, k: int) -> None:
    for i, m in enumerate(SIZES[:10]):
        for n in SIZES[i % 3 : 9 : 3]:
            check(draw(m, n, k, 0, bias=n % 2 == 0, seed=m * n))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("k", "group"), [(16, 8), (120, 24), (256, 128), (1000, 40), (2304, 1152), (2048, 2048)])
def test_groups(tier: str, k: int, group: int, asymmetric: bool) -> None:
    for m, n in ((1, 33), (3, 70), (6, 17), (16, 48), (20, 40)):
        check(draw(m, n, k, group, asymmetric=asymmetric, bias=True, seed=m))


def test_many_rows(tier: str) -> None:
    """More than one chunk of rows, and rows that do not fill their blocks."""
    case = draw(530, 40, 64, 32, asymmetric=True)
    check(case)
    one = draw(530, 40, 64, 32, asymmetric=True)
    assert torch.equal(w4a8(case), w4a8(one))


@pytest.mark.parametrize("m", [1, 5, 16, 17, 40])
def test_all_tiers_and_batches_give_the_same_bits(m: int) -> None:
    case = draw(m, 50, 384, 128, asymmetric=True, bias=True)
    found = []
    for name in tiers():
        with forced(name):
            found.append(w4a8(case))
    alone = Case(case.q, case.scale, case.zero, 128, case.a[-1:], case.a_scale[-1:], case.bias)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(w4a8(alone)[0], found[0][-1]), "a row's result must not depend on the rows beside it"


@pytest.mark.parametrize("m", [1, 16, 40])
def test_threads_do_not_matter(tier: str, m: int) -> None:
    case = draw(m, 300, 512, 128, bias=True)
    x = case.a.float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weight = case.packed("cpu")
            parts = w4a8(case), matmul.w4a16(x, weight, None), matmul.w4a8_i32(case.a, weight.w_p, 300).float()
            found.append(torch.cat(parts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("k", [28672, 131064])
def test_extremes(tier: str, k: int, m: int) -> None:
    """All -8 times all -128, then alternating signs: the largest sums there are."""
    q = torch.full((17, k), -8, dtype=torch.int8)
    a = torch.full((m, k), -128, dtype=torch.int8)
    for sign in (1, -1):
        a[:, 1::2] = -128 if sign == 1 else 127
        w_p = int4.prepack_w4(int4.pack_int4(q), torch.ones(17), None, 0, "cpu")[0]
        want = (a.double() @ q.double().T).to(torch.int32)
        assert torch.equal(matmul.w4a8_i32(a, w_p, 17), want)


def test_bad_rows_stay_alone(tier: str) -> None:
    case = draw(20, 33, 64, 16, asymmetric=True, bias=True)
    good = w4a8(case)
    case.a_scale[3], case.a_scale[7] = torch.nan, 0.0
    case.a[7] = 0
    for dtype in BOUNDS:
        bad = w4a8(case, dtype)
        assert bad[3].isnan().all()
        assert torch.equal(bad[7], case.bias.to(dtype))
        rest = [i for i in range(20) if i not in (3, 7)]
        assert torch.equal(bad[rest], good[rest].to(dtype))


@pytest.mark.parametrize("m", [3, 20])
def test_strides_and_offsets(tier: str, m: int) -> None:
    case = draw(m, 33, 64, 16, bias=True)
    want, weight = w4a8(case), case.packed("cpu")

    def product(a: Tensor, s: Tensor = case.a_scale, w: matmul.W4 = weight, bias: Tensor = case.bias) -> Tensor:
        return matmul.w4a8(a, s, None, w, bias, torch.float32)

    wide = torch.zeros(m, 101, dtype=torch.int8)
    wide[:, 3:67] = case.a
    assert torch.equal(product(wide[:, 3:67]), want)
    assert torch.equal(product(case.a.T.contiguous().T), want)
    assert torch.equal(product(case.a.repeat_interleave(2, 0)[::2], case.a_scale.repeat_interleave(2)[::2]), want)
    moved = [torch.cat((part.new_zeros(1), part.flatten()))[1:].reshape(part.shape) for part in weight[:2]]
    assert torch.equal(product(case.a, w=weight._replace(w_p=moved[0], w_s=moved[1])), want)
    assert torch.equal(product(case.a, bias=torch.cat((torch.zeros(1), case.bias))[1:]), want)
    nibbles = int4.pack_int4(case.a >> 4)
    padded = torch.zeros(m, 40, dtype=torch.uint8)
    padded[:, 1:33] = nibbles
    args = (case.a_scale, None, weight, None, torch.float32)
    assert torch.equal(matmul.w4a4(padded[:, 1:33], *args), matmul.w4a4(nibbles, *args))


def test_given_sums_are_used(tier: str) -> None:
    for group in (0, 16):
        case = draw(9, 33, 64, group, asymmetric=True)
        sums = case.a.reshape(9, -1, group or 64).sum(2, dtype=torch.int32)
        assert torch.equal(w4a8(case, sums=sums), w4a8(case))
        assert not torch.equal(w4a8(case, sums=sums + 1), w4a8(case))


def test_outputs_are_written_whole(tier: str) -> None:
    """Freed blocks full of NaN are what the allocator hands out next; none of them may show."""
    for m in (2, 20):
        case = draw(m, 37, 24, 8)
        for _ in range(5):
            poison = torch.full((m, 37), torch.nan)
            del poison
            assert w4a8(case).isfinite().all()


@settings(max_examples=60)
@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([0, 8, 16, 24, 64, 128, 1032]))
    k = group * data.draw(st.integers(1, 6)) if group else 2 * data.draw(st.integers(1, 700))
    m, n = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    asymmetric, bias = data.draw(st.booleans()), data.draw(st.booleans())
    case = draw(m, n, k, group, asymmetric=asymmetric, bias=bias, seed=data.draw(st.integers(0, 99)))
    with forced(data.draw(st.sampled_from(tiers()))):
        check(case)


def test_k_beyond_int32_is_refused() -> None:
    packed = torch.zeros(1, 1 << 20, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"w_q: got K=2097152, expected at most 2097151"):
        int4.prepack_w4(packed, torch.ones(1), None, 0, "cpu")


def test_floors_run(tier: str) -> None:
    done = torch.ops.qexp.floor_dot(torch.empty(0), 10)
    assert int(done[0]) > 0
    assert int(torch.ops.qexp.floor_read(torch.tensor([5, 6] * 40))) == 0


# ---- what only a compiler or a disassembler can show ---------------------------------------------------------------

CORE = ("dispatch", "int4", "prepack", "gemm", "floors")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "address", "thread"])
def test_the_core_alone(mode: str, tmp_path: Path) -> None:
    """csrc/tests/gemm_test.cpp: no torch, guard pages around every buffer, poisoned outputs, every tier of this CPU.

    AVX-VNNI runs as well: its source is compiled a second time with the EVEX encoding of its instruction.
    """
    names = [f"{name}_{tier}" for name in ("gemm", "floors") for tier in (*TIERS, "avx512bf16")]
    core = [path for path in (ROOT / "cpu" / f"{name}.cpp" for name in (*CORE, *names)) if path.exists()]
    words = [] if mode == "plain" else ["short"]
    run_alone(tmp_path, "gemm", core, mode, address if mode == "address" else None, words)
