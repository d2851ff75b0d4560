"""The Cayley step against its definition, and what a descent on orthogonal matrices owes (methods/spinquant.md 6)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qexp.core import stiefel
from qexp.core.stiefel import cayley_step, nearest_orthogonal


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(size: int, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(draw(size, size, seed=seed))
    return q


def drift(R: Tensor) -> float:
    return float((R.T @ R - torch.eye(len(R))).abs().max())


@pytest.mark.parametrize("size", [2, 7, 64])
def test_a_step_stays_orthogonal_and_descends(size: int) -> None:
    R, A = turn(size), draw(size, size, seed=1)
    stepped, a = cayley_step(R, A, 1.5)  # the loss is <A, R>
    assert drift(stepped) < 1e-12 and 0 < a <= 1.5
    assert float((A * stepped).sum()) < float((A * R).sum())


def test_the_iterated_step_is_the_solved_one(monkeypatch: pytest.MonkeyPatch) -> None:
    R, G = turn(24), draw(24, 24, seed=1)
    solved, _ = cayley_step(R, G, 1.5)
    monkeypatch.setattr(stiefel, "DIRECT", 1)
    iterated, _ = cayley_step(R, G, 1.5)
    assert float((iterated - solved).abs().max()) < 1e-5


def test_the_rate_is_a_cap() -> None:
    R, G = turn(8), 1e3 * draw(8, 8, seed=1)
    _, a = cayley_step(R, G, 1.5)
    half = R.T @ G
    assert a == pytest.approx(1 / float(((half - half.T) / 2).abs().sum(0).max()), rel=1e-9)
    assert cayley_step(R, 1e-9 * G, 1.5)[1] == 1.5


def test_a_rotation_is_found() -> None:
    """||R A - B A||² falls a hundredfold in a hundred steps of falling rate (the spec's own check: 127 to 0.22)."""
    A, B, R = draw(8, 8, seed=1), turn(8, seed=2), turn(8, seed=3)
    if torch.linalg.det(B) * torch.linalg.det(R) < 0:  # a step cannot leave its component
        B[0] = -B[0]
    first = float(((R - B) @ A).pow(2).sum())
    for step in range(100):
        R, _ = cayley_step(R, 2 * ((R - B) @ A) @ A.T, 1.5 * (1 - step / 100))
    assert float(((R - B) @ A).pow(2).sum()) < first / 100
    assert drift(R) < 1e-10


def test_the_nearest_orthogonal_matrix_repairs_drift() -> None:
    R = turn(16)
    repaired = nearest_orthogonal(R + 1e-3 * draw(16, 16, seed=1))
    assert drift(repaired) < 1e-12 and float((repaired - R).abs().max()) < 1e-2
