"""GPTQ against methods/gptq.md section 6, against a naive form of itself, and against the official code's answers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qexp.core.errors import NumericalError, UserError
from qexp.core.words import Params, Quantized, Stats
from qexp.kernels.pack import pack_codes, unpack_codes
from qexp.stages.grid.integer import Integer
from qexp.stages.solver._shared import damped
from qexp.stages.solver.gptq import Gptq
from qexp.stages.solver.rtn import Rtn

GOLDEN = Path(__file__).parents[1] / "golden" / "gptq" / "fasterquant.safetensors"
IN_ORDER = Gptq(damp_fraction=0.01, act_order=False, static_groups=True)
ACT_ORDER = replace(IN_ORDER, act_order=True)
DYNAMIC = replace(IN_ORDER, static_groups=False)
GRID = Integer(
    bits=3,
    group=-1,
    symmetry="asymmetric",
    range="minmax",
    clip=1.0,
    shrink_grid=100,
    shrink_steps=80,
    exponent=2.4,
    scale_dtype="float32",
    minmax_roles=(),
)
each_order = pytest.mark.parametrize("solver", [IN_ORDER, ACT_ORDER, DYNAMIC], ids=["in_order", "act_order", "dynamic"])


def layer(outputs: int = 12, inputs: int = 48, seed: int = 0, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs with uneven channels, float64."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    X_TI = draw(tokens, inputs) @ draw(inputs, inputs) * draw(inputs).exp() / inputs**0.5
    return draw(outputs, inputs), X_TI.T @ X_TI / tokens


def solve(solver: Gptq | Rtn, W_OI: Tensor, H_II: Tensor, grid: Integer = GRID) -> Quantized:
    stats = Stats(tokens=1, H_II=H_II, low_I=-H_II[0], high_I=H_II[0], mean_abs_I=H_II[0], rows_TI=H_II)
    return solver.solve(W_OI, stats, grid, torch.Generator())


def weights(quantized: Quantized, grid: Integer = GRID) -> Tensor:
    return grid.decode(quantized.codes, quantized.params)


def proxy_loss(W_OI: Tensor, Q_OI: Tensor, H_II: Tensor) -> float:
    E_OI = (W_OI - Q_OI).double()
    return float((E_OI @ H_II.double() * E_OI).sum())


def optimal_brain_surgeon(
    W_OI: Tensor, H_II: Tensor, grid: Integer, params: Params, block: int
) -> tuple[Tensor, float]:
    """The paper's form: Cholesky of the inverse, weights updated in lazy blocks. Returns codes and sum of e²."""
    U_II = torch.linalg.cholesky(torch.linalg.inv(H_II), upper=True)
    W_OI, errors, codes = W_OI.clone(), torch.zeros_like(W_OI), []
    for start in range(0, W_OI.shape[1], block):
        end = min(start + block, W_OI.shape[1])
        for k in range(start, end):
            codes.append(grid.encode(W_OI[:, k : k + 1], params))
            errors[:, k] = (W_OI[:, k] - grid.decode(codes[-1], params)[:, 0]) / U_II[k, k]
            W_OI[:, k + 1 : end] -= errors[:, k : k + 1] * U_II[k, k + 1 : end]
        W_OI[:, end:] -= errors[:, start:end] @ U_II[start:end, end:]
    return torch.cat(codes, 1), float(errors.square().sum())


@pytest.mark.parametrize("block", [1, 7, 48])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_papers_update_with_any_lazy_block(block, seed):
    W_OI, H_II = layer(seed=seed)
    ours = solve(IN_ORDER, W_OI, H_II)
    codes, squared = optimal_brain_surgeon(W_OI, damped(H_II, 0.01), GRID, ours.params, block)
    assert torch.equal(ours.codes, codes)
    assert proxy_loss(W_OI, weights(ours), damped(H_II, 0.01)) == pytest.approx(squared, rel=1e-9)


