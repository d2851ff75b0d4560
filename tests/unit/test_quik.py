"""Kept columns and bits by role against methods/quik.md section 6."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from stage_members import member
from torch import Tensor
from toy_models import tokens, view_of
from toy_recipes import a_run, linear_of, recipe, scene_of, stream_into, transform_named

from qexp.core.errors import UserError
from qexp.core.linear import InputPath, QuantLinear
from qexp.core.method import Method
from qexp.core.rng import generator
from qexp.core.words import Group, Layer, Quantized, Stats
from qexp.engine.acting import act_of
from qexp.engine.blocks import activate, quantize_block
from qexp.engine.solving import plan_of, solve_beside
from qexp.models.view import ModelView

KEPT = 8


def layer(seed: int, tokens: int = 300, size: int = 48) -> tuple[Tensor, Stats]:
    """A weight and the statistics of correlated inputs whose last KEPT channels are loud."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, size, generator=rng) @ torch.randn(size, size, generator=rng) / size**0.5
    X[:, -KEPT:] *= 20
    low, high = X.amin(0), X.amax(0)
    made = Stats(tokens, X.T @ X / tokens, low, high, X.abs().mean(0), X)
    return torch.randn(16, size, generator=rng), made


def whole(solved: Quantized, grid: object) -> Tensor:
    assert solved.kept is not None
    return torch.cat([grid.decode(solved.codes, solved.params), solved.kept], 1)  # type: ignore[attr-defined]


def loss(W: Tensor, Q: Tensor, stats: Stats) -> float:
    return float((((W - Q) @ stats.H_II) * (W - Q)).sum())


GRID = {"w": 3, "g": -1}


@pytest.mark.parametrize("solver", ["gptq_in_order", "rtn"])
@pytest.mark.parametrize("seed", range(4))
def test_kept_columns_take_up_the_error_of_the_others(solver: str, seed: int) -> None:
    W, stats = layer(seed)
    grid, by = member("grid", "integer_symmetric", **GRID), member("solver", solver)
    solved = solve_beside(by, W, KEPT, stats, grid, generator(0))
    silent = torch.cat([grid.decode(solved.codes, solved.params), W[:, -KEPT:]], 1)
    assert loss(W, whole(solved, grid), stats) < 0.9 * loss(W, silent, stats)
    assert loss(W, whole(solved, grid), stats) < loss(W, _all_rounded(by, W, stats, grid), stats)


def _all_rounded(by: object, W: Tensor, stats: Stats, grid: object) -> Tensor:
    solved = by.solve(W, stats, grid, generator(0))  # type: ignore[attr-defined]
    return grid.decode(solved.codes, solved.params)  # type: ignore[attr-defined,no-any-return]


def test_it_is_gptq_with_the_kept_columns_last() -> None:
    """The official order of the sweep: all columns in one factor, rounding stops at the kept ones."""
    W, stats = layer(0)
    W, H = W.double(), stats.H_II.double()
    grid = member("grid", "integer_symmetric", scale_dtype="float32", **GRID)
    by = member("solver", "gptq_in_order", damp_fraction=1e-9)
    exact = replace(stats, H_II=H)
    solved = solve_beside(by, W, KEPT, exact, grid, generator(0))
    damped = H + torch.diag_embed(torch.cat([torch.zeros(40), torch.full((KEPT,), 0.01 * float(H.diagonal().mean()))]))
    U, work, front = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), W.clone(), slice(0, 40)
    params = grid.fit(W[:, front], None)
    for k in range(40):
        rounded = grid.decode(grid.encode(work[:, k : k + 1], params), params)[:, 0]
        error = (work[:, k] - rounded) / U[k, k]
        work[:, k] = rounded
        work[:, k + 1 :] -= error[:, None] * U[k, k + 1 :]
    torch.testing.assert_close(whole(solved, grid), work, rtol=1e-5, atol=1e-7)


def test_uncorrelated_columns_stay_as_they_are() -> None:
    W, stats = layer(0)
    diagonal = replace(stats, H_II=torch.diag(stats.H_II.diagonal()))
    solved = solve_beside(member("solver", "rtn"), W, KEPT, diagonal, member("grid", "integer", **GRID), generator(0))
    assert solved.kept is not None and torch.equal(solved.kept, W[:, -KEPT:])


