"""How long the commands take to answer when there is nothing to compute: medians of five fresh processes.

    python benchmarks/startup.py

Aim: `qexp --help` below 1.5 s. Prints wall and CPU seconds; asserts nothing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import machine, table

REPEATS = 5
BIN = Path(sys.executable).parent
COMMANDS = [
    ["qexp", "--help"],
    ["qexp", "--cfg", "job"],
    ["qexp", "method=nope"],
    ["qexp", "bits.wbits=4"],
    ["qexp-report", "--help"],
    ["qexp-methods", "--help"],
]


def once(command: list[str]) -> tuple[float, float, int]:
    """Return wall seconds, CPU seconds and exit code of one run of a console script."""
    before, began = os.times(), time.perf_counter()
    done = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, check=False)
    wall, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu, done.returncode


def main() -> None:
    """Print the table."""
    rows = []
    for command in COMMANDS:
        runs = [once(command) for _ in range(REPEATS)]
        wall, cpu = (statistics.median(run[i] for run in runs) for i in (0, 1))
        codes = ", ".join(sorted({str(run[2]) for run in runs}))
        rows.append([" ".join(command), f"{wall:.2f}", f"{cpu:.2f}", codes])
    sys.stdout.write(f"{machine()}\n\n{table(['command', 'wall s', 'CPU s', 'exit code'], rows)}\n")


if __name__ == "__main__":
    main()
