"""H = XᵀX: the compiled kernel of every tier and the reference against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qexp.kernels import build
from qexp.kernels.gram import gram, gram_reference

TIERS = ("avx512bw", "avx2", "scalar")


@pytest.fixture(params=[*TIERS, "reference"])
def moment(request: pytest.FixtureRequest) -> Iterator[object]:
    """The function under test: the operator with a tier forced, or the reference."""
    if request.param == "reference":
        yield gram_reference
        return
    if not build.load():
        pytest.skip(f"no compiled kernels: {build.info()['reason']}")
    try:
        build.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield torch.ops.qexp.gram
    build.force_isa(None)


def rows(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens + columns)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (300, 17), (256, 40), (513, 100), (700, 520), (0, 5)])
def test_it_is_the_product(moment, shape: tuple[int, int], dtype: torch.dtype) -> None:
    X = rows(*shape, dtype)
    H, exact = moment(X), X.double().T @ X.double()
    scale = X.double().square().sum(0).sqrt()
    assert H.dtype == torch.float32 and H.shape == exact.shape
    assert ((H - exact).abs() <= 3e-6 * scale[:, None] * scale[None, :]).all()


def test_it_is_symmetric_and_the_same_for_any_number_of_threads(moment) -> None:
    X, threads = rows(600, 333), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = moment(X)
        torch.set_num_threads(2)
        two = moment(X)
    finally:
        torch.set_num_threads(threads)
    if moment is not gram_reference:
        assert torch.equal(one, two) and torch.equal(one, one.T)
    assert torch.allclose(one, one.T, rtol=1e-5, atol=1e-4)


def test_a_bad_row_spoils_its_columns_only(moment) -> None:
    X = rows(20, 40)
    X[7, 33] = torch.nan
    bad = moment(X).isnan()
    assert bad[33].all() and bad[:, 33].all() and int(bad.sum()) == 79


def test_views(moment) -> None:
    X = rows(64, 90)[::2, 5:60]
    assert torch.allclose(moment(X), X.T @ X, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, 4, dtype=torch.int8)])
def test_it_says_what_it_needs(moment, bad: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"x: got .*expected"):
        moment(bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_any_float_is_taken(dtype: torch.dtype) -> None:
    X = rows(50, 30, dtype)
    H = gram(X)
    assert H.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(H.double(), X.double().T @ X.double(), atol=1e-4)


def test_the_operator_is_well_defined() -> None:
    torch.library.opcheck(torch.ops.qexp.gram.default, (rows(20, 24),))
