"""Rotation and fused quantization: right against float64, one set of bits on every tier, and hard to break."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from core_alone import ROOT, run_alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexp.core.hadamard_matrices import factorize, small_hadamard
from qexp.kernels import build
from qexp.kernels.had_quant import DTYPES, had_quant, had_quant_reference, hadamard, hadamard_reference
from qexp.kernels.hadamard import hadamard_transform, sylvester
from qexp.kernels.pack import unpack_int4

TIERS = ("scalar", "avx2", "avxvnni", "avx512bw", "avx512vnni")
MODEL_SIZES = (11008, 14336, 28672, 13824, 5120, 12288, 8960, 18944, 27648, 4864, 9216)  # kernels.md section 6
SMALL = [(1, 0), (1, 1), (1, 4), (1, 5), (1, 8), (1, 9), (1, 13), (12, 0), (12, 3), (20, 2), (12, 4), (28, 5), (172, 6)]


@pytest.fixture(params=("torch", *TIERS))
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The references, or the compiled kernels on one tier."""
    name: str = request.param
    if name == "torch":
        with references():
            yield name
        return
    if not build.load():
        pytest.skip(f"no compiled kernels: {build.info()['reason']}")
    try:
        build.force_isa(name)
    except ValueError as error:
        pytest.skip(str(error))
    yield name
    build.force_isa(None)


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Send CPU tensors to the references although kernels may be loaded."""
    library = torch.library.Library("qexp", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding is the point
        library.impl("hadamard", hadamard_reference, allow_override=True)
        library.impl("had_quant", had_quant_reference, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def factor(order: int) -> Tensor | None:
    return None if order == 1 else small_hadamard(order)


def composed(size: int) -> tuple[Tensor | None, int]:
    found = factorize(size)
    matrix = None
    for order in found.orders:
        matrix = small_hadamard(order) if matrix is None else torch.kron(matrix, small_hadamard(order))
    return matrix, found.power


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    """The worst row's relative error."""
    norm = want.double().norm(dim=-1).clamp(min=1e-300)
    return float(((got.double() - want.double()).norm(dim=-1) / norm).max())


def codes_of(q: Tensor) -> Tensor:
    return unpack_int4(q) if q.dtype == torch.uint8 else q


# --- the transform


@pytest.mark.parametrize(("order", "power"), SMALL)
def test_transform_is_the_product_with_the_explicit_matrix(tier: str, order: int, power: int) -> None:
    n = order << power
    x = draw(3, n)
    if n <= 1024:
        matrix = sylvester(power) if order == 1 else torch.kron(small_hadamard(order), sylvester(power))
        want = x.double() @ matrix.double().T / math.sqrt(n)
    else:
        want = hadamard_transform(x.double(), [] if order == 1 else [small_hadamard(order)], power)
    assert error(hadamard(x, had_k=factor(order)), want) < 1e-6


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_online_and_offline_rotations_agree_on_every_model_size(size: int) -> None:
    matrix, power = composed(size)
    x, weight = draw(2, size), draw(3, size, seed=1).double()
    rotated = hadamard(x, had_k=matrix)
    offline = hadamard_transform(weight, [] if matrix is None else [matrix], power)
    assert error(rotated.double() @ offline.T, x.double() @ weight.T) < 1e-5
    back = hadamard(rotated, had_k=None if matrix is None else matrix.T.contiguous())
    assert error(back, x) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [4, 32, 96, 384])
def test_blocks_are_rotated_each_by_itself_and_rounded_once(tier: str, block: int, dtype: torch.dtype) -> None:
    x = draw(2, 3, 384, dtype=dtype)
    had_k = small_hadamard(12) if block % 3 == 0 else None
    got = hadamard(x, block=block, had_k=had_k)
    want = hadamard(x.float().reshape(2, 3, -1, block), had_k=had_k).reshape(x.shape).to(dtype)
    assert got.dtype == dtype and torch.equal(got, want)


