"""Every transform of issue C with two solvers, three grids, two activation and two KV quantizers, run on a toy.

All are composed by overrides, generated and counted; learned transforms learn for a step. Single swaps of every member
of every kind are in tests/unit/test_config.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_members import names
from toy_models import logits, tokens, view_of
from toy_recipes import a_run

from qexp import compose
from qexp.core.build import build
from qexp.core.method import Method
from qexp.core.words import FULL_BITS
from qexp.engine.blocks import activate, quantize_blocks
from qexp.engine.checks import check_method, check_model
from qexp.engine.transforming import transform_model
from qexp.engine.tuning import tune_model
from qexp.engine.whole_model import Learning
from qexp.models.view import ModelView

TRANSFORMS = {
    "learned_rotation": "method=spinquant method.transform.learned_rotation.steps=1",
    "learned_rotation alone": "method=spinquant_no_had method.transform.learned_rotation.steps=1",
    "duquant": "method=duquant method.transform.duquant.block=8",
    "duquant_code": "method=duquant method/transform=[duquant_code] method.transform.duquant_code.block=8",
    "incoherence": "method=quip",
    "incoherence_hadamard": "method=quip_sharp",
    "let": "method=omniquant_wa method.transform.let.training.steps=1",
    "affine": "method=affinequant method.transform.affine.training.steps=1",
    "kronecker": "method=flatquant method.transform.kronecker.training.steps=1",
    "outlier_columns": "method=quik",
    "dense_sparse": "method=squeezellm method.transform.dense_sparse.outliers=0.02",
    "column_scale": "method=crossquant method/transform=[column_scale]",
}
SOLVERS = ("rtn", "gptq")
GRIDS = {"symmetric": "integer_symmetric", "asymmetric": "integer", "groups": "integer method.grid.group=8"}
ACTS = ("per_token", "per_tensor")
KVS = ("none", "per_head")
LEARNED = ("flexround", "lrq", "signround", "block_ap")
TUNERS = {
    "none": "method/tuner=[]",
    "clip": "method/tuner=[clip] method.tuner.clip.training.steps=1",
    "norm_tweaking": "method/tuner=[norm_tweaking]",
    "norm_closed_form": "method/tuner=[norm_closed_form]",
    "e2e_qp": "method/tuner=[e2e_qp]",
    "all": "method/tuner=[clip,norm_tweaking,e2e_qp] method.tuner.clip.training.steps=1",
}
TABLES = ("additive", "pyramid", "binary_coding", "power_of_two", "additive_power_of_two", "kmeans", "kmeans_fisher")
FLOATS = ("mxfp4", "nvfp4", "nf4")
BELOW = {
    "nothing": "method=rtn method/transform=[]",
    "rotation": "method=quarot method/act=per_token method/kv=none",
    "scales": "method=awq",
}
FITTING = dict.fromkeys(FLOATS, "method.grid.group=8")  # what the toy's 24 columns take
FITTING |= {"pyramid": "method.grid.dim=8", "additive": "method.grid.dim=2 method.grid.codebook_bits=4"}
SWEEPS = {
    **{name: f"method/solver={name}" for name in ("rtn", "gptq", "ldlq")},
    "tuned": "method/solver=gptq method/tuner=[scales] method.tuner.scales.training.epochs=1",
    "whole": "method/solver=gptq method/tuner=[end_to_end] method.tuner.end_to_end.training.steps=1",
    "beam": "method/solver=beam method.solver.epochs=1 method.solver.training.steps=4",
    "latent": "method/solver=latent method.solver.training.steps=2 method.solver.norm_rate=1e-4",
}


def admitted(grid: str, sweep: str, below: str) -> bool:
    """Return whether a grid goes with them; the refusals have tests of their own."""
    if (grid, below) == ("kmeans_fisher", "scales"):  # squared gradients are taken before a block's weights are scaled
        return False
    scales = ("power_of_two", "additive_power_of_two", "mxfp4", "nf4")  # grids of levels times a scale
    return {"beam": grid == "additive", "tuned": grid != "mxfp4", "latent": grid in scales}.get(
        sweep, sweep != "whole" or (below == next(iter(BELOW)) and grid != "mxfp4")
    )


GRID_SWAPS = [s for s in product(TABLES + FLOATS, SWEEPS, BELOW) if admitted(*s)]
UNDER = ("duquant", "let", "kronecker", "learned_rotation", "incoherence")  # transforms of solvers that learn


def grid_for(solver: str, under: str, tuners: str) -> str:
    """Return the grid on which three others are run: each meets each grid, and every three of the others meet."""
    turn = LEARNED.index(solver) + UNDER.index(under) + list(TUNERS).index(tuners)
    return list(GRIDS)[turn % len(GRIDS)]


LEARNING = [(s, u, grid_for(s, u, t), t) for s, u, t in product(LEARNED, UNDER, TUNERS)]
SWAPS = list(product(TRANSFORMS, SOLVERS, GRIDS, ACTS, KVS))
IDS = tokens(4)


def test_all_are_there() -> None:
    assert len(LEARNING) == 4 * 5 * 6
    for a, b in itertools.combinations(range(4), 2):
        choices = [LEARNED, UNDER, GRIDS, TUNERS]
        assert {(one[a], one[b]) for one in LEARNING} == set(product(choices[a], choices[b])), "every pair meets"
    assert {*SOLVERS, *LEARNED, "gptq_in_order", "ldlq"} == set(names("solver")) - {"beam", "latent"}
    assert TUNERS.keys() > set(names("tuner")) - {"codebook", "scales", "end_to_end"}, "these with the grids"
    assert len(GRID_SWAPS) == 10 * 4 * 3 + 3 - 4 - 3 + 4 * 3 + 9
    assert len(SWAPS) == 12 * 2 * 3 * 2 * 2 == len(set(SWAPS))
    of_earlier_issues = {"fold_norm", "hadamard", "hadamard_keys", "hadamard_online", "smooth", "smooth_duquant", "awq"}
    assert {name.removesuffix(" alone") for name in TRANSFORMS} == set(names("transform")) - of_earlier_issues


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with compose.hydra():
        yield


def overrides(transform: str, solver: str, grid: str, act: str, kv: str) -> list[str]:
    bits = "bits=w4a8kv4" if kv != "none" else "bits=w4a8"
    chosen = f"{TRANSFORMS[transform]} {bits} method/solver={solver} method/grid={GRIDS[grid]}"
    return f"{chosen} method/act={act} method/kv={kv}".split()


def quantized(method: Method, folder: Path) -> Any:
    view = view_of("llama", torch.float32)
    check_method(method, calibrated=True)
    check_model(view, method)
    run = a_run(folder)
    transform_model(view, method, 0, Learning(IDS, run.store, run.progress))
    quantize_blocks(view, IDS, method, run)
    tune_model(view, IDS, method, run)
    activate(view, range(2), method)
    return view


@pytest.mark.parametrize(
    "swap", [s if s[1:] == SWAPS[0][1:] else pytest.param(s, marks=pytest.mark.slow) for s in SWAPS], ids="-".join
)
def test_it_composes_and_runs(swap: tuple[str, ...], tmp_path: Path) -> None:
    _, solver, grid, act, kv = swap
    method: Method = build(compose.composed(overrides(*swap))["method"])
    assert type(method.solver).__name__.lower() == solver and type(method.act).__module__.endswith(f".{act}")
    assert method.kv.bits == (FULL_BITS if kv == "none" else 4)
    assert method.grid.group == (8 if grid == "groups" else -1)
    assert_sound(quantized(method, tmp_path))


@pytest.mark.parametrize(
    "swap",
    [s if s[1:] == GRID_SWAPS[1][1:] else pytest.param(s, marks=pytest.mark.slow) for s in GRID_SWAPS],
    ids="-".join,
)
def test_any_grid_goes_with_any_solver_under_any_transform(swap: tuple[str, ...], tmp_path: Path) -> None:
    grid, sweep, below = swap
    words = f"{BELOW[below]} bits=w4a8 method/grid={grid} {SWEEPS[sweep]}"
    words += f" {FITTING[grid]}" if grid in FITTING else ""
    method: Method = build(compose.composed(words.split())["method"])
    assert_sound(quantized(method, tmp_path))


@pytest.mark.parametrize(
    "swap", [s if s[2:] == LEARNING[0][2:] else pytest.param(s, marks=pytest.mark.slow) for s in LEARNING], ids="-".join
)
def test_solvers_that_learn_compose_with_all_others(swap: tuple[str, ...], tmp_path: Path) -> None:
    solver, under, grid, tuners = swap
    words = f"{TRANSFORMS[under]} bits=w4a8 method/solver={solver} method.solver.training.steps=1 {TUNERS[tuners]}"
    words += f" method/grid={GRIDS[grid]} method/act=per_token"
    words += " method.transform.kronecker.clip_rate=0" if under == "kronecker" else ""  # one that learns ranges
    method: Method = build(compose.composed(words.split())["method"])
    assert list(method.tuner) == {"none": [], "all": ["clip", "norm_tweaking", "e2e_qp"]}.get(tuners, [tuners])
    assert_sound(quantized(method, tmp_path))


def assert_sound(view: ModelView) -> None:
    """Assert that the model is quantized, still the same model, and that every weight decodes from its codes."""
    answer = logits(view.model, IDS)
    assert answer.isfinite().all()
    error = (answer - logits(view_of("llama", torch.float32).model, IDS)).pow(2).mean() / answer.pow(2).mean()
    assert 0 < error < 1, "quantized, and still the same model"
    for layer in view.layers:
        linear = view.linear(layer.name)
        assert linear.codes is not None and linear.path.act is not None
        decoded = linear.grid.decode(linear.codes, linear.params)
        assert torch.equal(linear.weight, linear.assembled(decoded.to(linear.weight)))
