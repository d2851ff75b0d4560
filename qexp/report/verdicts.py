"""Published beside measured: by how much a run's perplexity differs from the printed one, and what that says.

The verdict is on perplexity itself, relative: ``within 2 %``, ``3.1 % above``, ``2.4 % below`` (a better number is no
reproduction either). It is not given where the comparison would not be one: on a part of the windows (eval.limit), or
where the float model's own perplexity is not the printed one's, which is another text, checkpoint or protocol.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qexp.report.record import Published
from qexp.report.rows import Row
from qexp.report.table import console, markdown_cell

WITHIN = 2.0  # percent of the published perplexity
FLOAT_WITHIN = 1.0  # percent; stacks differ by 0.02 of 5.47 at most (methods/evaluation.md section 1.1)
HEADINGS = ("method", "model", "set", "published", "measured", "difference", "verdict", "source")
_NUMBERS = ("published", "measured", "difference")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One published number beside what a row measured; ``within`` is the tolerance in percent."""

    row: Row
    entry: Published
    within: float

    @property
    def metric(self) -> str:
        """Return the key of the metric that both are numbers of, e.g. perplexity/wikitext2."""
        return self.entry.get("metric", "perplexity/wikitext2")

    @property
    def measured(self) -> float | None:
        """Return the row's number, None where it is not finite or absent."""
        return self.row.metrics.get(self.metric)

    @property
    def float_measured(self) -> float | None:
        """Return the float model's number."""
        return self.row.metrics.get(f"fp/{self.metric}")

    @property
    def difference(self) -> float | None:
        """Return measured over published minus one, in percent; positive is worse."""
        return _percent(self.measured, self.entry["value"])

    @property
    def gaps(self) -> tuple[float | None, float | None]:
        """Return log perplexity minus the float model's in nats, as published and as measured, where known."""
        reference = self.entry.get("fp_value")
        published = math.log(self.entry["value"] / reference) if reference else None
        return published, self.row.metrics.get(self.metric.replace("perplexity", "gap", 1))

    @property
    def reproduced(self) -> bool | None:
        """Return whether the number came out, None where that is not judged."""
        if self.difference is None or self._why_not():
            return None
        return abs(self.difference) <= self.within

    @property
    def verdict(self) -> str:
        """Return what the difference says, in words."""
        if self.difference is None:
            return "failed" if self.row.failed else "diverged" if self.metric in self.row.metrics else "not measured"
        if why := self._why_not():
            return f"not judged: {why}"
        if self.reproduced:
            return f"within {self.within:g} %"
        return f"{abs(self.difference):.1f} % {'above' if self.difference > 0 else 'below'}"

    def _why_not(self) -> str:
        """Return what makes the two numbers incomparable, empty if nothing does."""
        if limit := (self.row.runs[0]["config"].get("eval") or {}).get("limit"):
            return f"{limit} windows only"
        off = _percent(self.float_measured, self.entry.get("fp_value"))
        if off is not None and abs(off) > FLOAT_WITHIN:
            return f"float model {self.float_measured:.4g}, printed {self.entry['fp_value']:.4g}"
        return ""

    def texts(self) -> dict[str, str]:
        """Return the cells of a table by heading."""
        numbers = (f"{self.entry['value']:g}", _text(self.measured, ".4g"), _text(self.difference, "+.1f", " %"))
        name = self.metric.partition("/")[2]
        cells = (self.row.label, self.row.model, name, *numbers, self.verdict, self.entry["source"])
        return dict(zip(HEADINGS, cells, strict=True))


def compare(rows: Sequence[Row], within: float = WITHIN) -> list[Comparison]:
    """Return every published number of the rows beside what was measured, row by row."""
    return [Comparison(row=row, entry=entry, within=within) for row in rows for entry in row.runs[0]["published"]]


def summary(found: Sequence[Comparison]) -> list[str]:
    """Return one line that counts the verdicts, none where nothing is published."""
    if not found:
        return []
    judged = [one.reproduced for one in found if one.reproduced is not None]
    told = [f"{sum(judged)} of {len(judged)} within {found[0].within:g} % of the printed perplexity"] if judged else []
    told += [f"{len(found) - len(judged)} not judged"] if len(judged) < len(found) else []
    return [f"published numbers: {', '.join(told)}"]


def show(found: Sequence[Comparison]) -> None:
    """Print published, measured, difference and verdict as a table; nothing where nothing is published."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if not found:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", overflow="fold")
    for one in found:
        table.add_row(*map(escape, one.texts().values()), style="red" if one.reproduced is False else None)
    console().print(table)


def markdown(found: Sequence[Comparison]) -> str:
    """Return the same as GitHub Markdown with a line in front of it; empty where nothing is published."""
    return "".join(f"{line}\n" for line in _markdown_lines(found))


def _markdown_lines(found: Sequence[Comparison]) -> Iterator[str]:
    if not found:
        return
    yield from ("", *summary(found), "", f"| {' | '.join(HEADINGS)} |")
    yield f"| {' | '.join('--:' if heading in _NUMBERS else ':--' for heading in HEADINGS)} |"
    for one in found:
        yield f"| {' | '.join(map(markdown_cell, one.texts().values()))} |"


def _percent(value: float | None, reference: float | None) -> float | None:
    return 100 * (value / reference - 1) if value is not None and reference else None


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
