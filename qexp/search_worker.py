"""One worker of a search: a process that runs trials one after another, each an ordinary run of qexp.

``python -m qexp.search_worker PLAN NAME`` is started by ``qexp-search``, with its log in the study's folder.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from qexp import compose
from qexp.core.errors import UserError
from qexp.explain import HYDRA_MISTAKES, explain
from qexp.search_desk import Desk
from qexp.search_plan import Objective, Plan

log = logging.getLogger(__name__)

Carry: TypeAlias = Callable[[Sequence[str], str], Path]
"""Run these overrides as a job of this sweep; return the folder of the record."""


def main() -> None:
    """Entry point of the process."""
    from qexp.tracking.progress import StderrHandler

    plan, worker = Plan.from_json(sys.argv[1]), sys.argv[2]
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[StderrHandler()],
    )
    logging.getLogger("qexp").setLevel(logging.INFO)
    try:
        with compose.hydra():
            work(plan.desk(), plan, worker, carry_out)
    except KeyboardInterrupt:  # the trial stays as it is: whoever comes next finds it and continues it
        sys.exit(130)


def work(desk: Desk, plan: Plan, worker: str, carry: Carry) -> None:
    """Run trials until there are none left, or nobody waits for them: a worker outlives its command by one trial."""
    parent = os.getppid()
    with desk.working(worker):
        while os.getppid() == parent and (taken := desk.take(worker)) is not None:
            trial, drawn = taken
            words = plan.overrides(drawn)
            log.info("trial %d: qexp %s", trial.number, " ".join(words))
            try:
                folder = carry(words, plan.study)
                values = measured(folder, plan.targets)
            except Exception as error:  # whatever one trial raises, the search goes on
                log.error("trial %d failed", trial.number, exc_info=None if isinstance(error, UserError) else error)
                desk.fail(trial, cause(error, words))
            else:
                desk.finish(trial, values, folder)


def carry_out(words: Sequence[str], sweep: str) -> Path:
    """Compose and run ``qexp WORDS``."""
    from qexp.run import run

    config, choices = compose.job([*words, "busy=wait"])  # two trials may be the same run
    return run(config, choices, sweep, words)


def measured(folder: Path, targets: Sequence[Objective]) -> list[float]:
    """Return what the record in ``folder`` says of each objective. Raises: UserError for what it does not."""
    from qexp.report import record, rows

    (row,) = rows.make([record.read(folder / record.FILE_NAME)])
    found = [row.metrics.get(one.key) for one in targets]
    for one, value in zip(targets, found, strict=True):
        if value is None:
            told = "is not finite" if one.key in row.metrics else "was not measured"
            raise UserError(f"{one.key} {told}")
    return [float(value) for value in found if value is not None]


def cause(error: BaseException, words: Sequence[str]) -> str:
    """Return one line for what ended a trial."""
    if isinstance(error, HYDRA_MISTAKES):
        return explain(error, words)
    told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(told.split())


if __name__ == "__main__":
    main()
