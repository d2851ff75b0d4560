"""``qexp-methods``: what there is. Recipes and members, own ones and those of other packages, and whether all compose.

Descriptions are not kept here: they are the opening comment of a YAML file and the docstring of the member's module.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qexp import compose
from qexp.core.errors import UserError, nearest
from qexp.explain import HYDRA_MISTAKES, check_keys, explain
from qexp.schema import KINDS, LISTS

PARTS = ("model", "method", "calibration", "eval", "tracking")  # of a job's config that are built
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Entry:
    """A recipe (``group`` is method) or a member (method/<kind>), with its YAML text and its docstring, if any."""

    group: str
    name: str
    yaml: str
    docstring: str
    needs: frozenset[str]

    @property
    def idea(self) -> str:
        """Return the first sentence of the opening comment, else of the docstring."""
        return idea_of(self.yaml) or _sentence(" ".join(self.docstring.split("\n\n")[0].split()))

    @property
    def papers(self) -> str:
        """Return the arXiv ids that the recipe or member names."""
        return " ".join(dict.fromkeys(PAPER.findall(self.yaml + self.docstring)))


def idea_of(text: str) -> str:
    """Return the first sentence of the opening comment of a YAML text, empty without one."""
    comment: list[str] = []
    for line in (line for line in text.splitlines() if not line.startswith("# @package")):
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return _sentence(" ".join(comment))


def _sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command: 0 done, 1 something does not compose, 2 a user's mistake (one line)."""
    arguments = _parser().parse_args(argv)
    try:
        with compose.hydra():
            if arguments.page:
                code = page(arguments.page, arguments.runs)
            else:
                code = check() if arguments.check else listing(arguments.name)
    except UserError as error:
        sys.stderr.write(f"qexp-methods: {error}\n")
        code = 2
    raise SystemExit(code)


def listing(name: str | None) -> int:
    """Print all recipes and members, or those called ``name`` in full. Raises: UserError if there is none."""
    from qexp.report import table

    if name is None:
        show(list(entries()))
        table.say(["qexp-methods NAME shows one in full; --check composes them all, and every sweep."])
        return 0
    wanted = name.strip("/").removeprefix("method/")
    named = [(group, each) for group, each in choices() if wanted in (each, f"{group}/{each}".removeprefix("method/"))]
    if not named:
        raise UserError(f"{name} is no recipe and no member; {nearest(name, {each for _, each in choices()})}")
    for group, each in named:
        one = entry(group, each)
        table.say(
            [f"{group}={each}", "", one.yaml.rstrip(), *(["", one.docstring.rstrip()] if one.docstring else []), ""]
        )
    return 0


def check() -> int:
    """Compose and build every job of every saved sweep, and every recipe with every member; return the exit code."""
    from qexp.report import table

    jobs, broken = check_sweeps()
    count = 0
    for overrides in swaps():
        count += 1
        if wrong := mistake(overrides):
            broken.append(f"{' '.join(overrides)}: {wrong}")
    sweeps = len(compose.sweeps())
    members = sum(len(compose.options(f"method/{kind}")) for kind in KINDS)
    recipes = len(compose.options("method"))
    table.say(
        [
            *broken,
            f"{recipes} recipes, {members} members of {len(KINDS)} kinds, {count} combinations; "
            f"{sweeps} sweeps, {jobs} jobs; {len(broken)} broken",
        ]
    )
    return 1 if broken else 0


def check_sweeps() -> tuple[int, list[str]]:
    """Compose and build every job of every saved sweep; return how many there are, and a line for each broken file."""
    from qexp.core.build import build

    count, broken = 0, []
    for sweep in compose.sweeps():
        job = [sweep]
        try:
            jobs = compose.jobs(sweep)
            configs = compose.composed_each(jobs)
            for job in jobs:  # noqa: B007  (the except below names the job that does not compose)
                config = next(configs)
                count += 1
                check_keys(config)
                for part in PARTS:
                    build(config[part], part)
        except (*HYDRA_MISTAKES, UserError) as error:
            broken.append(f"{file_of(sweep)}: {' '.join(job[1:])}: {explain(error, job)}")
    return count, broken


