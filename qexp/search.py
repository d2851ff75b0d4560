"""``qexp-search``: which settings of a space does no other beat? A multi-objective search whose trials are runs.

The command checks everything, starts the workers, says what comes in, and shows the front; it runs no trial itself.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp import compose, search_front, search_plan, search_space
from qexp.core.errors import UserError
from qexp.search_crew import Crew
from qexp.search_desk import MOST_FAILURES, SAMPLERS, Desk, counted, hopeless
from qexp.search_plan import Plan

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from qexp.tracking.wandb import Tracker

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
HELP = """\
Search a space of configs for the settings that no other beats in every objective.

  qexp-search space=bits_and_groups --trials 20 --jobs 2
  qexp-search space=my.yaml model=qwen3_0_6b calibration=wikitext2 --study qwen \\
      --objectives gap/wikitext2:min size/bits_per_weight:min

A space is a short YAML file (or a name in sweeps/search/): config keys with the values they may take.

  method: [gptq, awq]                      # one of these
  bits.weight: {low: 2, high: 4}           # whole numbers, both ends included
  bits.group: [32, 64, 128]
  method.solver.damp_fraction: {low: 0.001, high: 0.1, log: true, when: {method: gptq}}

Any other override is fixed in all trials. A trial is an ordinary run: same folders, same records, nothing is computed
twice, a killed one continues at its block. The same command continues a search (--trials is the number in all), on
further machines as well if they share output_dir. A trial that fails is noted with its cause; the search goes on.
"""
FOOT = """\
objectives: any metric of record.json, gap/<set>, cost/<name>; e.g. perplexity/<set>:min, accuracy/<task>:max
results:    <output_dir>/front.json, front.csv; qexp-report <output_dir> compares all trials
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: 0 there is a front, 2 a user's mistake (one line), 1 no trial succeeded, 130 stopped."""
    arguments = _parser().parse_intermixed_args(argv)
    _log_to_stderr()
    try:
        with compose.hydra():
            code = search(plan_of(arguments), arguments.jobs)
    except UserError as error:
        sys.stderr.write(f"qexp-search: {error}\n")
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("qexp-search: stopped; the same command continues where it was\n")
        code = 130
    raise SystemExit(code)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan that the command line asks for, everything checked. Raises: UserError."""
    _check_optuna()
    # after --objectives, argparse takes what follows for more of them
    words = [*arguments.words, *(word for word in arguments.objectives if "=" in word)]
    wanted = tuple(word for word in arguments.objectives if "=" not in word)
    spaces = [word.partition("=")[2] for word in words if word.startswith("space=")]
    if len(spaces) != 1:
        raise UserError(f"{len(spaces)} spaces", "one: a YAML file or a name in sweeps/search/", "space=<file.yaml>")
    for key in ("jobs", "trials"):
        if getattr(arguments, key) < 1:
            raise UserError(f"--{key} {getattr(arguments, key)}", "at least 1")
    space = search_space.read(spaces[0])
    study = arguments.study or space.name
    folders = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    folder = folders[-1] if folders else f"outputs/{study}"
    fixed = tuple(word for word in words if not word.startswith(("space=", "output_dir=")))
    plan = Plan(
        space=spaces[0],
        fixed=fixed,
        objectives=wanted or search_plan.usual_objectives(fixed),
        study=study,
        folder=folder,
        storage=arguments.storage or str(Path(folder) / ".search" / study / "study.journal"),
        trials=arguments.trials,
        sampler=arguments.sampler,
        seed=arguments.seed,
    )
    search_plan.check(plan, space)
    return plan


def search(plan: Plan, jobs: int) -> int:
    """Run the workers until the study has its trials; write and show the front; return the exit code."""
    desk = plan.desk()
    began = len(_ended(desk))
    log.info("study %s: %d of %d trials done, in %s", plan.study, began, plan.trials, plan.folder)
    with contextlib.ExitStack() as stack:  # whatever happens here, no worker is left behind
        crew = Crew(plan, min(jobs, max(0, plan.trials - began)))
        stack.callback(crew.dismiss)
        if crew.size:
            _follow(desk, crew)
    every = desk.study.get_trials(deepcopy=False)
    points = search_front.front(desk.study, plan)
    for line in search_front.causes(desk.study):
        sys.stderr.write(f"failed  {line}\n")
    if not points:
        stopped = f"the first {MOST_FAILURES} trials failed" if hopeless(every) else "no trial succeeded"
        mended = "when the cause is mended, another --study"
        sys.stderr.write(f"qexp-search: {stopped}; {mended}; logs: {plan.home / 'workers'}\n")
        return 1
    _present(plan, desk, points, len(counted(every)))
    if len(_ended(desk)) > began:
        _track(plan, points)
    return 0


def _follow(desk: Desk, crew: Crew) -> None:
    """Say what each trial gave, and how long the rest may take, until all workers went home."""
    from qexp.tracking.progress import track

    began, before = time.monotonic(), len(_ended(desk))
    for done, trial in enumerate(track("trials", _arriving(desk, crew), desk.trials - before), start=1):
        left = max(0, desk.trials - before - done) * (time.monotonic() - began) / done
        words = " ".join(f"{key}={value}" for key, value in trial.user_attrs.get("drawn", {}).items())
        told = "  ".join(f"{v:.4g}" for v in trial.values or ()) or f"failed: {trial.user_attrs.get('cause')}"
        log.info("%d of %d: %s -> %s (%s left)", before + done, desk.trials, words, told, _span(left))


def _arriving(desk: Desk, crew: Crew) -> Iterator[FrozenTrial]:
    """Yield each trial that ends from now on, here or on another machine."""
    seen, busy = {trial.number for trial in _ended(desk)}, True
    while busy:
        time.sleep(LOOK_SECONDS)
        busy = crew.look()
        for trial in _ended(desk):
            if trial.number not in seen:
                seen.add(trial.number)
                yield trial


def _ended(desk: Desk) -> list[FrozenTrial]:
    return [trial for trial in counted(desk.study.get_trials(deepcopy=False)) if trial.state.is_finished()]


def _present(plan: Plan, desk: Desk, points: Sequence[search_front.Point], trials: int) -> None:
    from qexp.report import table

    search_front.show(plan, desk.space, points)
    paths = search_front.write(plan, points, trials)
    table.say([f"front:  {' '.join(map(str, paths))}"])
    table.say([f"report: qexp-report {plan.folder} --html {Path(plan.folder) / 'report.html'}"])


def _track(plan: Plan, points: Sequence[search_front.Point]) -> None:
    """Put the front beside the trials in the tracker: they are in the group of this name."""
    from qexp.core.build import build

    tracker: Tracker = build(compose.composed(plan.fixed)["tracking"], "tracking")
    tracker.tabulate(plan.study, search_front.rows(plan, points), Path(plan.folder))


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _check_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError("optuna is not installed", 'pip install "qexp[search]"') from error


def _log_to_stderr() -> None:
    from qexp.tracking.progress import StderrHandler

    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logging.getLogger().handlers[:] = [handler]
    logging.getLogger("qexp").setLevel(logging.INFO)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qexp-search", description=HELP, epilog=FOOT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    add("words", metavar="OVERRIDE", nargs="*", help="space=<file.yaml or name>, and what is fixed in all trials")
    add("--objectives", metavar="METRIC:min", nargs="+", default=[], help="default: KL and bits per weight, both min")
    add("--trials", metavar="N", type=int, default=40, help="in all, those of earlier commands included (40)")
    add("--jobs", metavar="N", type=int, default=1, help="worker processes of this command (1)")
    add("--study", metavar="NAME", help="name of the search, W&B's group (default: the space's name)")
    add("--storage", metavar="FILE", help="journal file, or sqlite:///file.db (default: in the study's folder)")
    add("--sampler", choices=SAMPLERS, default="tpe", help="who draws (tpe)")
    add("--seed", metavar="N", type=int, default=0, help="of the sampler (0)")
    return parser
