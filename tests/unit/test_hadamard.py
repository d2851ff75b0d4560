"""Hadamard matrices are Hadamard, and the fast transform of every size of a real model equals the dense one."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from qexp.core import hadamard
from qexp.core.finite_field import character, differences, irreducible, prime_power
from qexp.core.hadamard import Hadamard, flatness, randomized_hadamard
from qexp.core.hadamard_matrices import (
    WILLIAMSON,
    constructible,
    dct,
    factorize,
    paley_one,
    paley_two,
    small_hadamard,
    williamson,
)
from qexp.kernels import hadamard as kernel
from qexp.kernels.hadamard import digits, hadamard_transform, inverse_hadamard_transform, sylvester

# hadamard.md section 3: every order that has a direct construction; 40, 156 and composites are products.
ORDERS = (12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 92, 100, 108, 140, 148, 172, 344, 924)
PALEY_ONE = (3, 7, 11, 19, 27, 43, 59, 67, 83, 107, 139, 343)
PALEY_TWO = (5, 9, 13, 17, 25, 29, 37, 41, 49, 53, 73, 461)

# hadamard.md section 4, hidden, intermediate and head sizes with the composition the spec found cheapest.
COMPOSITIONS = {
    **{2**k: f"2^{k}" for k in range(15)},
    **{11008: "172 x 2^6", 5120: "20 x 2^8", 13824: "12 x 12 x 12 x 2^3", 28672: "28 x 2^10", 14336: "28 x 2^9"},
    **{
        3072: "12 x 2^8",
        896: "28 x 2^5",
        4864: "76 x 2^6",
        1536: "12 x 2^7",
        8960: "20 x 28 x 2^4",
        53248: "52 x 2^10",
    },
    **{3584: "28 x 2^7", 18944: "148 x 2^7", 27648: "12 x 12 x 12 x 2^4", 29568: "12 x 28 x 44 x 2^1"},
    **{6144: "12 x 2^9", 12288: "12 x 2^10", 2560: "20 x 2^7", 9728: "76 x 2^7", 17408: "68 x 2^8"},
    **{25600: "20 x 20 x 2^6", 24576: "12 x 2^11", 2304: "12 x 12 x 2^4", 4608: "12 x 12 x 2^5", 9216: "12 x 12 x 2^6"},
    **{36864: "12 x 12 x 2^8", 1152: "12 x 12 x 2^3", 6912: "12 x 12 x 12 x 2^2", 10240: "20 x 2^9"},
    **{3840: "12 x 20 x 2^4", 5376: "12 x 28 x 2^4", 15360: "12 x 20 x 2^6", 21504: "12 x 28 x 2^6"},
    **{
        5632: "44 x 2^7",
        576: "12 x 12 x 2^2",
        960: "12 x 20 x 2^2",
        96: "12 x 2^3",
        768: "12 x 2^6",
        624: "12 x 52 x 2^0",
    },
    **{24: "12 x 2^1", 28: "28 x 2^0", 40: "20 x 2^1", 14: "DCT_7 x 2^1", 9: "DCT_9 x 2^0", 15: "DCT_15 x 2^0"},
}
ASYMMETRIC = 344  # Paley I of GF(343)


def assert_hadamard(matrix: Tensor) -> None:
    order = len(matrix)
    wide = matrix.to(torch.int64)
    assert set(wide.unique().tolist()) <= {-1, 1}
    assert torch.equal(wide @ wide.T, order * torch.eye(order, dtype=torch.int64))


def dense(size: int) -> Tensor:
    """The matrix H of one size as an explicit Kronecker product, float64, H H^T = n I."""
    found = factorize(size)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    parts = [small_hadamard(order) for order in found.orders] + [dct(found.odd), sylvester(found.power)]
    for part in parts:
        matrix = torch.kron(matrix, part.double())
    return matrix


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("order", ORDERS)
def test_small_matrices_are_hadamard(order: int) -> None:
    assert small_hadamard(order).shape == (order, order)
    assert small_hadamard(order).dtype == torch.int8
    assert_hadamard(small_hadamard(order))


@pytest.mark.parametrize("q", PALEY_ONE)
def test_paley_one(q: int) -> None:
    assert_hadamard(paley_one(q))


@pytest.mark.parametrize("q", PALEY_TWO)
def test_paley_two_is_symmetric(q: int) -> None:
    assert_hadamard(paley_two(q))
    assert torch.equal(paley_two(q), paley_two(q).T)


def test_williamson_rows_are_symmetric_and_sum_as_published() -> None:
    for order, orbits in WILLIAMSON.items():
        assert_hadamard(williamson(orbits))
        for signs in orbits.rows:
            row = orbits.row(signs)
            assert torch.equal(row[1:], row[1:].flip(0)) and row[0] == 1
        assert sum(int(orbits.row(signs).sum()) ** 2 for signs in orbits.rows) == order
    assert [int(WILLIAMSON[172].row(signs).sum()) for signs in WILLIAMSON[172].rows] == [7, -5, 7, 7]


@pytest.mark.parametrize("order", [40, 156, 18, 3, 116, 188])
def test_orders_without_a_construction_are_known_as_such(order: int) -> None:
    assert not constructible(order)


@pytest.mark.parametrize("q", [9, 25, 27, 49, 343])
def test_the_character_of_an_extension_field(q: int) -> None:
    chi = character(q)
    assert int(chi.sum()) == 0 and int((chi == 1).sum()) == (q - 1) // 2
    assert chi[1] == 1  # one is a square
    assert int(chi[differences(q, 0)[1]]) == (1 if q % 4 == 1 else -1)  # -1 is a square exactly if q = 1 mod 4


def test_prime_powers_and_irreducible_polynomials() -> None:
    assert [q for q in range(30) if prime_power(q)] == [2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29]
    assert prime_power(343) == (7, 3) and prime_power(12) is None
    assert irreducible(3, 2) == (1, 0, 1)  # x^2 + 1 has no root modulo 3
    with pytest.raises(ValueError, match="q=15"):
        character(15)


@pytest.mark.parametrize("size", sorted(COMPOSITIONS))
def test_sizes_of_real_models_are_composed_as_the_spec_says(size: int) -> None:
    found = factorize(size)
    assert str(found) == COMPOSITIONS[size]
    assert math.prod(found.orders) * found.odd * 2**found.power == size
    for order in found.orders:
        assert_hadamard(small_hadamard(order))


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0"):
        factorize(0)


@pytest.mark.parametrize("power", range(18))
def test_axes_of_a_power_of_two(power: int) -> None:
    assert sum(digits(power)) == power and max(digits(power), default=0) <= 6


@pytest.mark.parametrize("size", [1, 2, 9, 14, 28, 96, 172, 344, 576, 624, 768, 896, 960, 1152, 1536, 2048, 2304, 4096])
def test_the_fast_transform_equals_the_dense_matrix(size: int) -> None:
    x, h = draw(3, size), dense(size)
    expected = x @ h.T / math.sqrt(size)
    torch.testing.assert_close(Hadamard(size, None).apply(x), expected, rtol=0, atol=1e-12)
    got = Hadamard(size, None).apply(x.float())
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("size", [s for s in COMPOSITIONS if 4096 < s <= 30000])
def test_large_transforms_keep_norms_invert_and_spread_a_spike(size: int) -> None:
    rotation, x = randomized_hadamard(size, torch.Generator().manual_seed(1)), draw(2, size)
    x[1] = 0
    x[1, size // 3] = 1.0
    y = rotation.apply(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(rotation.undual(y), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1].abs() * math.sqrt(size), torch.ones(size).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [28, ASYMMETRIC, 172 * 4])
def test_a_linear_layer_is_unchanged_by_matrices_that_are_not_symmetric(size: int) -> None:
    assert not torch.equal(dense(size), dense(size).T)
    rotation, x, w = Hadamard(size, None), draw(5, size), draw(7, size, seed=1)
    torch.testing.assert_close(rotation.apply(x) @ rotation.dual(w).T, x @ w.T, rtol=0, atol=1e-11)
    assert (rotation.apply(rotation.apply(x)) - x).abs().max() > 0.1  # applying twice is no inverse


def test_the_kernel_inverts_and_differentiates_matrices_that_are_not_symmetric() -> None:
    factors, x = [small_hadamard(28), small_hadamard(12)], draw(2, 28 * 12 * 2)
    y = hadamard_transform(x, factors, 1)
    torch.testing.assert_close(inverse_hadamard_transform(y, factors, 1), x, rtol=0, atol=1e-12)
    x.requires_grad_()
    g = draw(2, 28 * 12 * 2, seed=3)
    (grad,) = torch.autograd.grad(hadamard_transform(x, factors, 1), x, g)
    torch.testing.assert_close(grad, inverse_hadamard_transform(g, factors, 1), rtol=0, atol=1e-12)
    small = draw(2, 24).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: hadamard_transform(v, [small_hadamard(12)], 1), small)


def test_the_kernel_refuses_a_wrong_width() -> None:
    with pytest.raises(ValueError, match="23 columns"):
        hadamard_transform(draw(2, 23), [small_hadamard(12)], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_are_rotated_in_float32(dtype: torch.dtype) -> None:
    rotation, x = randomized_hadamard(768, torch.Generator().manual_seed(0)), draw(4, 768).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not reach the matmuls
        got = rotation.apply(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, rotation.apply(x.float()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [960, 14, 256])
def test_matrices_made_while_evaluating_can_be_trained_through_later(size: int) -> None:
    for cached in (small_hadamard, hadamard._factors, kernel._orthonormal_sylvester):
        cached.cache_clear()
    rotation = randomized_hadamard(size, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        rotation.apply(draw(2, size))
    x = draw(2, size).requires_grad_()
    (rotation.apply(x) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("odd", range(3, 232, 2))
def test_the_fallback_is_orthogonal_and_flat(odd: int) -> None:
    matrix = dct(odd)
    torch.testing.assert_close(matrix @ matrix.T, odd * torch.eye(odd).double(), rtol=0, atol=1e-10)
    assert float(matrix.abs().max()) <= math.sqrt(2)


def test_the_fallback_is_announced_each_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qexp"):
        for _ in range(2):  # two runs of one process: both records must have it
            Hadamard(14, None)
    assert [record.getMessage().count("DCT_7 x 2^1") for record in caplog.records] == [1, 1]
    caplog.clear()
    Hadamard(768, None)
    assert not caplog.records
    assert flatness(768) == 1.0 and 1.2 < flatness(14) <= math.sqrt(2)


def test_signs_depend_on_the_seed_only() -> None:
    one, same, other = (randomized_hadamard(64, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert one.signs is not None and same.signs is not None and other.signs is not None
    assert torch.equal(one.signs, same.signs) and not torch.equal(one.signs, other.signs)
    assert set(one.signs.tolist()) == {-1, 1}
    with pytest.raises(ValueError, match=r"\(64,\)"):
        Hadamard(32, one.signs)


def test_signs_keep_the_mean_from_one_coordinate() -> None:
    x = 0.3 + 0.01 * draw(1, 4096)
    assert Hadamard(4096, None).apply(x).abs().max() > 19
    assert randomized_hadamard(4096, torch.Generator().manual_seed(0)).apply(x).abs().max() < 2
