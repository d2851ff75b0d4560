"""H = XᵀX: the compiled kernel of every tier and the reference against float64."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from core_alone import ROOT, run_alone
from torch import Tensor

from qexp.kernels import build
from qexp.kernels.gram import add_gram, gram__reference, mirrored

TIERS = ("avx512vnni", "avx512bw", "avx2", "scalar")


def moment_by(add: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], Tensor]:
    def moment(X: Tensor) -> Tensor:
        H = torch.full((X.shape[-1], X.shape[-1]), torch.nan, dtype=torch.float64).tril(-1)  # never to be read
        add(H, X)
        return mirrored(H)

    return moment


@pytest.fixture(params=[*TIERS, "reference"])
def moment(request: pytest.FixtureRequest) -> Iterator[Callable[[Tensor], Tensor]]:
    """The second moment by the code under test: the operator with a tier forced, or the reference."""
    if request.param == "reference":
        yield moment_by(gram__reference)
        return
    if not build.load():
        pytest.skip(f"no compiled kernels: {build.info()['reason']}")
    try:
        build.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield moment_by(torch.ops.qexp.gram_)
    build.force_isa(None)


def rows(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens + columns)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (300, 17), (256, 40), (513, 100), (700, 520), (0, 5)])
def test_it_is_the_product(moment, shape: tuple[int, int], dtype: torch.dtype) -> None:
    X = rows(*shape, dtype)
    H, exact = moment(X), X.double().T @ X.double()
    scale = X.double().square().sum(0).sqrt()
    assert H.shape == exact.shape
    assert ((H - exact).abs() <= 3e-6 * scale[:, None] * scale[None, :]).all()


def test_it_is_symmetric_and_the_same_for_any_number_of_threads(moment, request: pytest.FixtureRequest) -> None:
    X, threads = rows(600, 333), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = moment(X)
        torch.set_num_threads(2)
        two = moment(X)
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-4) and torch.equal(one, one.T)
    if build.load() and request.node.callspec.params["moment"] != "reference":
        assert torch.equal(one, two)


def test_a_bad_row_spoils_its_columns_only(moment) -> None:
    X = rows(20, 40)
    X[7, 33] = torch.nan
    bad = moment(X).isnan()
    assert bad[33].all() and bad[:, 33].all() and int(bad.sum()) == 79


def test_views(moment) -> None:
    X = rows(64, 90)[::2, 5:60]
    assert torch.allclose(moment(X), (X.T @ X).double(), atol=1e-4)


def test_sums_add_up(moment) -> None:
    X = rows(90, 50)
    H = torch.zeros(50, 50, dtype=torch.float64)
    for part in X.split(40):
        add_gram(H, part)
    assert torch.allclose(mirrored(H), moment(X), atol=1e-4)


@pytest.mark.parametrize(
    ("H", "x", "named"),
    [
        (torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3), "x"),
        (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.int8), "x"),
        (torch.zeros(4, 4), torch.zeros(3, 4), "sum"),
        (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, 4), "sum"),
        (torch.zeros(4, 8, dtype=torch.float64)[:, ::2], torch.zeros(3, 4), "sum"),
    ],
)
@pytest.mark.parametrize("by", [gram__reference, torch.ops.qexp.gram_], ids=["reference", "operator"])
def test_it_says_what_it_needs(by, H: Tensor, x: Tensor, named: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{named}: got .*expected"):
        by(H, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_any_float_is_taken(dtype: torch.dtype) -> None:
    X, H = rows(50, 30, dtype), torch.zeros(30, 30, dtype=torch.float64)
    add_gram(H, X)
    assert torch.allclose(mirrored(H), X.double().T @ X.double(), atol=1e-4)


def test_the_operator_is_well_defined() -> None:
    torch.library.opcheck(torch.ops.qexp.gram_.default, (torch.zeros(24, 24, dtype=torch.float64), rows(20, 24)))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="links the x86 tiers")
@pytest.mark.parametrize("mode", ["plain", "address", "thread"])
def test_the_core_alone(mode: str, tmp_path: Path) -> None:
    """csrc/tests/sums_test.cpp: no torch, guard pages, loops that split in every way, every tier of this CPU."""
    core = sorted(path for name in ("dispatch", "gram", "sweep") for path in (ROOT / "cpu").glob(f"{name}*.cpp"))
    run_alone(tmp_path, "sums", core, mode)
