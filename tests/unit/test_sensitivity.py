"""Bits by sensitivity: the knapsack against brute force, the measures against what they estimate, whole runs.

Source: methods/mixed_precision_lm.md section 6.
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_members import Figures, member
from toy_models import tokens, view_of
from toy_recipes import a_run, recipe

from qexp.core.errors import UserError
from qexp.core.words import Layer
from qexp.engine.blocks import quantize_blocks
from qexp.engine.checks import check_method, check_model
from qexp.engine.sensitivity import _Divergence, _kl, hessian_traces, measured
from qexp.engine.streams import embed
from qexp.stages.allocation._shared_knapsack import exact, greedy, total

IDS = tokens(4)
tables = st.integers(1, 5).flatmap(
    lambda units: st.lists(st.lists(st.floats(0, 9, width=32), min_size=3, max_size=3), min_size=units, max_size=units)
)


def layers(count: int = 6) -> list[Layer]:
    roles = itertools.islice(itertools.cycle(("q", "k", "v", "o", "gate", "up", "down")), count)
    return [Layer(f"layers.{i // 7}.{role}", role, i // 7, 16, 16) for i, role in enumerate(roles)]


@settings(max_examples=60, deadline=None)
@given(tables, st.floats(0, 1))
def test_the_program_is_the_best_of_all_and_greedy_is_not_below(damage: list[list[float]], share: float) -> None:
    damage = [sorted(row, reverse=True) for row in damage]
    cost = [[2.0 + u, 3.0 + u, 5.0 + 2 * u] for u in range(len(damage))]
    budget = sum(row[0] for row in cost) + share * sum(row[2] - row[0] for row in cost)
    best = min(
        total(damage, chosen)
        for chosen in itertools.product(range(3), repeat=len(damage))
        if total(cost, chosen) <= budget + 1e-9
    )
    ours, theirs = exact(damage, cost, budget + 1e-9), greedy(damage, cost, budget + 1e-9)
    assert total(cost, ours) <= budget + 1e-6 and total(cost, theirs) <= budget + 1e-6
    assert total(damage, ours) == pytest.approx(best, abs=1e-5)
    assert total(damage, theirs) >= best - 1e-5


@pytest.mark.parametrize("decades", [0, 3, 6])
@pytest.mark.parametrize("average", [3.5, 5, 6])
def test_many_units_of_unlike_sizes_are_solved_to_the_optimum(decades: int, average: float) -> None:
    """Against dynamic programming over budgets in quarters of a bit, which all costs are."""
    rng, options = random.Random(decades), (2, 3, 4, 6, 8)
    for _ in range(2):
        sizes = [10 ** (decades * rng.random()) for _ in range(42)]
        damage = [[30 * s if b == 2 else s * 4.0**-b for b in options] for s in sizes]
        cost = [[b + 0.25 for b in options]] * len(sizes)
        budget = (average + 0.25) * len(sizes)
        best = {0.0: 0.0}
        for row in damage:
            after: dict[float, float] = {}
            for (spent, so_far), (o, b) in itertools.product(best.items(), enumerate(options)):
                if spent + b + 0.25 <= budget:
                    after[spent + b + 0.25] = min(after.get(spent + b + 0.25, math.inf), so_far + row[o])
            best = after
        ours = exact(damage, cost, budget)
        assert total(cost, ours) <= budget
        assert total(damage, ours) <= min(best.values()) * (1 + 1e-5)
        assert total(damage, ours) <= total(damage, greedy(damage, cost, budget))


def test_what_is_left_of_the_budget_is_less_than_the_next_step() -> None:
    damage, cost = [[9.0 / (u + 1) * 4.0**-o for o in range(4)] for u in range(6)], [[2.0, 3.0, 4.0, 6.0]] * 6
    chosen = exact(damage, cost, 21.5)
    steps = [row[o + 1] - row[o] for row, o in zip(cost, chosen, strict=True) if o + 1 < len(row)]
    assert 21.5 - min(steps) < total(cost, chosen) <= 21.5


def test_the_divergence_is_none_for_the_weight_itself_and_blind_to_a_shift_of_logits(tmp_path: Path) -> None:
    view = view_of("llama", torch.float32)
    run = a_run(tmp_path)
    kwargs = embed(view, IDS)[1]
    judge = _Divergence(view, IDS, kwargs)
    weight = view.linear(view.layers[0].name).weight
    assert judge.of(0, weight, weight.clone()) == 0
    assert judge.of(0, weight, weight * 1.5) > 0
    p = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    q = p.flip(1)
    plain = _kl(p.log_softmax(-1), q.log_softmax(-1))
    assert plain == pytest.approx(_kl((p + 7).log_softmax(-1), (q - 3).log_softmax(-1)), abs=1e-6) and plain > 0
    table = measured(view, IDS, method("kl", options=[4, 16]), run)
    assert all(set(row) == {4} and row[4] > 0 for row in table.values()), "16 bits are not measured: they do nothing"


def test_bits_that_the_grid_lacks_are_told_with_those_it_has() -> None:
    made = method("output")
    made = type(made)(**{**vars(made), "grid": member("grid", "mxfp4", w=4, group=8)})
    with pytest.raises(UserError, match=r"refuses \[2, 3\].*method\.allocation\.options=\[4,6,8\]"):
        check_model(view_of("llama", torch.float32), made)


def test_squared_gradients_weigh_what_is_measured_where_they_weigh_the_grid(tmp_path: Path) -> None:
    found = []
    for name in ("kmeans", "kmeans_fisher"):
        made = method("output", options=[3])
        tables = type(made)(**{**vars(made), "grid": member("grid", name, w=3, g=-1)})
        found.append(measured(view_of("llama", torch.float32), IDS, tables, a_run(tmp_path / name)))
    assert found[0] != found[1]


def test_more_budget_is_never_worse_and_all_of_it_is_everything() -> None:
    damage = [[8.0 / (u + 1), 2.0 / (u + 1), 0.0] for u in range(6)]
    cost = [[2.0, 4.0, 16.0]] * 6
    found = [total(damage, exact(damage, cost, 6 * budget)) for budget in (2, 3, 4, 8, 12, 16)]
    assert found == sorted(found, reverse=True) and found[-1] == 0


def test_scaling_damages_changes_nothing_and_order_does_not_matter() -> None:
    damage = [[5.0, 1.5, 0.1], [2.0, 1.9, 0.0], [9.0, 3.0, 1.0]]
    cost = [[2.0, 3.0, 4.0]] * 3
    chosen = exact(damage, cost, 9)
    assert exact([[1e-7 * x for x in row] for row in damage], cost, 9) == chosen
    assert exact(damage[::-1], cost, 9) == chosen[::-1]


def test_the_closed_form_of_an_exponential_damage_is_found() -> None:
    """Damage s 4^-b has its optimum at b = B + log2(s / geometric mean of s) / 2."""
    sizes = {layer.name: 4.0**i for i, layer in enumerate(layers(5))}
    allocation = member("allocation", "sensitivity", w=4, options=[2, 3, 4, 5, 6])
    bits = allocation.assign(layers(5), Figures(lambda layer, b: sizes[layer.name] * 4.0**-b))
    assert list(bits.values()) == [2, 3, 4, 5, 6]


def test_ties_share_bits() -> None:
    damage = lambda layer, b: (1 + len(layer.name) * ord(layer.role[0])) * 4.0**-b  # noqa: E731
    one = member("allocation", "sensitivity", w=3, unit="input").assign(layers(7), Figures(damage))
    names = {layer.role: layer.name for layer in layers(7)}
    assert one[names["q"]] == one[names["k"]] == one[names["v"]] and one[names["gate"]] == one[names["up"]]
    block = member("allocation", "sensitivity", w=3, unit="block").assign(layers(7), Figures(damage))
    assert len(set(block.values())) == 1


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(UserError, match=r"2\.000 or more.*method\.allocation\.budget="):
        member("allocation", "sensitivity", w=3, budget=1.5).assign(layers(), Figures(lambda _, b: 2.0**-b))


def test_a_budget_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(UserError, match=r"method\.allocation\.budget="):
        check_model(view_of("llama", torch.float32), method("kl", budget=1.5))
    with pytest.raises(UserError, match=r"method\.solver\.rate=-1.*a number from 0 on"):
        made = recipe(w=3)
        solver = member("solver", "signround", rate=-1.0)
        check_method(type(made)(**{**vars(made), "solver": solver}), calibrated=True)


def method(metric: str, **keys: Any) -> Any:
    made = recipe(w=3)
    allocation = member("allocation", "sensitivity", w=3, metric=metric, sequences=2, **keys)
    return type(made)(**{**vars(made), "allocation": allocation})


@pytest.mark.parametrize("metric", ["kl", "trace", "fisher", "output"])
def test_every_metric_is_positive_and_falls_with_bits(metric: str, tmp_path: Path) -> None:
    view = view_of("llama", torch.float32)
    before = {layer.name: view.linear(layer.name).weight.clone() for layer in view.layers}
    damages = measured(view, IDS, method(metric), a_run(tmp_path))
    assert all(torch.equal(view.linear(name).weight, weight) for name, weight in before.items()), "nothing is changed"
    assert list(damages) == [layer.name for layer in view.layers]
    totals = [sum(row[bits] for row in damages.values()) for bits in (2, 3, 4, 6, 8)]
    if metric != "trace":  # an untrained model is at no minimum: its Hessian may be anything
        assert totals == sorted(totals, reverse=True)
        assert all(value >= 0 for row in damages.values() for value in row.values()) and totals[-1] < 0.02 * totals[0]


def test_the_trace_is_that_of_the_hessian(tmp_path: Path) -> None:
    view = view_of("llama", torch.float64)
    name = view.layers[-1].name
    weight = view.linear(name).weight
    few = IDS[:1, :6]

    def loss(W: torch.Tensor) -> torch.Tensor:
        answer = torch.func.functional_call(view.model, {f"{name}.weight": W}, (), {"input_ids": few, "labels": few})
        return answer.loss

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        H = torch.autograd.functional.hessian(loss, weight.detach()).reshape(weight.numel(), -1)
    estimates = []
    for seed in range(6):
        run = a_run(tmp_path)
        run.seed = seed
        estimates.append(hessian_traces(view, few, run)[name])
    mean, spread = torch.tensor(estimates).mean(), torch.tensor(estimates).std() / 6**0.5
    assert abs(float(mean - H.diagonal().sum())) < 4 * float(spread) + 1e-9


def test_a_run_keeps_its_bits_and_a_resumed_one_does_not_measure_again(tmp_path: Path) -> None:
    first, again = view_of("llama", torch.float32), view_of("llama", torch.float32)
    made = method("output", budget=5.0)
    quantize_blocks(first, IDS, made, a_run(tmp_path))
    stamp = (tmp_path / "blocks" / "allocation.safetensors").stat().st_mtime_ns
    quantize_blocks(again, IDS, made, a_run(tmp_path))
    assert (tmp_path / "blocks" / "allocation.safetensors").stat().st_mtime_ns == stamp
    assert first.allocation["bits"] == again.allocation["bits"] and len(set(first.allocation["bits"].values())) > 1
    told = first.allocation["told"]
    assert told["predicted/exact"] <= told["predicted/greedy"] + 1e-12 <= told["predicted/uniform"] + 2e-12
    for layer in first.layers:
        assert torch.equal(first.linear(layer.name).weight, again.linear(layer.name).weight)
        assert first.linear(layer.name).grid.bits == first.allocation["bits"][layer.name]
    assert 4.5 < told["bits_per_weight/exact"] <= 5.0 + 1e-6
