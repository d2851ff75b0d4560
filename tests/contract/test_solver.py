"""What every solver owes: a loss not above plain rounding's, an untouched weight, the same codes for the same seed."""

from __future__ import annotations

import pytest
import torch
from stage_members import assert_well_kept, few_words, member, names
from torch import Tensor

from qexp.core.codebooks import Codebooks
from qexp.core.errors import UserError
from qexp.core.learned import LearnedSolver
from qexp.core.ranges import Uniform
from qexp.core.rng import generator
from qexp.core.stages import Grid, Solver
from qexp.core.words import Layer, Quantized, Stats
from qexp.engine.checks import Particular
from qexp.stages.solver.latent import Latent
from qexp.stages.solver.rtn import Rtn

LAYER = Layer("model.layers.0.mlp.up_proj", "up", 0, 24, 64)
every_solver = pytest.mark.parametrize("name", names("solver"))
every_grid = pytest.mark.parametrize("grid_name", names("grid"))


def problem(seed: int) -> tuple[Tensor, Stats]:
    rng = generator(seed, "problem")
    X_TI = torch.randn(160, 64, generator=rng) @ torch.randn(64, 64, generator=rng) / 8
    X_TI *= torch.randn(64, generator=rng).exp()
    low, high, mean = X_TI.amin(0), X_TI.amax(0), X_TI.abs().mean(0)
    stats = Stats(tokens=160, H_II=X_TI.T @ X_TI / 160, low_I=low, high_I=high, mean_abs_I=mean, rows_TI=X_TI)
    return torch.randn(24, 64, generator=rng), stats


def made(name: str, group: int) -> Grid:
    """Return a grid at the fewest bits, of 3 and 4, that it has."""
    for bits in (3, 4):
        grid: Grid = member("grid", name, w=bits, g=group, **few_words(name))
        try:
            grid.check(LAYER)
        except UserError:
            continue
        return grid
    pytest.fail(f"{name} has neither 3 nor 4 bits")


def of_its_own(solver: Solver, **bits: int) -> Grid:
    """Return a grid that the solver takes: integer, if it can."""
    try:
        solver.solve(*problem(0), member("grid", "integer"), generator(0))
    except UserError:
        own = "midrise" if isinstance(solver, Latent) else "additive"
        return member("grid", own, **bits, **(few_words(own) if own == "additive" else {}))
    return member("grid", "integer", **bits)


def needed(solver: Solver, grid: Grid) -> str | None:
    """Return what a solver asks for where it does not take a grid."""
    if isinstance(solver, Latent):
        return None if grid.dim == 1 and set(grid.formats) == {"scale"} else "levels times a scale"
    if isinstance(solver, LearnedSolver):
        return None if isinstance(grid, Uniform) else "a uniform grid"
    return "method/grid=additive" if isinstance(solver, Particular) and not isinstance(grid, Codebooks) else None


def loss(W_OI: Tensor, stats: Stats, quantized: Quantized, grid) -> float:
    E_OI = W_OI - grid.decode(quantized.codes, quantized.params)
    return float((E_OI @ stats.H_II * E_OI).sum())


def test_all_solvers_are_seen():
    assert len(names("solver")) >= 3


@every_solver
def test_it_is_a_solver_and_well_kept(name):
    solver = member("solver", name)
    assert isinstance(solver, Solver)
    assert_well_kept("solver", name, solver)


@every_solver
@every_grid
@pytest.mark.parametrize("group", [-1, 16])
def test_loss_is_not_above_plain_rounding_on_any_grid(name, grid_name, group):
    solver, grid = member("solver", name), made(grid_name, group)
    for seed in range(3):
        W_OI, stats = problem(seed)
        if (need := needed(solver, grid)) is not None:
            with pytest.raises(UserError, match=need):
                solver.solve(W_OI, stats, grid, generator(0))
            return
        ours = loss(W_OI, stats, solver.solve(W_OI, stats, grid, generator(0, name)), grid)
        assert 0 < ours <= loss(W_OI, stats, Rtn().solve(W_OI, stats, grid, generator(0)), grid)


@every_solver
def test_weight_and_statistics_stay_and_the_seed_decides(name):
    solver = member("solver", name)
    grid = of_its_own(solver, g=16)
    (W_OI, stats), (before, observed) = problem(0), problem(0)
    first = solver.solve(W_OI, stats, grid, generator(7, name))
    again = solver.solve(W_OI, stats, grid, generator(7, name))
    assert torch.equal(W_OI, before) and torch.equal(stats.H_II, observed.H_II)
    assert torch.equal(first.codes, again.codes)
    assert all(torch.equal(first.params[key], again.params[key]) for key in first.params)


@every_solver
def test_codes_and_parameters_have_the_shapes_of_the_grid(name):
    solver = member("solver", name)
    grid = of_its_own(solver, w=3, g=16)
    quantized = solver.solve(*problem(0), grid, generator(0))
    assert quantized.codes.dtype == torch.uint8 and quantized.codes.shape[:2] == (24, 64 // grid.dim)
    assert int(quantized.codes.max()) < 8
    assert all(p.shape[:2] == (24, 64 // grid.group if grid.group else 1) for p in quantized.params.values())
    assert grid.decode(quantized.codes, quantized.params).isfinite().all()


@every_solver
def test_statistics_are_only_needed_where_they_are_asked_for(name):
    solver = member("solver", name)
    grid, (W_OI, _) = of_its_own(solver, g=16), problem(0)
    if solver.needs:
        with pytest.raises(AssertionError, match="needs statistics"):
            solver.solve(W_OI, None, grid, generator(0))
    else:
        assert solver.solve(W_OI, None, grid, generator(0)).codes.shape == W_OI.shape