def test_sixteen_bit_edges_are_rounded_as_torch_rounds(tier: str) -> None:
    edges = [65504.0, 65519.0, 65520.0, 1e30, 6e-8, 2.9e-8, 3.1e-5, 1e-40, -0.0, 1.00048828125, 3.4e38, -1e-45]
    x = torch.cat([torch.tensor([*edges, float("inf"), -float("inf"), float("nan")]), draw(49)])
    for dtype in (torch.float16, torch.bfloat16):
        narrow = x.to(dtype)
        got = hadamard(narrow, block=1, scale=1.0)
        assert torch.equal(got.nan_to_num(7.0), narrow.nan_to_num(7.0)) and got.isnan().equal(narrow.isnan())
        scaled = hadamard(narrow, block=1, scale=1 / 3)
        want = (narrow.float() * torch.tensor(1 / 3)).to(dtype)
        assert torch.equal(scaled.nan_to_num(7.0), want.nan_to_num(7.0))


def test_gradient_is_the_transposed_map() -> None:
    had_k = small_hadamard(12)
    assert not torch.equal(had_k, had_k.T)
    x = draw(2, 192).double().float().requires_grad_()
    weight = draw(2, 192, seed=2)
    (grad,) = torch.autograd.grad((hadamard(x, had_k=had_k) * weight).sum(), x)
    assert error(grad, hadamard(weight, had_k=had_k.T.contiguous())) < 1e-7
    twice = torch.autograd.grad(hadamard(x, had_k=had_k).pow(2).sum(), x)[0]
    assert error(twice, 2 * x.detach()) < 1e-6


# --- the quantizer