def test_dynamic_groups_are_fitted_on_the_papers_current_weights():
    W_OI, H_II = layer()
    grid = replace(GRID, group=16)
    ours = solve(DYNAMIC, W_OI, H_II, grid)
    U_II = torch.linalg.cholesky(torch.linalg.inv(damped(H_II, 0.01)), upper=True)
    current = W_OI.clone()
    for k in range(48):
        if k % 16 == 0:
            params = grid.fit(current[:, k : k + 16], None)
            torch.testing.assert_close(
                params["scale"], ours.params["scale"][:, k // 16 : k // 16 + 1], rtol=1e-9, atol=0
            )
        codes = grid.encode(current[:, k : k + 1], params)
        assert torch.equal(codes, ours.codes[:, k : k + 1])
        error = (current[:, k : k + 1] - grid.decode(codes, params)) / U_II[k, k]
        current[:, k:] -= error * U_II[k, k:]


@each_order
@pytest.mark.parametrize("group", [-1, 16])
def test_a_diagonal_hessian_gives_plain_rounding(solver, group):
    W_OI, _ = layer()
    grid = replace(GRID, group=group)
    for diagonal in (torch.ones(48), torch.rand(48) + 0.1):
        H_II = torch.diag(diagonal.double())
        assert torch.equal(solve(solver, W_OI, H_II, grid).codes, solve(Rtn(), W_OI, H_II, grid).codes)


@each_order
def test_weights_on_the_grid_stay(solver):
    _, H_II = layer()
    grid = replace(GRID, symmetry="restricted", group=16)
    codes = torch.randint(1, 8, (12, 48), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    codes[:, ::16], codes[:, 5::16] = 1, 7  # the extremes ±3 in every group, so that the fit finds the same grid
    W_OI = (codes.double() - 4) * 0.25
    ours = solve(solver, W_OI, H_II, grid)
    assert torch.equal(ours.codes, codes) and torch.equal(weights(ours, grid), W_OI)


@pytest.mark.parametrize("solver", [IN_ORDER, ACT_ORDER], ids=["in_order", "act_order"])
def test_loss_is_below_plain_rounding_on_nearly_every_layer(solver):
    wins = []
    for seed in range(45):
        W_OI, H_II = layer(seed=seed)
        grid = replace(GRID, bits=2 + seed % 3)
        wins.append(
            proxy_loss(W_OI, weights(solve(solver, W_OI, H_II, grid), grid), H_II)
            < proxy_loss(W_OI, weights(solve(Rtn(), W_OI, H_II, grid), grid), H_II)
        )
    assert sum(wins) >= 0.95 * len(wins)


@each_order
def test_rows_are_independent_and_the_scale_of_the_hessian_does_not_matter(solver):
    W_OI, H_II = layer()
    grid = replace(GRID, group=16)
    codes = solve(solver, W_OI, H_II, grid).codes
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(solve(solver, W_OI[order], H_II, grid).codes, codes[order])
    assert torch.equal(solve(solver, W_OI, 1024 * H_II, grid).codes, codes)


def test_act_order_with_an_equal_diagonal_is_in_order():
    W_OI, H_II = layer()
    root = H_II.diagonal().sqrt()
    correlation = (H_II / root / root[:, None]).fill_diagonal_(1)
    assert torch.equal(solve(ACT_ORDER, W_OI, correlation).codes, solve(IN_ORDER, W_OI, correlation).codes)
    assert not torch.equal(solve(ACT_ORDER, W_OI, H_II).codes, solve(IN_ORDER, W_OI, H_II).codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_in_range_and_survive_packing(bits):
    codes = solve(ACT_ORDER, *layer(), replace(GRID, bits=bits)).codes
    assert codes.dtype == torch.uint8 and codes.is_contiguous() and int(codes.max()) < 2**bits
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, codes.shape[1]), codes)


@each_order
def test_infinite_damping_is_plain_rounding(solver):
    W_OI, H_II = layer()
    grid = replace(GRID, group=16)
    heavy = replace(solver, damp_fraction=1e12)
    assert torch.equal(solve(heavy, W_OI, H_II, grid).codes, solve(Rtn(), W_OI, H_II, grid).codes)


def test_streamed_hessian_gives_the_same_codes():
    W_OI, _ = layer()
    X_TI = torch.randn(300, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    streamed = sum(x.T @ x for x in X_TI.split(70)) / 300
    assert torch.equal(solve(ACT_ORDER, W_OI, streamed).codes, solve(ACT_ORDER, W_OI, X_TI.T @ X_TI / 300).codes)


@each_order
def test_dead_columns_change_nothing_for_the_others(solver):
    W_OI, H_II = layer()
    grid = replace(GRID, group=16)
    small = 1e-6 * H_II  # a dead column that counted as 1 would swamp the damping
    dead = torch.arange(48) % 16 == 7
    cut = small.clone()
    cut[dead], cut[:, dead] = 0, 0
    W_OI[:, dead] = 100.0
    ours = solve(solver, W_OI, cut, grid)
    alive = W_OI.masked_fill(dead, 0)
    lone = cut + torch.diag(torch.where(dead, small.diagonal()[~dead].mean(), 0.0))
    assert (weights(ours, grid)[:, dead] == 0).all()
    assert torch.equal(ours.codes, solve(solver, alive, lone, grid).codes)


def test_dead_columns_need_no_damping(caplog):
    W_OI, H_II = layer()
    H_II[7], H_II[:, 7] = 0, 0
    with caplog.at_level(logging.WARNING, "qexp"):
        solve(replace(IN_ORDER, damp_fraction=0.0), W_OI, H_II)
    assert not caplog.text


def test_an_indefinite_hessian_raises_damping_and_says_so(caplog):
    W_OI, H_II = layer()
    values, vectors = torch.linalg.eigh(H_II)
    values[0] = -0.03 * H_II.diagonal().mean()
    with caplog.at_level(logging.WARNING, "qexp"):
        ours = solve(IN_ORDER, W_OI, vectors @ torch.diag(values) @ vectors.T)
    assert "damping 0.04" in caplog.text and "rounded to nearest" not in caplog.text
    assert not torch.equal(ours.codes, solve(Rtn(), W_OI, H_II).codes)


def test_a_hopeless_hessian_rounds_to_nearest_and_says_so(caplog):
    W_OI, H_II = layer()
    with caplog.at_level(logging.WARNING, "qexp"):
        ours = solve(DYNAMIC, W_OI, H_II - 100 * H_II.trace() * torch.eye(48))
    assert "rounded to nearest" in caplog.text
    assert torch.equal(ours.codes, solve(Rtn(), W_OI, H_II).codes)


def test_a_hessian_that_is_not_finite_raises():
    W_OI, H_II = layer()
    H_II[3, 4] = torch.nan
    with pytest.raises(NumericalError):
        solve(IN_ORDER, W_OI, H_II)


def test_act_order_with_dynamic_groups_is_refused():
    with pytest.raises(UserError, match=r"set method\.solver\.act_order=false or method\.solver\.static_groups=true"):
        replace(ACT_ORDER, static_groups=False)


@dataclass(frozen=True)
class Pairs:
    """Two neighbouring 2-bit values in one code: a vector grid whose nearest point is known."""

    scalar: Integer
    dim: int = 2
    group: int = -1
    needs: frozenset[str] = frozenset()

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        return self.scalar.fit(W_OJ, H_JJ)

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        codes = self.scalar.encode(W_OJ, params)
        return codes[:, ::2] * 4 + codes[:, 1::2]

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        both = torch.stack((codes // 4, codes % 4), -1).flatten(1)
        return self.scalar.decode(both, params)


@pytest.mark.parametrize("solver", [IN_ORDER, ACT_ORDER], ids=["in_order", "act_order"])
def test_vector_grids_get_the_block_update(solver):
    W_OI, H_II = layer()
    grid = Pairs(replace(GRID, bits=2))
    ours = solve(solver, W_OI, H_II, grid)
    assert ours.codes.shape == (12, 24)
    energy = H_II.diagonal().view(-1, 2).sum(1)
    pairs = energy.argsort(descending=True).tolist() if solver.act_order else range(24)
    left, current, H = [2 * p + i for p in pairs for i in (0, 1)], W_OI.clone(), damped(H_II, 0.01)
    while left:
        here, rest = left[:2], left[2:]
        codes = grid.encode(current[:, here], ours.params)
        assert torch.equal(codes[:, 0], ours.codes[:, here[0] // 2])
        inverse = torch.linalg.inv(H[left][:, left])
        error = (current[:, here] - grid.decode(codes, ours.params)) @ torch.linalg.inv(inverse[:2, :2])
        current[:, rest] -= error @ inverse[:2, 2:]
        left = rest


CASES = {  # of tests/golden/gptq/README.md: bits, symmetry, group, range, solver
    "asym3_row_actorder": (3, "asymmetric", -1, "minmax", ACT_ORDER),
    "sym4_g128_static_actorder": (4, "half_step", 128, "minmax", ACT_ORDER),
    "asym4_g128_dynamic": (4, "asymmetric", 128, "minmax", DYNAMIC),
    "sym3_row_mse": (3, "half_step", -1, "mse", IN_ORDER),
    "asym2_g128_static": (2, "asymmetric", 128, "minmax", IN_ORDER),
}


@pytest.mark.parametrize("case", CASES)
def test_official_code_gives_the_same_weights(case):
    golden = load_file(GOLDEN)
    bits, symmetry, group, rule, solver = CASES[case]
    grid = replace(GRID, bits=bits, symmetry=symmetry, group=group, range=rule)
    W_OI, X_TI = golden["W"].float(), golden["X"].float()
    quantized = solve(solver, W_OI, 2 / len(X_TI) * (X_TI.T @ X_TI), grid)
    torch.testing.assert_close(weights(quantized, grid), golden[f"Q_{case}"], rtol=2e-5, atol=1e-7)


def test_golden_cases_are_all_tested():
    assert {f"Q_{case}" for case in CASES} | {"W", "X"} == set(load_file(GOLDEN))
