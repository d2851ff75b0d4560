"""The index of a folder of runs: ``<output_dir>/index.csv``, one line per run, for people and spreadsheets.

What was asked for, where it is, its status, seconds and metrics. It is a view: each line is made from the run's folder
under a lock, and a restarted sweep puts right what a kill has left behind.
"""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qexp.core.files import write_text

FILE = "index.csv"
CLAIM = "fingerprint.json"
LOCKS = ".locks"
FIRST = ("run", "status", "seconds", "overrides", "cause", "host", "pid", "begun")
Line = dict[str, str]


def begun(folder: Path, overrides: str) -> None:
    """Note that this process computes the run of ``folder`` from now on."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    own = {"status": "running", "host": socket.gethostname(), "pid": str(os.getpid()), "begun": now, "cause": ""}
    _change(folder.parent, {folder.name: own | ({"overrides": overrides} if overrides else {})})


def ended(folder: Path) -> None:
    """Note how the run of ``folder`` ended, as its record tells; without one it was interrupted or never began."""
    _change(folder.parent, {folder.name: _line(folder)})


def mend(output: Path) -> None:
    """Put every line right: what a killed process left as running, runs that the index misses, runs that are gone."""
    known = read(output)
    folders = {file.parent.name for file in output.glob(f"*/{CLAIM}")}
    wrong = [run for run in folders | known.keys() if known.get(run, {}).get("status") not in ("completed", "failed")]
    gone = [run for run in known if run not in folders]
    _change(output, {run: _line(output / run) for run in {*wrong, *gone} if not is_held(output / run)})


def is_held(folder: Path) -> bool:
    """Return whether a process computes the run of ``folder`` now."""
    path = lock_of(folder)
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def unfinished(output: Path) -> str:
    """Return which runs of a folder have not ended, in one line; nothing if all have, or there is no index."""
    open_runs = {run for run, line in read(output).items() if line["status"] in ("running", "interrupted")}
    held = {run for run in open_runs if is_held(output / run)}
    told = [f"{len(runs)} {what}" for what, runs in (("running", held), ("interrupted", open_runs - held)) if runs]
    return f"{', '.join(told)}: {output / FILE}" if told else ""


def lock_of(folder: Path) -> Path:
    """Return the lock file of a run's folder."""
    return folder.parent / LOCKS / f"{folder.name}.lock"


def read(output: Path) -> dict[str, Line]:
    """Return the lines of the index by run, in the order in which they began."""
    try:
        text = (output / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return {line["run"]: line for line in csv.DictReader(io.StringIO(text))}


def _change(output: Path, lines: dict[str, Line | None]) -> None:
    """Merge into the index; None removes a line."""
    if not lines:
        return
    (output / LOCKS).mkdir(parents=True, exist_ok=True)
    with FileLock(output / LOCKS / "index.lock"):
        known = read(output)
        for run, line in lines.items():
            if line is None:
                known.pop(run, None)
            else:
                known[run] = {"run": run} | known.get(run, {}) | line
        if not known:  # a user's mistake was the first run here: nothing stays behind
            (output / FILE).unlink(missing_ok=True)
            (output / LOCKS / "index.lock").unlink(missing_ok=True)
            return
        keys = dict.fromkeys([*FIRST, *sorted({key for line in known.values() for key in line})])
        out = io.StringIO()
        writer = csv.DictWriter(out, list(keys), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())
        write_text(output / FILE, out.getvalue())


def _line(folder: Path) -> Line | None:
    """Return status, seconds, cause and metrics of a run as its record tells; None for a folder that is gone."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "interrupted"} if folder.exists() else None
    cost: dict[str, Any] = record.get("cost", {})
    seconds = sum(value for key, value in cost.items() if key.endswith("_seconds") and value is not None)
    metrics = {key: f"{value:.6g}" for key, value in record["metrics"].items() if isinstance(value, int | float)}
    line = {"status": record["status"], "seconds": f"{seconds:.1f}", "cause": record.get("error", ""), **metrics}
    return {key: " ".join(value.split()) for key, value in line.items()}
