"""Columns rounded in turn: every compiled tier and the reference against the plain formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qexp.kernels import build
from qexp.kernels.sweep import sweep_columns, sweep_columns_reference

TIERS = ("avx512bw", "avx2", "scalar")


@pytest.fixture(params=[*TIERS, "reference"])
def sweep(request: pytest.FixtureRequest) -> Iterator[object]:
    """The function under test: the operator with a tier forced, or the reference."""
    if request.param == "reference":
        yield sweep_columns_reference
        return
    if not build.load():
        pytest.skip(f"no compiled kernels: {build.info()['reason']}")
    try:
        build.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield sweep_columns
    build.force_isa(None)


def case(columns: int, rows: int, top: int) -> list[Tensor]:
    """T, E, M, scale, zero: as in the middle of a sweep, where targets are no longer the weights."""
    draw = torch.Generator().manual_seed(columns * 1000 + rows + top)
    W = torch.randn(columns, rows, generator=draw)
    T = W + 0.1 * torch.randn(columns, rows, generator=draw)
    M = torch.randn(columns, columns, generator=draw).mul(0.2).triu(1) + torch.eye(columns)
    scale = torch.rand(columns, rows, generator=draw) * 0.3 + 0.05
    zero = torch.randint(0, top + 1, (columns, rows), generator=draw).float()
    return [T, W.clone(), M, scale, zero]


def by_hand(T: Tensor, E: Tensor, M: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets, codes and errors in float64."""
    T, E, M, scale, zero = (x.double().clone() for x in (T, E, M, scale, zero))
    codes = torch.zeros_like(T)
    for k in range(len(T)):
        codes[k] = ((T[k] / scale[k]).round() + zero[k]).clamp(0, top)
        E[k] -= (codes[k] - zero[k]) * scale[k]
        for later in range(k + 1, len(T)):
            T[later] += M[k, later] * E[k]
    return T, codes, E


@pytest.mark.parametrize("top", [3, 15, 255])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (32, 40), (17, 129), (32, 300), (5, 0)])
def test_it_is_the_formula(sweep, shape: tuple[int, int], top: int) -> None:
    T, E, M, scale, zero = case(*shape, top)
    targets, expected, errors = by_hand(T, E, M, scale, zero, top)
    codes = sweep(T, E, M, scale, zero, top)
    assert codes.dtype == torch.uint8
    tie = ((targets / scale - (targets / scale).floor()) - 0.5).abs() < 1e-3  # float32 may fall on the other side
    same = (codes == expected) | tie
    assert same.all()
    rows = ((codes == expected) & (T - targets).abs().lt(1e-3)).all(0)  # a tie changes its row from there on
    assert rows.float().mean() > 0.9 or not rows.numel()
    assert torch.allclose(E.double()[:, rows], errors[:, rows], atol=1e-4)


def test_parts_of_larger_buffers_are_changed_in_place(sweep) -> None:
    T, E, M, scale, zero = case(8, 50, 15)
    wide_T, wide_E = torch.full((8, 70), 9.0), torch.full((8, 70), 9.0)
    wide_T[:, 10:60], wide_E[:, 10:60] = T, E
    codes = sweep(wide_T[:, 10:60], wide_E[:, 10:60], M.T.contiguous().T, scale, zero, 15)
    assert torch.equal(codes, sweep(T, E, M, scale, zero, 15))
    assert torch.equal(wide_E[:, 10:60], E)
    assert (wide_T[:, :10] == 9).all() and (wide_E[:, 60:] == 9).all()


def test_extreme_targets_clamp(sweep) -> None:
    T = torch.tensor([[1e30, -1e30, 0.0, 2.5, 3.5]])
    codes = sweep(T, torch.zeros(1, 5), torch.ones(1, 1), torch.ones(1, 5), torch.full((1, 5), 8.0), 15)
    assert codes.tolist() == [[15, 0, 8, 10, 12]], "half to even"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({1: torch.zeros(3, 4)}, "error: got"),
        ({2: torch.eye(3)}, "mix: got"),
        ({3: torch.zeros(2, 4, dtype=torch.float64)}, "scale: got"),
        ({5: 256}, "top: got 256"),
    ],
)
def test_it_says_what_it_needs(sweep, change: dict[int, object], complaint: str) -> None:
    arguments = [torch.zeros(2, 4), torch.zeros(2, 4), torch.eye(2), torch.ones(2, 4), torch.zeros(2, 4), 15]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=f"{complaint}.*expected"):
        sweep(*arguments)


def test_the_operator_is_well_defined() -> None:
    torch.library.opcheck(torch.ops.qexp.sweep_columns.default, (*case(4, 24, 15), 15))
