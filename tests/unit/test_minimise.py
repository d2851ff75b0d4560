"""The optimiser loop: orders and rates over time, which state is kept, what happens when it diverges, its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from stage_members import member
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.minimise import Descent, Knobs, Memory, Outcome, minimise
from qexp.core.rng import generator
from qexp.core.straight import on_grid, rounded
from qexp.core.training import Training
from qexp.engine.learned_record import POINTS, thinned
from qexp.engine.shelf import Shelf, shelf_for

PLAIN: Training = member("tuner", "clip")["clip"].training


def training(**settings: Any) -> Training:
    return replace(PLAIN, **{"held_out": 0.0, "shuffle": False, **settings})


class Valley(Descent):
    """x² from 1; ``noise`` adds to what is measured at a call, ``bad`` steps have no number."""

    def __init__(self, measured: Sequence[float] = (), bad: Sequence[int] = ()) -> None:
        self.x = torch.ones(()).requires_grad_()
        self.told, self.bad, self.steps, self.epochs, self.seen = list(measured), bad, 0, [], []

    def step(self, chosen: Sequence[int]) -> float:
        self.seen.append(list(chosen))
        self.steps += 1
        with torch.enable_grad():
            loss = self.x.pow(2)
            loss.backward()
        return math.nan if self.steps in self.bad else float(loss.detach())

    def measure(self) -> float:
        return self.told.pop(0) if self.told else float(self.x.detach().pow(2))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self.epochs.append((epoch, epochs))


def descend(valley: Valley, rate: float = 0.1, memory: Memory | None = None, **settings: Any) -> Outcome:
    course = training(**settings).course(list(range(6)), generator(0))
    knobs = [Knobs("x", [valley.x], rate)]
    return minimise(knobs, course, valley, iter, memory) if memory else minimise(knobs, course, valley, iter)


class TestCourse:
    def test_batches_in_turn_reach_into_the_next_epoch(self) -> None:
        course = training(steps=4, batch=4).course(list(range(6)), generator(0))
        assert course.batches == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5], [0, 1, 2, 3]] and course.each == 2
        assert len(training(steps=0, epochs=3, batch=4).course(list(range(6)), generator(0)).batches) == 6

    def test_a_shuffled_epoch_has_every_sequence_once_and_the_seed_decides(self) -> None:
        def order(seed: int) -> list[int]:
            course = training(steps=0, epochs=2, batch=2, shuffle=True).course(list(range(6)), generator(seed))
            return [i for batch in course.batches for i in batch]

        assert sorted(order(0)[:6]) == sorted(order(0)[6:]) == list(range(6)) and order(0)[:6] != order(0)[6:]
        assert order(0) == order(0) != order(1)

    @pytest.mark.parametrize(
        ("sequences", "held_out", "counts"),
        [(128, 1 / 16, (120, 8)), (16, 1 / 16, (12, 4)), (5, 0.5, (3, 2)), (1, 0.5, (1, 1))],
    )
    def test_held_out_sequences_are_the_last(self, sequences: int, held_out: float, counts: tuple[int, int]) -> None:
        train, measured = training(held_out=held_out).split(sequences)
        assert (len(train), len(measured)) == counts and measured[-1] == sequences - 1
        assert sequences == 1 or not set(train) & set(measured)

    def test_rates_over_time(self) -> None:
        def rates(**settings: Any) -> list[float]:
            return [round(training(**settings).factor(step, 10), 3) for step in (0, 5, 9)]

        assert rates(schedule="constant") == [1, 1, 1]
        assert rates(schedule="linear", final=0.0) == [1, 0.5, 0.1]
        assert rates(schedule="cosine", final=0.05) == [1, 0.525, 0.073]
        warm = training(schedule="constant", warmup=0.4)
        assert [round(warm.factor(step, 10), 2) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"t1": 0.0}, r"k\.t1=0 and t2=0"), ({"held_out": 2.0}, r"k\.held_out=2\.0; need a value from 0 to 1"),
            ({"batch": 0}, r"set k\.batch=1"), ({"optimizer": "sgd"}, r"k\.optimizer='sgd' is unknown"),
            ({"betas": [0.9]}, r"k\.betas=\[0\.9\]; need two"),
            ({"decay": -1.0}, r"k\.decay=-1\.0; need at least 0; set k\.decay=0"),
        ],
    )  # fmt: skip
    def test_settings_that_mean_nothing_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            training(**settings).check("k")


class TestDescent:
    @pytest.mark.parametrize("optimizer", ["adam", "amsgrad", "adamw", "sign_sgd"])
    def test_it_goes_down_and_keeps_the_best(self, optimizer: str) -> None:
        valley = Valley()
        outcome = descend(valley, optimizer=optimizer, epochs=0, steps=60, measure_every=5)
        assert outcome.best < 0.05 * outcome.start and len(outcome.losses) == 60
        assert float(valley.x.detach()) ** 2 == pytest.approx(outcome.best)

    @pytest.mark.parametrize("select", ["best", "last"])
    def test_which_state_is_kept(self, select: str) -> None:
        valley = Valley(measured=[1.0, 0.5, 0.8, 0.9])
        outcome = descend(valley, select=select, steps=9, measure_every=3)
        assert (outcome.best, outcome.last, outcome.best_step) == (0.5, 0.9, 3)
        after = Valley()
        descend(after, select="last", steps=3 if select == "best" else 9, measure_every=3)
        assert torch.equal(valley.x, after.x)

    def test_patience_ends_it(self) -> None:
        valley = Valley(measured=[1.0, 0.5, 0.4999, 0.5, 0.5, 0.1])
        outcome = descend(valley, steps=20, measure_every=2, patience=3, min_gain=1e-3)
        assert len(outcome.losses) == 8 and outcome.best == 0.4999

    def test_gradients_are_clipped(self) -> None:
        valley = Valley()
        descend(valley, rate=0.5, steps=1, optimizer="sign_sgd", clip_norm=1e-9)
        assert float(valley.x.detach()) == 0.5, "the sign stays"

    @pytest.mark.parametrize(("bad", "retries", "degraded"), [((3,), 1, False), ((3, 5, 7, 9), 3, True)])
    def test_steps_without_a_number_are_done_again_at_half_the_rate(
        self, bad: tuple[int, ...], retries: int, degraded: bool
    ) -> None:
        valley = Valley(bad=bad)
        outcome = descend(valley, steps=8, measure_every=2)
        assert (outcome.retries, outcome.degraded) == (retries, degraded)
        assert float(valley.x.detach()) ** 2 == pytest.approx(outcome.best) and outcome.best < 1
        assert degraded or len(outcome.losses) == 9, "one step was lost"

    def test_a_measure_that_has_doubled_is_divergence(self) -> None:
        valley = Valley(measured=[1.0, 0.9, 2.1, 0.8, 0.7, 0.6])
        outcome = descend(valley, steps=8, measure_every=2)
        assert outcome.retries == 1 and outcome.best == 0.6 and not outcome.degraded

    def test_epochs_are_told(self) -> None:
        valley = Valley()
        descend(valley, epochs=3, steps=0, batch=2)
        assert valley.epochs[:10] == [(0, 3)] * 4 + [(1, 3)] * 3 + [(2, 3)] * 3

    def test_no_steps_keep_the_start(self) -> None:
        valley = Valley()
        outcome = descend(valley, epochs=0, steps=0)
        assert float(valley.x.detach()) == 1 and (outcome.start, outcome.best, outcome.losses) == (1, 1, [])

    @pytest.mark.parametrize("kept", [1, 2, 3])
    def test_what_memory_holds_is_all_that_the_next_step_needs(self, kept: int) -> None:
        class Remembers(Memory):
            def __init__(self, state: Any) -> None:
                self.state, self.saved = state, []

            def load(self) -> Any:
                return self.state

            def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
                self.saved.append(({n: t.clone() for n, t in tensors.items()}, facts))

        settings = {"steps": 10, "measure_every": 2, "schedule": "cosine"}
        whole, memory = Valley(bad=(3,)), Remembers(None)
        first = descend(whole, memory=memory, **settings)
        again = Valley(bad=())
        second = descend(again, memory=Remembers(memory.saved[kept]), **settings)
        assert torch.equal(whole.x, again.x) and (first.best, first.best_step) == (second.best, second.best_step)
        assert len(memory.saved) >= 4


def test_straight_rounding_is_exact_and_has_the_gradient_of_its_input() -> None:
    x = torch.tensor([0.4999, 0.5, 1.5, -2.5, 1e6 + 0.3]).requires_grad_()
    y = rounded(x)
    y.sum().backward()
    assert torch.equal(y.detach(), torch.tensor([0.0, 0.0, 2.0, -2.0, 1e6])) and torch.equal(x.grad, torch.ones(5))
    levels = torch.tensor([[[-5.0, -0.6, 0.4, 9.0]]]).requires_grad_()
    W, codes = on_grid(levels, torch.tensor([[2.0]]), torch.tensor([[3.0]]), 7)
    assert codes.tolist() == [[[0, 2, 3, 7]]] and W.tolist() == [[-6.0, -2.0, 0.0, 8.0]]
    W.sum().backward()
    assert levels.grad.tolist() == [[[0, 2, 2, 0]]]  # type: ignore[union-attr]


def test_long_curves_are_thinned_to_means() -> None:
    assert thinned([1.0, 2.0]) == [1.0, 2.0]
    short = thinned([float(i) for i in range(10 * POINTS + 3)])
    assert len(short) <= POINTS and short[0] == pytest.approx(5.0, abs=0.5) and short == sorted(short)


@pytest.mark.parametrize("place", ["host", "device", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shelves_give_back_what_they_got(place: str, dtype: torch.dtype, tmp_path: Any) -> None:
    x = torch.randn(3, 5, 7, generator=generator(0)).to(dtype)
    kept = Shelf(place, tmp_path).keep(x)
    assert torch.equal(kept, x) and kept.dtype == dtype and list(tmp_path.iterdir()) == []
    assert Shelf(place, tmp_path).keep(x[:0]).shape == (0, 5, 7)


@pytest.mark.parametrize(("needed", "place"), [(1000, "host"), (1 << 50, "disk")])
def test_the_fastest_place_with_room_is_taken(needed: int, place: str, tmp_path: Any) -> None:
    assert shelf_for("auto", needed, torch.device("cpu"), tmp_path).place == place
    assert shelf_for("device", needed, torch.device("cpu"), tmp_path).place == "device"


def test_progress_ends_with_the_loop() -> None:
    ticks: list[int] = []

    def track(steps: range) -> Any:
        for i in steps:
            ticks.append(i)
            yield i

    tracked: Callable[[range], Any] = track
    valley = Valley(bad=(2,))
    minimise(
        [Knobs("x", [valley.x], 0.1)], training(steps=6, measure_every=1).course([0, 1], generator(0)), valley, tracked
    )
    assert ticks == list(range(6))