def test_every_tier_returns_the_reference_bits(tier: str) -> None:
    for order, power in SMALL:
        n = order << power
        x = draw(5, n, seed=order + power, dtype=DTYPES[power % 3])
        for bits, container8, group, sum_group, clip, rotate in (
            (4, False, 0, 0, 1.0, True),
            (8, False, n // 2 or 1, n, 0.9, True),
            (4, True, n, n // 2 or 1, 0.5, False),
            (8, True, 0, n // 4 or 1, 1.0, True),
        ):
            if n % 2 and bits == 4 and not container8:
                continue
            arguments = (x, bits, 0, rotate, clip, group, factor(order), container8, sum_group)
            for got, want in zip(torch.ops.qexp.had_quant(*arguments), had_quant_reference(*arguments), strict=True):
                assert got.dtype == want.dtype and torch.equal(got, want), (n, bits, group, sum_group, clip, rotate)


@pytest.mark.parametrize(("bits", "top"), [(4, 7), (8, 127)])
def test_ties_go_to_even_and_the_lowest_code_is_reachable(tier: str, bits: int, top: int) -> None:
    steps = torch.tensor([float(top), 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999998, 0.0, -float(top)]).repeat(8)[:64]
    made = had_quant(steps[None], bits, rotate=False, container8=True)
    assert made.scale.item() == 1.0
    assert made.q[0, :10].tolist() == [top, 0, 2, 2, 0, -2, -2, 3, 0, -top]
    clipped = had_quant(steps[None], bits, rotate=False, container8=True, clip=0.5)
    assert clipped.q.min() == -top - 1 and clipped.q.max() == top
    assert made.sums.item() == int(made.q.int().sum())


@pytest.mark.parametrize("clip", [1.0, 1e-6])
def test_extreme_magnitudes(tier: str, clip: float) -> None:
    for largest in (3.4e38, 1.2e-38, 1e-39, 1e-44, 1.4e-45):
        x = torch.zeros(2, 64)
        x[0, 3], x[0, 4], x[1, 0] = largest, -largest, 1.0
        made = had_quant(x, 4, rotate=False, container8=True, clip=clip)
        back = made.q[0] * made.scale[0]
        assert made.scale[0] > 0 and made.scale.isfinite().all()
        # The smallest scale is the least normal float: below that a step is all the error there may be.
        assert clip < 1 or (back.double() - x[0].double()).abs().max() <= 0.51 * made.scale[0].double()
        assert made.q[1, 0] == (7 if clip <= 1 else 0)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_zero_rows_are_zero_and_bad_rows_hurt_no_other(tier: str, bad: float, rotate: bool) -> None:
    for n in (24, 256, 1024):
        had_k = small_hadamard(12) if n == 24 else None
        x = draw(4, n)
        x[2] = 0
        clean = had_quant(x, 4, rotate=rotate, had_k=had_k)
        x[1, n - 1] = bad
        made = had_quant(x, 4, rotate=rotate, had_k=had_k)
        assert made.scale[1].isnan() and not codes_of(made.q[1]).any() and made.sums[1] == 0
        assert made.scale[2] == 0 and not made.q[2].any()
        for got, want in zip(made, clean, strict=True):
            assert torch.equal(got[[0, 3]], want[[0, 3]])


@pytest.mark.parametrize("size", [128, 4096, 14336])
def test_rotated_codes_differ_from_float64_only_at_ties(size: int) -> None:
    matrix, power = composed(size)
    x = draw(8, size, dtype=torch.bfloat16)
    made = had_quant(x, 4, had_k=matrix)
    exact = hadamard_transform(x.double(), [] if matrix is None else [matrix], power)
    steps = exact / (exact.abs().amax(-1, keepdim=True) / 7)
    away = (codes_of(made.q) - steps.round().clamp(-8, 7)).abs()
    tie = ((steps - steps.floor()) - 0.5).abs() < 1e-3
    assert away.max() <= 1 and not (away.bool() & ~tie).any()


def test_groups_blocks_and_sums(tier: str) -> None:
    x = draw(3, 2, 512)
    made = had_quant(x, 8, block=128, group=64, sum_group=32, clip=0.9)
    assert made.q.shape == (6, 512) and made.scale.shape == (6, 8) and made.sums.shape == (6, 16)
    assert torch.equal(made.sums, made.q.view(6, 16, 32).sum(-1, dtype=torch.int32))
    rotated = hadamard(x, block=128).reshape(6, 8, 64)
    torch.testing.assert_close(made.scale, rotated.abs().amax(-1) * 0.9 / 127)
    back = made.q.view(6, 8, 64) * made.scale[..., None]
    limit = rotated.abs().amax(-1, keepdim=True) * 0.9
    inside = rotated.abs() <= limit
    assert ((back - rotated).abs() <= 0.51 * made.scale[..., None])[inside].all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    order = data.draw(st.sampled_from([1, 1, 1, 2, 3, 7, 12, 20, 28, 66, 130]))  # any signs will do, Hadamard or not
    block = order << data.draw(st.integers(0, 6))
    n = block * data.draw(st.integers(1, 5 if order < 60 else 1))
    shape = (*data.draw(st.lists(st.integers(0, 4), max_size=3)), n)
    x = draw(math.prod(shape) + 1, seed=n).to(data.draw(st.sampled_from(DTYPES)))[1:].reshape(shape)  # off alignment
    if x.dim() > 2 and data.draw(st.booleans()):
        x = x.transpose(0, 1)
    if data.draw(st.booleans()):
        x = torch.cat([x, x], dim=-1)[..., :n]
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    bits, container8 = data.draw(st.sampled_from([4, 8])), data.draw(st.booleans()) or n % 2 == 1
    group, sum_group = (data.draw(st.sampled_from([0, *divisors])) for _ in range(2))
    clip, rotate = data.draw(st.sampled_from([1.0, 0.9, 0.01])), data.draw(st.booleans())
    signs = torch.randint(0, 2, (order, order), generator=torch.Generator().manual_seed(n), dtype=torch.int8) * 2 - 1
    had_k = None if order == 1 else signs
    arguments = (x, bits, block, rotate, clip, group, had_k, container8, sum_group)
    for got, want in zip(torch.ops.qexp.had_quant(*arguments), had_quant_reference(*arguments), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)
    plain = (x, block, 0.5, had_k)
    assert torch.equal(torch.ops.qexp.hadamard(*plain), hadamard_reference(*plain))


def test_results_do_not_depend_on_threads() -> None:
    x, before = draw(1000, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = had_quant(x, 4)
        torch.set_num_threads(2)
        many = had_quant(x, 4)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, many, strict=True))


# --- torch


@pytest.mark.parametrize("rotate", [True, False])
def test_operators_pass_torchs_own_checks(rotate: bool) -> None:
    had_k = small_hadamard(12)
    torch.library.opcheck(torch.ops.qexp.hadamard.default, (draw(2, 96).requires_grad_(), 0, 0.5, had_k))
    arguments = (draw(2, 3, 96).transpose(0, 1), 4, 48, rotate, 0.9, 48, had_k, False, 0)
    torch.library.opcheck(torch.ops.qexp.had_quant.default, arguments)


def test_compiles_into_one_graph() -> None:
    def layer(x: Tensor) -> Tensor:
        made = had_quant(hadamard(x), 8)
        return made.q * made.scale[:, None]

    x = draw(4, 64)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x: got .*float16"),
        ({"x": torch.tensor(1.0)}, r"x: got shape .*expected \[\.\.\., n\]"),
        ({"x": torch.zeros(2, 11)}, "had_k: got order 1 for width 11.*multiple of 11"),
        ({"x": torch.zeros(2, 64, requires_grad=True)}, "requires"),
        ({"bits": 3}, "bits: got 3, expected 4 or 8"),
        ({"block": 48}, "block: got 48, expected 0 or a divisor of n=64"),
        ({"block": -1}, "block: got -1"),
        ({"clip": 0.0}, r"clip: got 0.*expected a number in \(0, 1\]"),
        ({"group": 5}, "group: got 5, expected 0 or a divisor"),
        ({"sum_group": -64}, "sum_group: got -64"),
        ({"had_k": torch.ones(3, 4, dtype=torch.int8)}, "had_k: got shape"),
        ({"had_k": torch.ones(1, 1, dtype=torch.int8)}, "had_k: got shape"),
        ({"had_k": torch.ones(4, 4)}, "had_k"),
        ({"had_k": torch.zeros(4, 4, dtype=torch.int8)}, "had_k: got other entries"),
        ({"had_k": torch.ones(12, 12, dtype=torch.int8)}, "had_k: got order 12 for width 64"),
        ({"x": torch.zeros(2, 1), "block": 1}, "even n to pack nibbles"),
    ],
)
def test_wrong_input_is_told_by_name(tier: str, change: dict[str, object], message: str) -> None:
    arguments = {"x": draw(2, 64), "bits": 4, **change}
    with pytest.raises(RuntimeError, match=message):
        had_quant(**arguments)  # type: ignore[arg-type]


def test_no_rows_are_no_trouble(tier: str) -> None:
    made = had_quant(torch.zeros(0, 3, 64), 4, group=32)
    assert made.q.shape == (0, 32) and made.scale.shape == (0, 2) and made.sums.shape == (0, 1)
    assert hadamard(torch.zeros(2, 0, 64)).shape == (2, 0, 64)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "address"])
def test_the_core_alone(mode: str, tmp_path: Path) -> None:
    """csrc/tests/rows_test.cpp: no torch, guard pages around every buffer, poisoned outputs, every tier of this CPU."""
    if not build.load():
        pytest.skip(f"no compiled kernels: {build.info()['reason']}")
    names = ["dispatch", *(f"{name}{tier}" for name in ("hadamard", "codes") for tier in ("", "_scalar", "_avx2"))]
    names += ["hadamard_avx512bw", "codes_avx512bw"]
    run_alone(tmp_path, "rows", [ROOT / "cpu" / f"{name}.cpp" for name in names], mode)
