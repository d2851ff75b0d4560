"""``qexp-bench``: speed of the compiled kernels against their floors and peers, and of a packed model.

The JSON is ``{machine, rows: [{op, backend, m, k, n, group, ours_ms, floor_ms, peers: {name: ms}}]}``: medians of
interleaved turns. Beside it goes a figure, one bar of speed-up per row and peer.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.core.errors import UserError
from qexp.core.memory import keep_freed_memory

if TYPE_CHECKING:
    from qexp.bench_timing import Row

ROUNDS = 5  # of whole generations of a model


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits 2 with one line on stderr for a user's mistake."""
    arguments = _parser().parse_args(argv)
    keep_freed_memory()  # as in a run, for us and for our peers
    try:
        _check(arguments)
        logging.getLogger("qexp").setLevel(logging.INFO)
        document = measure(arguments)
    except UserError as error:
        sys.stderr.write(f"qexp-bench: {error}\n")
        raise SystemExit(2) from None
    show(document)
    if arguments.json:
        write(document, arguments.json)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the document that goes to the JSON file."""
    from qexp import bench_kernels, bench_model
    from qexp.bench_timing import FULL, QUICK, machine
    from qexp.tracking.progress import track

    about = machine()
    if arguments.what == "model":
        rows, facts = bench_model.rows(arguments.run, 1 if arguments.quick else ROUNDS, track)
        return {"machine": about, "model": facts, "rows": rows}
    suite, pace = (bench_kernels.QUICK_SUITE, QUICK) if arguments.quick else (bench_kernels.FULL_SUITE, FULL)
    rows, missing = bench_kernels.rows(suite, pace, track)
    return {"machine": about | {"missing_peers": missing}, "rows": rows}


def show(document: dict[str, Any]) -> None:
    """Print the rows as a table: our time, its share of the floor, and how many times a peer's time is ours."""
    from rich import box
    from rich.table import Table

    from qexp.report import table as terminal

    rows: list[Row] = document["rows"]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("op", "M", "K", "N", "ours ms", "of floor", *(f"vs {name}" for name in peers)):
        table.add_column(title, justify="left" if title == "op" else "right")
    for row in rows:
        floor = row["floor_ms"]
        cells = [row["op"], str(row["m"]), str(row["k"] or ""), str(row["n"] or ""), f"{row['ours_ms']:.3f}"]
        cells.append("" if floor is None else f"{floor / row['ours_ms']:.0%}")
        table.add_row(*cells, *(f"{row['peers'][p] / row['ours_ms']:.2f}x" if p in row["peers"] else "" for p in peers))
    terminal.console().print(table)
    terminal.say([document["machine"]["description"]])
    about = document.get("model") or {}
    terminal.say([f"{key}: {value}" for key, value in about.items()])
    terminal.say(
        [f"not measured: {name} ({why})" for name, why in document["machine"].get("missing_peers", {}).items()]
    )


def write(document: dict[str, Any], file: Path) -> None:
    """Write the JSON file by rename, and the figure beside it."""
    from qexp.bench_plot import figure
    from qexp.report.plots import png

    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(document, indent=1))
    part.replace(file)
    file.with_suffix(".png").write_bytes(png(figure(document["rows"])))
    sys.stderr.write(f"{file} and {file.with_suffix('.png')}\n")


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for arguments that cannot work."""
    if arguments.what == "model" and arguments.run is None:
        raise UserError("qexp-bench model without a run", "the folder of a finished run", "qexp-bench model RUN_DIR")
    if arguments.what == "kernels" and arguments.run is not None:
        raise UserError(f"qexp-bench kernels {arguments.run}", "no folder: kernels are measured by themselves")
    folder = arguments.json.absolute().parent if arguments.json else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"--json {arguments.json}: {folder} is no folder", "an existing folder")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qexp-bench", description="Measure the speed of kernels or of a packed model."
    )
    parser.add_argument("what", choices=["kernels", "model"], help="each kernel by shape, or a whole model")
    parser.add_argument("run", metavar="RUN_DIR", nargs="?", type=Path, help="the folder of a finished run, for model")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements to FILE, a figure beside it")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: shows that all runs, not speed")
    return parser
