"""Linear maps are linear, keep inner products together with their duals, and survive being saved."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qexp.core.compound_maps import AcrossHeads, Chain, HeadMaps, PerHead, map_from_state
from qexp.core.hadamard import Hadamard, hadamard_from_state, randomized_hadamard
from qexp.core.maps import Dense, Diagonal, Kronecker, LinearMap, Permutation


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def invertible(size: int, seed: int) -> Dense:
    a = torch.eye(size).double() + 0.1 * draw(size, size, seed=seed)
    return Dense(a, torch.linalg.inv(a))


def maps() -> dict[str, LinearMap]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hadamard": Hadamard(24, None),
        "randomized": randomized_hadamard(24, generator),
        "fallback": randomized_hadamard(14, generator),
        "diagonal": Diagonal(draw(24).exp()),
        "dense": invertible(24, 1),
        "permutation": Permutation(torch.randperm(24, generator=generator)),
        "kronecker": Kronecker(invertible(4, 8), invertible(6, 9)),
        "per_head": PerHead(invertible(6, 2), 4),
        "across_heads": AcrossHeads(invertible(4, 3), 6),
        "head_diagonals": HeadMaps(draw(4, 6, seed=8).exp()),
        "head_matrices": HeadMaps(torch.eye(6).double() + 0.1 * draw(4, 6, 6, seed=9)),
        "full_from_parts": Chain((AcrossHeads(Hadamard(12, None), 2), PerHead(Hadamard(2, None), 12))),
        "chain": Chain((Diagonal(draw(24, seed=4).exp()), invertible(24, 5), randomized_hadamard(24, generator))),
    }


@pytest.mark.parametrize("name", maps())
def test_maps_are_linear_and_their_duals_keep_inner_products(name: str) -> None:
    m = maps()[name]
    x, w = draw(2, 3, m.size, seed=6), draw(5, m.size, seed=7)
    a = m.apply(torch.eye(m.size).double())
    torch.testing.assert_close(m.apply(x), x @ a, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.undual(w), w @ a.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.dual(w) @ a.T, w, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.undual(m.dual(w)), w, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.apply(x) @ m.dual(w).T, x @ w.T, rtol=0, atol=2e-12)


@pytest.mark.parametrize("name", maps())
def test_maps_survive_being_saved(name: str) -> None:
    m = maps()[name]
    kind, tensors, numbers = m.state()
    assert all(isinstance(tensor, Tensor) and tensor.is_contiguous() for tensor in tensors.values())
    back, x = map_from_state(kind, tensors, numbers), draw(3, m.size)
    assert back.size == m.size and back.state()[2] == numbers
    assert torch.equal(back.apply(x), m.apply(x))
    torch.testing.assert_close(back.dual(x), m.dual(x), rtol=0, atol=1e-12)  # inverses are not saved


@pytest.mark.parametrize("name", maps())
def test_maps_keep_the_dtype_and_work_in_float32_below(name: str) -> None:
    m = maps()[name]
    x = draw(2, m.size, seed=8).bfloat16()
    for act in (m.apply, m.dual, m.undual):
        assert act(x).dtype == torch.bfloat16 and act(x.float()).dtype == torch.float32
    if not isinstance(m, Chain):  # a chain rounds between its maps
        torch.testing.assert_close(m.apply(x), m.apply(x.float()).bfloat16(), rtol=0, atol=0)


def test_cross_head_and_per_head_transforms_make_the_full_one() -> None:
    x = draw(3, 24)
    h12, h2 = (Hadamard(size, None).undual(torch.eye(size).double()) for size in (12, 2))  # H / sqrt(size)
    full = torch.kron(h12, h2)
    torch.testing.assert_close(maps()["full_from_parts"].apply(x), x @ full.T, rtol=0, atol=1e-12)
    assert not torch.equal(h12, h12.T) and h12[0, 0].item() == pytest.approx(1 / math.sqrt(12))


def test_a_head_map_serves_writers_and_readers_of_different_head_counts() -> None:
    m = PerHead(invertible(6, 2), 4)
    x = draw(3, 12)
    torch.testing.assert_close(m.apply(x).view(3, 2, 6), m.inner.apply(x.view(3, 2, 6)), rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: AcrossHeads(m, 2), lambda m: PerHead(m, 2)])
def test_learned_maps_are_never_stale(wrap: Callable[[LinearMap], LinearMap]) -> None:
    a = torch.ones(4, requires_grad=True)
    m = wrap(Diagonal(a))
    x = draw(1, m.size)
    with torch.no_grad():
        m.apply(x)  # an evaluation before the step must leave nothing behind
    m.apply(x).sum().backward()
    assert a.grad is not None and a.grad.sum().item() == pytest.approx(x.sum().item())
    with torch.no_grad():
        a.mul_(2)
        torch.testing.assert_close(m.apply(x), 2 * x, rtol=0, atol=0)
        torch.testing.assert_close(m.dual(x), x / 2, rtol=0, atol=0)


@pytest.mark.parametrize("name", maps())
def test_maps_first_used_while_evaluating_can_be_trained_through_later(name: str) -> None:
    m = maps()[name]
    x = draw(2, m.size)
    with torch.inference_mode():
        expected = m.apply(x)
    x.requires_grad_()
    y = m.apply(x)
    torch.testing.assert_close(y.detach(), expected.clone(), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(grad, m.undual(torch.ones_like(grad)), rtol=1e-4, atol=1e-4)


def test_saved_maps_that_would_change_meaning_are_refused() -> None:
    _, tensors, numbers = Hadamard(768, None).state()
    with pytest.raises(ValueError, match="768"):
        hadamard_from_state(tensors, {**numbers, "composition": "48 x 2^4"})
    with pytest.raises(ValueError, match="unknown kind"):
        map_from_state("spiral", {}, {})
    with pytest.raises(ValueError, match="sizes"):
        Chain((Hadamard(4, None), Hadamard(8, None)))


def test_a_kronecker_map_is_the_kronecker_product() -> None:
    left, right, x = invertible(4, 8), invertible(6, 9), draw(3, 24)
    torch.testing.assert_close(Kronecker(left, right).apply(x), x @ torch.kron(left.a, right.a), rtol=0, atol=1e-12)
