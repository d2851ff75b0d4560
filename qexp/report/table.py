"""The comparison as a table: printed, as Markdown or as CSV.

CSV holds raw values of every column under metric keys; the other two hold readable text, and leave out what no row has.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qexp.report import columns
from qexp.report.columns import Column
from qexp.report.rows import Row, sets

if TYPE_CHECKING:
    from rich.console import Console

_ENDLESS = 10_000  # characters


def show(rows: Sequence[Row]) -> None:
    """Print the table to the terminal; what is equal in all rows or finds no room goes to the caption instead."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    screen = console()
    varying, caption = _fit([column for column in columns.find(rows) if not column.csv_only], rows, screen.width)
    table = Table(box=box.SIMPLE_HEAD, caption=escape(caption), caption_justify="left", pad_edge=False)
    for column in varying:
        table.add_column(escape(column.title), justify="right" if column.kind == "number" else "left", overflow="fold")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        ends = following is not None and (following.model, following.bits) != (row.model, row.bits)
        cells = (escape(_terminal_text(column, row)) for column in varying)
        table.add_row(*cells, style="red" if row.failed else None, end_section=ends)
    screen.print(table)


def console() -> Console:
    """Return where tables are printed: the terminal, or a file or pipe, which has no width to respect."""
    from rich.console import Console

    here = Console()
    return here if here.is_terminal else Console(width=_ENDLESS)


def failures(rows: Sequence[Row]) -> list[str]:
    """Return one line per failed run, with its whole error in that line."""
    return [f"{row.runs[0]['name']}: {columns.status(row)}" for row in rows if row.failed]


def say(lines: Iterable[str]) -> None:
    """Print plain lines below the table."""
    for line in lines:
        print(line)


def markdown(rows: Sequence[Row], shown: Sequence[Column] | None = None) -> str:
    """Return the table (or these columns) as GitHub Markdown; text of records can neither break it nor become HTML."""
    visible = shown or [column for column in columns.find(rows) if not column.csv_only]
    lines = [
        [markdown_cell(column.title) for column in visible],
        ["--:" if c.kind == "number" else ":--" for c in visible],
    ]
    lines += [[markdown_cell(column.text(row)) for column in visible] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(rows: Sequence[Row]) -> str:
    """Return the table as CSV (RFC 4180) with raw values; an absent or not finite number is an empty field."""
    out = io.StringIO(newline="")
    every = columns.find(rows)
    writer = csv.writer(out)
    writer.writerow([column.key for column in every])
    writer.writerows([["" if (v := column.value(row)) is None else v for column in every] for row in rows])
    return out.getvalue()


def _fit(visible: Sequence[Column], rows: Sequence[Row], width: int) -> tuple[list[Column], str]:
    """Split columns into those to print within ``width`` characters, and a caption about the rest."""
    kept, facts = columns.split_constant(visible, rows)
    left_out: list[str] = []
    while sum(_width(column, rows) + 3 for column in kept) > width and any(column.spare for column in kept):
        least = max(kept, key=lambda column: column.spare)
        kept.remove(least)
        left_out.append(least.title)
    lines = ["   ".join(facts)] if facts else []
    lines += [f"left out for width (qexp-report --csv has them): {', '.join(left_out)}"] if left_out else []
    return kept, "\n".join([*lines, *_legend(kept, rows)])


def _legend(shown: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Return one line that says what a gap is and, where the titles do not, on which text it was measured."""
    names = sets(rows, "perplexity")
    if not any(column.key.startswith("gap/") for column in shown):
        return []
    where = f" on {names[0]}" if len(names) == 1 else ""
    return [f"gap: log perplexity{where} minus the float model's, in nats (0.01 is one percent)"]


def _width(column: Column, rows: Sequence[Row]) -> int:
    return max(len(text) for text in (column.title, *(_terminal_text(column, row) for row in rows)))


def _terminal_text(column: Column, row: Row) -> str:
    """Return the cell's text, but of a failure only the word: its error stands below the table."""
    return "failed" if row.failed and column.key == "status" else column.text(row)


def markdown_cell(text: str) -> str:
    """Return text as a cell of a Markdown table."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " "), ("`", "\\`")):
        text = text.replace(mark, safe)
    return text