def file_of(sweep: str) -> str:
    """Return where a saved sweep of ours stands: sweeps/papers/quarot.yaml of +sweeps/papers=quarot."""
    return sweep.removeprefix("+").replace("=", "/") + ".yaml"


def page(file: Path, folders: Sequence[Path]) -> int:
    """Write the page of all methods, with the figures of the runs below ``folders``. Raises: UserError."""
    from qexp import methods_page
    from qexp.report import record, rows

    records = record.find(folders) if folders else []
    try:
        file.write_text(methods_page.page(records, rows.make(records)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}", "a place that can be written") from error
    return 0


def choices() -> Iterator[tuple[str, str]]:
    """Yield (group, name) of every recipe, then of every member kind by kind."""
    for group in ("method", *(f"method/{kind}" for kind in KINDS)):
        yield from ((group, name) for name in compose.options(group))


def swaps() -> Iterator[list[str]]:
    """Yield the overrides of every recipe as it is, then with each member of each kind, and with empty lists."""
    for recipe in compose.options("method"):
        yield [f"method={recipe}"]
        for kind in KINDS:
            names = compose.options(f"method/{kind}")
            values = ["[]", *(f"[{name}]" for name in names)] if kind in LISTS else names
            yield from ([f"method={recipe}", f"method/{kind}={value}"] for value in values)


def mistake(overrides: Sequence[str]) -> str | None:
    """Return what keeps a command from composing and building, or None."""
    from qexp.core.build import build
    from qexp.core.method import Method

    try:
        built = build(compose.composed(overrides)["method"], "method")
    except (*HYDRA_MISTAKES, UserError) as error:
        return explain(error, overrides)
    return None if isinstance(built, Method) else f"method is a {type(built).__name__}"


def entries() -> Iterator[Entry]:
    """Yield every recipe and member."""
    for group, name in choices():
        yield entry(group, name)


def entry(group: str, name: str) -> Entry:
    """Return one recipe or member; its class is imported, which for most means torch."""
    from qexp.core.build import build

    node = compose.alone(group, name)
    built = build(node, f"{group}={name}")
    text = compose.text_of(group, name)
    if group == "method":
        members = [built.grid, built.solver, *built.transform.values(), *built.tuner.values()]
        return Entry(group, name, text, "", frozenset().union(*map(needs_of, members)))
    module = inspect.getmodule(type(built))
    return Entry(group, name, text, (module and module.__doc__) or "", needs_of(built))


def needs_of(member: object) -> frozenset[str]:
    """Return what a member needs; whatever is learned needs calibration."""
    learned = {"activations"} if hasattr(member, "training") else set()
    return getattr(member, "needs", frozenset()) | learned


def show(found: Sequence[Entry]) -> None:
    """Print entries as one table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from qexp.report import table as terminal

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("group", "name", "needs", "what it is", "arXiv"):
        table.add_column(title, overflow="fold", no_wrap=title in ("group", "name"))
    for one, following in zip(found, [*found[1:], None], strict=True):
        ends = following is not None and following.group != one.group
        needs = "calibration" if "activations" in one.needs else ""
        table.add_row(one.group, one.name, needs, escape(one.idea), one.papers, end_section=ends)
    terminal.console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qexp-methods", description="List recipes and members with their papers and what they need."
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="show this recipe or member in full: gptq, solver/gptq")
    parser.add_argument("--check", action="store_true", help="compose and build all recipes, members and sweeps")
    parser.add_argument("--page", metavar="FILE", type=Path, help="write all recipes, stage by stage, as Markdown")
    parser.add_argument("--runs", metavar="DIR", type=Path, nargs="+", default=[], help="with --page: whose figures")
    return parser
