"""The optimiser loop of free tensors: groups of them down a loss, the best state kept.

The state is measured at the start, every so many steps and at the end. Where a loss or gradient is not finite, or the
measure has grown to twice its start, the best state comes back, all rates are halved and what followed it is done
again; after the third time the best state stays. The outcome says ``degraded`` then, or if nothing came of any rate.
So what is kept is never worse than the start, by its measure. Orthogonal matrices move on their own manifold
(core/stiefel.py).

Source: methods/block_reconstruction.md section 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from qexp.core.training import Course, Training

RETRIES = 3
WORSE = 2.0  # times the first measure: a state that diverges
NOISE = 1e-6  # added to the first measure, which may be zero


@dataclass(frozen=True)
class Knobs:
    """Tensors that are learned together, and their first rate."""

    name: str
    tensors: Sequence[Tensor]
    rate: float


def tensors_of(knobs: Sequence[Knobs]) -> list[Tensor]:
    """Return all that is learned."""
    return [tensor for knob in knobs for tensor in knob.tensors]


class Descent:
    """What is minimised; subclasses say how."""

    def step(self, chosen: Sequence[int]) -> float:
        """Return the loss of the chosen sequences; gradients are added to the tensors."""
        raise NotImplementedError

    def measure(self) -> float:
        """Return what states are compared by."""
        raise NotImplementedError

    def project(self) -> None:
        """Put the tensors back where they are allowed to be, after each step."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Take note of the epoch that the next step or measurement belongs to."""