def test_loud_kept_channels_do_not_touch_the_scale_of_the_others() -> None:
    path = InputPath(1)
    path.kept, path.act = 2, member("act", "per_token_asymmetric").freeze({})
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[:, -2:] = 1e6
    assert torch.equal(path(loud)[:, :-2], path(x)[:, :-2]) and torch.equal(path(loud)[:, -2:], loud[:, -2:])


def quantized() -> tuple[ModelView, Method]:
    made = recipe("outlier_columns", grid="integer_symmetric", act="per_token_asymmetric", w=4, a=4)
    made = replace(made, allocation=member("allocation", "by_role", w=4), solver=member("solver", "gptq_in_order"))
    view = view_of("llama")
    plan = plan_of(view, made, 0)
    stream, kwargs = stream_into(view, 0, tokens(6))
    with TemporaryDirectory() as folder:
        quantize_block(plan, scene_of(view, 0, stream, kwargs), a_run(Path(folder)))
    return view, made


def test_a_quantized_block_keeps_and_counts() -> None:
    view, made = quantized()
    linear = linear_of(view, "q")
    assert linear.kept is not None and linear.kept.shape[1] == 8 == linear.path.kept
    assert linear.cost() == pytest.approx((4 * 16 + 16 + 16 * 8) / 24)
    assert linear_of(view, "down").cost() > 8
    activate(view, [0], made)
    groups = view.groups(0)
    assert [act_of(made, group).bits for group in groups] == [4, 4, 4, 8]


@pytest.mark.parametrize(
    ("hidden", "middle", "kept", "kept_middle", "bits"), [(4096, 11008, 256, 688, 5.59), (8192, 28672, 256, 896, 5.44)]
)
def test_the_published_effective_bits(hidden: int, middle: int, kept: int, kept_middle: int, bits: float) -> None:
    """LLaMA-2 7B and 70B (QUIK Table 2's models): 4 bits, 8 for down_proj, kept columns at 16."""
    keys = hidden if hidden == 4096 else 1024
    layers = [(hidden, hidden, 4, kept), (keys, hidden, 4, kept), (keys, hidden, 4, kept), (hidden, hidden, 4, kept)]
    layers += [(middle, hidden, 4, kept)] * 2 + [(hidden, middle, 8, kept_middle)]
    grid = member("grid", "integer_symmetric", g=-1)
    stored = 0.0
    for outputs, inputs, width, n in layers:
        probe = QuantLinear(torch.nn.Linear(inputs, outputs, bias=False, device="meta"), InputPath(1))
        probe.grid, probe.kept = grid.for_layer(Layer("x", "q", 0, outputs, inputs), width), torch.empty(0, n)
        stored += probe.cost() * outputs * inputs
    assert stored / sum(o * i for o, i, *_ in layers) == pytest.approx(bits, abs=0.02)


def test_a_map_behind_kept_columns_is_refused() -> None:
    view = view_of("llama")
    made = recipe("outlier_columns", "duquant")
    plan = plan_of(view, made, 0)
    from qexp.engine.transforming import transform_block

    stream, kwargs = stream_into(view, 0, tokens())
    with pytest.raises(UserError, match="outlier_columns, which would mix the kept channels"):
        transform_block(plan, scene_of(view, 0, stream, kwargs), stream)


def test_a_role_that_is_none_is_refused() -> None:
    with pytest.raises(Exception, match="Error in call to target") as caught:
        member("allocation", "by_role", roles={"dwon": 8})
    assert "dwon" in str(caught.value.__cause__)


def test_bits_by_role_never_go_down() -> None:
    made = member("allocation", "by_role", w=16)
    down = Layer("m.down", "down", 0, 8, 8)
    assert made.assign([down], lambda *_: 0.0) == {"m.down": 16} and made.act_bits(down, 4) == 8
    assert transform_named("outlier_columns", fraction=0.0).kept(64) == 0
    assert isinstance(Group("0.x", (down,)), Group)
