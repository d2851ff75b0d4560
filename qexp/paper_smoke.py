"""``make paper-smoke``: every sweep of sweeps/papers and sweeps/ablations on the embedded model, with tiny settings.

What is tiny stands in sweeps/_smoke.yaml. Jobs that become the same by it (a table's models, its seeds) run once. A
sweep that fails does not stop the others; a table at the end says what ran; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from qexp import compose
from qexp.core.errors import UserError, nearest
from qexp.explain import HYDRA_MISTAKES, explain

GROUPS = ("+sweeps/papers=", "+sweeps/ablations=")


@dataclass(frozen=True)
class Outcome:
    """How the jobs of one sweep ended: ``wrong`` has a line for each that failed."""

    sweep: str
    jobs: int
    seconds: float
    wrong: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: 0 all jobs ran, 1 one did not, 2 a user's mistake (one line)."""
    parser = argparse.ArgumentParser(prog="python -m qexp.paper_smoke", description="Smoke the tables of the papers.")
    parser.add_argument("sweeps", metavar="NAME", nargs="*", help="papers/quarot, ablations/clip; all without one")
    names = parser.parse_args(argv).sweeps
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    with compose.hydra():
        try:
            wanted = chosen(names)
        except UserError as error:
            sys.stderr.write(f"paper-smoke: {error}\n")
            raise SystemExit(2) from None
        outcomes = [smoke(sweep) for sweep in wanted]
    show(outcomes)
    raise SystemExit(1 if any(outcome.wrong for outcome in outcomes) else 0)


def chosen(names: Sequence[str]) -> list[str]:
    """Return the sweeps called ``names``, or all of both groups. Raises: UserError for one that is not there."""
    known = {one.removeprefix("+sweeps/").replace("=", "/"): one for one in compose.sweeps() if one.startswith(GROUPS)}
    for name in names:
        if name not in known:
            raise UserError(f"{name} is no sweep of papers or ablations; {nearest(name, known)}")
    return [known[name] for name in names or sorted(known)]


def smoke(sweep: str) -> Outcome:
    """Run the distinct jobs of one sweep in a folder that is gone afterwards, and say how they ended."""
    began, count, wrong = time.perf_counter(), 0, []
    try:
        for job, config in distinct(sweep):
            count += 1
            if told := failure(config):
                wrong.append(f"{' '.join(job[1:])}: {told}")
    except (*HYDRA_MISTAKES, UserError) as error:
        wrong.append(explain(error, [sweep]))
    outcome = Outcome(sweep, count, time.perf_counter() - began, tuple(wrong))
    sys.stderr.write(f"{sweep}: {count} jobs, {outcome.seconds:.0f} s, {len(wrong)} failed\n")
    return outcome


def distinct(sweep: str) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield each job of a sweep with its tiny config, those that are the same run once."""
    changes = settings()["overrides"]
    replaced = {text.partition("=")[0] for text in changes}
    seen = []
    for job in compose.jobs(sweep):
        overrides = [text for text in job if text.partition("=")[0] not in replaced] + changes
        config = compose.composed(overrides)
        shorten(config["method"], settings()["keys"])
        if config not in seen:
            seen.append(config)
            yield job, config


def shorten(method: dict[str, Any], keys: Mapping[str, Any], path: str = "") -> None:
    """Set every key of ``method`` whose path ends with one of ``keys``, in place."""
    for name, node in method.items():
        here = f"{path}.{name}"
        if isinstance(node, dict):
            shorten(node, keys, here)
        for end, value in keys.items():
            if here.endswith(f".{end}") and not isinstance(node, dict):
                method[name] = value


@cache
def settings() -> dict[str, Any]:
    """Return what sweeps/_smoke.yaml says."""
    import yaml

    read: dict[str, Any] = yaml.safe_load(resources.files("qexp.sweeps").joinpath("_smoke.yaml").read_text("utf-8"))
    return read


def failure(config: dict[str, Any]) -> str | None:
    """Run one job from start to end; return what was wrong with it, or None."""
    from qexp.report import record
    from qexp.run import run

    with tempfile.TemporaryDirectory(prefix="paper-smoke-") as folder:
        try:
            run({**config, "output_dir": folder}, {}, None)
        except Exception as error:  # noqa: BLE001  (whatever it is, the next job runs)
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        (done,) = record.find([Path(folder)])
    values = [v for key, v in done["metrics"].items() if key.startswith("perplexity/") and not key.endswith("/ci95")]
    finite = bool(values) and all(isinstance(value, float) and math.isfinite(value) for value in values)
    return None if finite else "no finite perplexity"


def show(outcomes: Sequence[Outcome]) -> None:
    """Print one line for each sweep, then each failure."""
    from rich import box
    from rich.table import Table

    from qexp.report import table as terminal

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("sweep", "jobs", "seconds", "verdict"):
        table.add_column(title, justify="right" if title in ("jobs", "seconds") else "left", no_wrap=True)
    for one in outcomes:
        verdict = f"{len(one.wrong)} failed" if one.wrong else "ok"
        table.add_row(one.sweep, str(one.jobs), f"{one.seconds:.0f}", verdict, style="red" if one.wrong else None)
    terminal.console().print(table)
    total = sum(one.seconds for one in outcomes)
    terminal.say([f"failed  {one.sweep} {line}" for one in outcomes for line in one.wrong])
    terminal.say([f"{len(outcomes)} sweeps, {sum(one.jobs for one in outcomes)} jobs, {total:.0f} s"])


if __name__ == "__main__":
    main()