class Memory:
    """Where a long descent leaves its state, to go on from there after a kill; this one forgets."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and facts that were saved last."""
        return None

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep a state."""


FORGETFUL = Memory()


@dataclass
class Outcome:
    """What became of a descent: the loss of every step taken, and measures (lower is better)."""

    losses: list[float] = field(default_factory=list)
    start: float = math.nan
    best: float = math.nan
    last: float = math.nan
    best_step: int = 0
    retries: int = 0
    degraded: bool = False


def minimise(
    knobs: Sequence[Knobs],
    course: Course,
    descent: Descent,
    track: Callable[[range], Iterable[int]],
    memory: Memory = FORGETFUL,
) -> Outcome:
    """Take the steps of a course and leave the chosen state in the tensors; ``memory`` gets the state now and then."""
    return _Loop(knobs, course, descent, memory).run(track)


@dataclass
class _State:
    """A state worth going back to."""

    step: int
    measure: float
    tensors: list[Tensor]


class _Loop:
    """One descent under way."""

    def __init__(self, knobs: Sequence[Knobs], course: Course, descent: Descent, memory: Memory) -> None:
        self.knobs, self.course, self.descent, self.memory = knobs, course, descent, memory
        self.training, self.chosen, self.each = course.training, course.batches, course.each
        self.tensors = tensors_of(knobs)
        self.every = self.training.measure_every or self.each
        self.rate, self.stale = course.raised, 0
        self.optimiser = _optimiser(knobs, self.training)
        self._tell_epoch(0)
        begun = descent.measure()
        self.outcome = Outcome(start=begun, best=begun, last=begun)
        self.best = _State(0, begun if math.isfinite(begun) else math.inf, self._copies())

    def run(self, track: Callable[[range], Iterable[int]]) -> Outcome:
        """Take all steps."""
        step, count, ticks = self._resume(), len(self.chosen), iter(track(range(len(self.chosen))))
        for _ in range(step):
            next(ticks, None)
        while step < count:
            next(ticks, None)
            self._tell_epoch(step)
            fine = self._take(step)
            step += 1
            if fine and (step % self.every == 0 or step == count):
                fine = self._look(step)
            if not fine:
                if not self._back_to_best():
                    break
                step = self.best.step
            elif self.memory is not FORGETFUL and step % self.every == 0:
                self._save(step)
            if fine and self.training.patience and self.stale >= self.training.patience:
                break
        for _ in ticks:  # the bar of a loop that ended early ends, too
            pass
        return self._end()

    def _take(self, step: int) -> bool:
        """Take one step; return whether all was finite (else nothing is changed)."""
        self.optimiser.zero_grad()
        found = self.descent.step(self.chosen[step])
        self.outcome.losses.append(found)
        gradients = [t.grad for t in self.tensors if t.grad is not None]
        if not math.isfinite(found) or not all(bool(g.isfinite().all()) for g in gradients):
            return False
        if self.training.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.tensors, self.training.clip_norm)
        factor = self.rate * self.training.factor(step, len(self.chosen))
        for group, knob in zip(self.optimiser.param_groups, self.knobs, strict=True):
            group["lr"] = knob.rate * factor
        self.optimiser.step()
        self.descent.project()
        return True

    def _look(self, step: int) -> bool:
        """Measure the state after ``step`` steps; return whether it has not diverged."""
        outcome, best = self.outcome, self.best.measure
        outcome.last = self.descent.measure()
        self.stale = 0 if outcome.last < best * (1 - self.training.min_gain) else self.stale + 1
        if outcome.last < best:
            self.best = _State(step, outcome.last, self._copies())
        return outcome.last <= WORSE * outcome.start + NOISE or not math.isfinite(outcome.start)

    def _back_to_best(self) -> bool:
        """Go back to the best state with half the rates; return whether there is another try."""
        self._restore()
        self.outcome.degraded = self.outcome.retries == RETRIES
        if self.outcome.degraded:
            return False
        self.outcome.retries += 1
        self.rate, self.stale = self.rate / 2, 0
        self.optimiser = _optimiser(self.knobs, self.training)
        return True

    def _end(self) -> Outcome:
        self.outcome.best, self.outcome.best_step = self.best.measure, self.best.step
        self.outcome.degraded |= self.outcome.retries > 0 and self.best.step == 0  # nothing came of any rate
        if self.training.select == "best" or self.outcome.degraded:
            self._restore()
            self._tell_epoch(max(0, self.best.step - 1))
        return self.outcome

    def _save(self, step: int) -> None:
        """Leave everything that the next step depends on."""
        tensors = {f"now.{i}": t for i, t in enumerate(self._copies())}
        tensors |= {f"best.{i}": t for i, t in enumerate(self.best.tensors)}
        for i, t in enumerate(self.tensors):
            tensors |= {f"moment.{i}.{name}": value for name, value in self.optimiser.state[t].items()}
        facts = {"step": step, "rate": self.rate, "stale": self.stale, "outcome": asdict(self.outcome)}
        self.memory.save(tensors, {**facts, "best": [self.best.step, self.best.measure]})

    @torch.no_grad()
    def _resume(self) -> int:
        """Take up what was left; return the step to go on with."""
        found = self.memory.load()
        if found is None:
            return 0
        tensors, facts = found
        for i, t in enumerate(self.tensors):
            t.copy_(tensors[f"now.{i}"])
            moments = {name.split(".", 2)[2]: v for name, v in tensors.items() if name.startswith(f"moment.{i}.")}
            self.optimiser.state[t] = {name: v.to(t.device) if v.dim() else v for name, v in moments.items()}
        best = [tensors[f"best.{i}"] for i in range(len(self.tensors))]
        self.best = _State(facts["best"][0], facts["best"][1], best)
        self.rate, self.stale, self.outcome = facts["rate"], facts["stale"], Outcome(**facts["outcome"])
        return int(facts["step"])

    def _tell_epoch(self, step: int) -> None:
        self.descent.begin_epoch(step // self.each, max(1, -(-len(self.chosen) // self.each)))

    def _copies(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.tensors]

    @torch.no_grad()
    def _restore(self) -> None:
        for tensor, value in zip(self.tensors, self.best.tensors, strict=True):
            tensor.copy_(value)


class SignSgd(torch.optim.Optimizer):
    """Steps of the rate against the sign of the gradient. Source: arXiv:2309.05516."""

    def __init__(self, params: Iterable[dict[str, object]]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every tensor that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    tensor -= group["lr"] * tensor.grad.sign()


def _optimiser(knobs: Sequence[Knobs], training: Training) -> torch.optim.Optimizer:
    groups = [{"params": list(k.tensors), "lr": k.rate} for k in knobs]
    if training.optimizer == "sign_sgd":
        return SignSgd(groups)
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, betas=training.betas, weight_decay=training.decay, amsgrad=training.optimizer == "amsgrad")
