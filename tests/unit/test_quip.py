"""QuIP: LDLQ is GPTQ on reversed columns and the official code's LDLQ, and incoherence does what it says.

Source: methods/quip.md section 6.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_members import member
from torch import Tensor
from toy_models import view_of
from toy_recipes import transform_named

from qexp.core.rng import generator
from qexp.core.words import Stats
from qexp.stages.grid.midrise import Midrise
from qexp.stages.solver.gptq import Gptq
from qexp.stages.solver.ldlq import Ldlq
from qexp.stages.transform.incoherence import _orthogonal

GOLDEN = Path(__file__).parents[1] / "golden" / "quip" / "ldlq.safetensors"
LDLQ = Ldlq(damp_fraction=0.01, sort=False, passes=0, clamp=False)
GRIDS = [("midrise", 0), ("midrise", -1), ("integer", -1), ("integer", 12)]
each_grid = pytest.mark.parametrize(("grid", "group"), GRIDS)


def layer(seed: int = 0, outputs: int = 16, inputs: int = 48) -> tuple[Tensor, Stats]:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    X = draw(400, inputs) @ draw(inputs, inputs) / inputs**0.5
    return draw(outputs, inputs), stats(X.T @ X / 400)


def stats(H: Tensor) -> Stats:
    return Stats(tokens=1, H_II=H, low_I=-H[0], high_I=H[0], mean_abs_I=H[0], rows_TI=H)


def loss(W: Tensor, Q: Tensor, H: Tensor) -> float:
    return float(((W - Q) @ H * (W - Q)).sum())


@each_grid
@pytest.mark.parametrize("seed", range(3))
def test_it_is_gptq_on_reversed_columns(grid: str, group: int, seed: int) -> None:
    W, about = layer(seed)
    made = member("grid", grid, w=3, g=group, **({} if grid == "midrise" else {"scale_dtype": "float32"}))
    ours = LDLQ.solve(W, about, made, generator(0))
    gptq = Gptq(damp_fraction=0.01, act_order=False, static_groups=True)
    theirs = gptq.solve(W.flip(1), stats(about.H_II.flip(0, 1)), made, generator(0))
    assert torch.equal(ours.codes, theirs.codes.flip(1))


@each_grid
def test_an_uncorrelated_hessian_is_rounding_to_nearest(grid: str, group: int) -> None:
    W, _ = layer()
    made = member("grid", grid, w=2, g=group)
    solved = LDLQ.solve(W, stats(torch.eye(48).double()), made, generator(0))
    assert torch.equal(solved.codes, made.encode(W, solved.params))


@each_grid
@pytest.mark.parametrize("seed", range(3))
def test_greedy_passes_lower_the_loss_and_stop(grid: str, group: int, seed: int) -> None:
    W, about = layer(seed)
    made = member("grid", grid, w=2, g=group)
    damped = about.H_II + 0.01 * about.H_II.diagonal().mean() * torch.eye(48)
    losses = []
    for passes in (0, 1, 5, 50, 60):
        solved = replace(LDLQ, passes=passes).solve(W, about, made, generator(0))
        losses.append(loss(W, made.decode(solved.codes, solved.params), damped))
    assert losses[0] > losses[1] >= losses[2] >= losses[3] == losses[4]


def test_a_weight_on_the_grid_is_found_exactly() -> None:
    W, about = layer()
    made = member("grid", "midrise", w=2, g=0, ratio=1.0)
    params = made.fit(W, None)
    on_grid = made.decode(made.encode(W, params), params)
    levels = replace(made, ratio=float(made._top * params["scale"][0, 0] / 2 / on_grid.pow(2).mean().sqrt()))
    solved = LDLQ.solve(on_grid, about, levels, generator(0))
    torch.testing.assert_close(levels.decode(solved.codes, solved.params), on_grid, rtol=2e-3, atol=0)


def test_an_unclamped_grid_keeps_the_bound() -> None:
    """Loss at most m/4 step² tr D for levels without ends (8 bits, a range that nothing leaves)."""
    W, about = layer()
    made = Midrise(bits=8, group=0, ratio=6.0)
    solved = LDLQ.solve(W, about, made, generator(0))
    damped = about.H_II + 0.01 * about.H_II.diagonal().mean() * torch.eye(48)
    L, step = torch.linalg.cholesky(damped), float(solved.params["scale"][0, 0])
    found = loss(W, made.decode(solved.codes, solved.params), damped)
    trace_D = float(L.diagonal().pow(2).sum())
    assert found <= 16 / 4 * step**2 * trace_D
    assert found == pytest.approx(16 / 12 * step**2 * trace_D, rel=0.15)


CASES = {  # of tests/golden/quip/README.md: bits, sort, passes
    **{f"ldlq_{bits}": (bits, False, 0) for bits in (2, 3, 4)},
    **{f"ldlqRG0_{bits}": (bits, True, 0) for bits in (2, 3, 4)},
    "ldlqRG9_4": (4, True, 9),
}


@pytest.mark.parametrize("case", CASES)
def test_official_code_gives_the_same_codes(case: str) -> None:
    golden = load_file(GOLDEN)
    bits, sort, passes = CASES[case]
    X = golden["X"].float()
    made = Midrise(bits=bits, group=0, ratio=2.4)
    solver = Ldlq(damp_fraction=0.01, sort=sort, passes=passes, clamp=True)
    assert torch.equal(solver.solve(golden["W"], stats(X.T @ X), made, generator(0)).codes, golden[f"codes_{case}"])


def test_golden_cases_are_all_tested() -> None:
    assert {f"codes_{case}" for case in CASES} | {"W", "X"} == set(load_file(GOLDEN))


def test_passes_take_the_columns_in_the_order_of_the_sweep() -> None:
    """Sorting is the same as handing in sorted columns, with passes as without."""
    W, about = layer()
    made = Midrise(bits=3, group=0, ratio=2.4)
    order = about.H_II.diagonal().argsort()
    for passes in (0, 1, 9):
        ours = replace(LDLQ, sort=True, passes=passes).solve(W, about, made, generator(0))
        sorted_H = stats(about.H_II[order][:, order])
        theirs = replace(LDLQ, passes=passes).solve(W[:, order], sorted_H, made, generator(0))
        assert torch.equal(ours.codes[:, order], theirs.codes)


@pytest.mark.parametrize("kind", ["kronecker", "hadamard"])
@pytest.mark.parametrize("size", [1, 7, 24, 256])
def test_turns_are_orthogonal_and_follow_the_seed(kind: str, size: int) -> None:
    eye = torch.eye(size, dtype=torch.float64)
    A, again, other = (_orthogonal(size, kind, generator(s)).apply(eye) for s in (0, 0, 1))
    assert float((A @ A.T - eye).abs().max()) < 1e-12
    assert torch.equal(A, again) and (size == 1 or not torch.equal(A, other))


@pytest.mark.parametrize("kind", ["kronecker", "hadamard"])
def test_outliers_of_a_weight_are_spread(kind: str) -> None:
    W, _ = layer(outputs=64, inputs=64)
    W[3, 5] = 300.0
    rng = generator(0)
    left, right = _orthogonal(64, kind, rng), _orthogonal(64, kind, rng)
    turned = left.apply(right.apply(W).T).T

    def incoherence(M: Tensor) -> float:
        return float(M.abs().max() * 64 / M.norm())

    assert incoherence(W) > 50 and incoherence(turned) < (12 if kind == "kronecker" else 3)


@pytest.mark.parametrize("member_name", ["incoherence", "incoherence_hadamard"])
def test_every_input_and_output_is_turned(member_name: str) -> None:
    view = view_of("qwen3")
    sites = transform_named(member_name).sites(view)
    assert [s.kind for s in sites if s.block == 0].count("output") == 7
    assert {s.kind for s in sites} == {"attn_in", "attn_out", "mlp_in", "mlp_mid", "output"}
