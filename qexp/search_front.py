"""What a search found: the trials that no other beats in every objective, as a table, JSON, CSV and lines to paste."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.search_desk import counted
from qexp.search_plan import Plan
from qexp.search_space import Drawn, Space

if TYPE_CHECKING:
    from optuna import Study


@dataclass(frozen=True)
class Point:
    """One trial on the front: what it drew, what it measured (in the order of the objectives), how to run it again."""

    trial: int
    drawn: Drawn
    values: tuple[float, ...]
    overrides: tuple[str, ...]
    folder: str

    @property
    def command(self) -> str:
        """Return the line that repeats it."""
        return shlex.join(["qexp", *self.overrides])


def front(study: Study, plan: Plan) -> list[Point]:
    """Return the Pareto front of the finished trials, best in the first objective first."""
    points = [
        Point(t.number, t.user_attrs["drawn"], tuple(t.values), tuple(plan.overrides(t.user_attrs["drawn"])),
              t.user_attrs["folder"])
        for t in study.best_trials
    ]  # fmt: skip
    return sorted(points, key=lambda point: point.values, reverse=plan.targets[0].direction == "max")


def causes(study: Study) -> list[str]:
    """Return one line per trial that failed, with what it drew."""
    failed = [t for t in counted(study.get_trials(deepcopy=False)) if t.state.name == "FAIL"]
    return [f"trial {t.number}: {_shown(t.user_attrs['drawn'])}: {t.user_attrs['cause']}" for t in failed]


def write(plan: Plan, points: Sequence[Point], trials: int) -> list[Path]:
    """Write ``front.json`` and ``front.csv`` beside the runs, each whole or not at all; return where."""
    objectives = [{"metric": one.key, "direction": one.direction} for one in plan.targets]
    found = [
        {
            "trial": point.trial,
            "values": dict(zip((one.key for one in plan.targets), point.values, strict=True)),
            "overrides": list(point.overrides),
            "command": point.command,
            "folder": point.folder,
        }
        for point in points
    ]
    whole = {"study": plan.study, "objectives": objectives, "trials": trials, "front": found}
    texts = {"front.json": json.dumps(whole, indent=1) + "\n", "front.csv": _csv(plan, points)}
    return [_written(Path(plan.folder) / name, text) for name, text in texts.items()]


def show(plan: Plan, space: Space, points: Sequence[Point]) -> None:
    """Print the front as a table, then the commands."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from qexp.report import table as terminal

    keys = [key for key in space.varying if any(key in point.drawn for point in points)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Pareto front", title_justify="left")
    for title in ("trial", *(one.key for one in plan.targets)):
        table.add_column(escape(title), justify="right", overflow="fold")
    for key in keys:
        table.add_column(escape(key), overflow="fold")
    for point in points:
        numbers = [str(point.trial), *(f"{value:.4g}" for value in point.values)]
        table.add_row(*numbers, *(escape(point.drawn.get(key, "–")) for key in keys))
    terminal.console().print(table)
    terminal.say(["to run one again:", *(f"  {point.command}" for point in points)])


def rows(plan: Plan, points: Sequence[Point]) -> tuple[list[str | int], list[list[Any]]]:
    """Return the front as columns and rows: for CSV and W&B."""
    keys = list(dict.fromkeys(key for point in points for key in point.drawn))
    head: list[str | int] = ["trial", *(one.key for one in plan.targets), *keys, "folder", "command"]
    each = [[p.trial, *p.values, *(p.drawn.get(key, "") for key in keys), p.folder, p.command] for p in points]
    return head, each


def _csv(plan: Plan, points: Sequence[Point]) -> str:
    out = io.StringIO(newline="")
    head, each = rows(plan, points)
    csv.writer(out).writerows([head, *each])
    return out.getvalue()


def _written(path: Path, text: str) -> Path:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="")
    return part.replace(path)


def _shown(drawn: Drawn) -> str:
    return " ".join(f"{key}={value}" for key, value in drawn.items())
