"""The desk of a study, where workers fetch trials and tell what came of them: any number of them, on any machine.

Optuna's storage keeps the trials; two things it leaves to us. A worker that is killed leaves its trial RUNNING for
ever (heartbeats exist for databases only), and several workers may draw the same setting. Both are settled by locks on
files of the study's folder, which the operating system gives back when their owner dies, however it dies:

- a worker holds the lock of its own file as long as it lives, so a RUNNING trial is lost if that lock can be had;
- looking for lost trials, counting, drawing and signing happen under the lock of the desk, so no trial is taken twice,
  none is found unsigned, and there are never more trials than were asked for.

A lost trial is marked FAIL and its settings are drawn once more: the same overrides, hence the same folder, in which
the run continues at its block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from qexp.search_space import Drawn, Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

log = logging.getLogger(__name__)

SAMPLERS = ("tpe", "nsga2", "random")
MOST_DEATHS = 3  # of workers over one trial; then it is the trial
MOST_FAILURES = 5  # without a single success; then it is the search
MOST_REPEATS = 3  # that a sampler may draw in a row; then chance draws: in a small space a model is sure of itself
MOST_DRAWS = 60  # of settings that were there before; then the space is exhausted


@dataclass(frozen=True)
class Desk:
    """``folder``: where the locks lie; ``trials``: how many the study shall have, repeats and lost ones not counted."""

    study: Study
    folder: Path
    space: Space
    trials: int
    sampler: str
    seed: int

    def take(self, worker: str) -> tuple[Trial, Drawn] | None:
        """Return the next trial with its settings, signed by ``worker``; None when there is nothing left to do."""
        with FileLock(self.folder / "desk.lock"):
            self.recover(worker)
            for attempt in range(MOST_DRAWS):
                every = self.study.get_trials(deepcopy=False)
                if not _is(every, "WAITING") and (len(counted(every)) >= self.trials or hopeless(every)):
                    return None
                trial, drawn, twin = self._draw(worker, every, attempt)
                if twin is None:
                    return trial, drawn
                self.fail(trial, f"the same as trial {twin.number}", repeats=twin.number)
        log.info("nothing new in %d draws: the space is searched", MOST_DRAWS)
        return None

    def finish(self, trial: Trial, values: Sequence[float], folder: Path) -> None:
        """Tell what was measured, and in which folder its record is."""
        trial.set_user_attr("folder", str(folder))
        self.study.tell(trial, list(values))

    def fail(self, trial: Trial, cause: str, **notes: int) -> None:
        """Tell that nothing came of it, in one line."""
        from optuna.trial import TrialState

        for key, value in {"cause": cause, **notes}.items():
            trial.set_user_attr(key, value)
        self.study.tell(trial, state=TrialState.FAIL)

    def recover(self, worker: str) -> None:
        """Mark what dead workers left RUNNING as failed, and queue its settings again."""
        from optuna.trial import Trial

        for lost in _is(self.study.get_trials(deepcopy=False), "RUNNING"):
            owner = lost.user_attrs.get("worker")
            if owner == worker or (owner and self.is_alive(owner)):
                continue
            deaths = lost.user_attrs.get("deaths", 0) + 1
            who = Trial(self.study, lost._trial_id)
            if deaths >= MOST_DEATHS:
                self.fail(who, f"its process died {deaths} times")
                continue
            log.warning("trial %d was lost with its process; it is queued again", lost.number)
            if lost.params:  # else it died before anything was drawn
                self.study.enqueue_trial(lost.params, user_attrs={"deaths": deaths, "continues": lost.number})
            self.fail(who, "its process died", lost=deaths)

    @contextlib.contextmanager
    def working(self, worker: str) -> Iterator[None]:
        """Hold the lock that says that ``worker`` is alive."""
        (self.folder / "workers").mkdir(parents=True, exist_ok=True)
        with FileLock(self._sign(worker)):
            yield
        self._sign(worker).unlink(missing_ok=True)

    def is_alive(self, worker: str) -> bool:
        """Return whether someone holds the lock of ``worker``."""
        if not self._sign(worker).exists():
            return False
        try:
            with FileLock(self._sign(worker), timeout=0):
                return False
        except Timeout:
            return True

    def _sign(self, worker: str) -> Path:
        return self.folder / "workers" / f"{worker}.lock"

    def _draw(self, worker: str, every: Sequence[FrozenTrial], attempt: int) -> tuple[Trial, Drawn, FrozenTrial | None]:
        """Return a new trial, what it sets, and the trial that did so before, if any.

        Each draw has a generator of its own: a study that was interrupted goes on as if it had not been.
        """
        name = self.sampler if attempt < MOST_REPEATS else "random"
        self.study.sampler = sampler_of(name, self.seed, len(every))
        trial = self.study.ask()
        for key, value in {"worker": worker, "host": socket.gethostname(), "pid": os.getpid()}.items():
            trial.set_user_attr(key, value)
        drawn = self.space.draw(trial)
        trial.set_user_attr("drawn", drawn)
        others = (t for t in every if t.number != trial.number and "lost" not in t.user_attrs)
        return trial, drawn, next((t for t in others if t.user_attrs.get("drawn") == drawn), None)


def counted(every: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that count: no repeats, nothing lost, nothing that still waits."""
    return [t for t in every if not {"repeats", "lost"} & t.user_attrs.keys() and t.state.name != "WAITING"]


def hopeless(every: Sequence[FrozenTrial]) -> bool:
    """Return whether the first trials failed, all of them."""
    ended = [t for t in counted(every) if t.state.is_finished()]
    return len(ended) >= MOST_FAILURES and not _is(ended, "COMPLETE")


def sampler_of(name: str, seed: int, number: int) -> BaseSampler:
    """Return the sampler of draw ``number``."""
    import warnings

    import numpy as np
    import optuna

    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=own)
        return optuna.samplers.TPESampler(seed=own) if name == "tpe" else optuna.samplers.RandomSampler(seed=own)


def _is(every: Sequence[Any], state: str) -> list[Any]:
    return [t for t in every if t.state.name == state]
