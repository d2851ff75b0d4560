"""What a sweep saves: 8 weight-only configurations in one sweep against 8 runs that share nothing.

    python benchmarks/sweep_sharing.py [METHODS BITS]        # both with commas; default rtn,gptq at four widths

Every single run is a process of its own with an empty cache (compiled kernels apart, which are one per machine). Prints
wall and processor seconds of both, their ratios, where the time of a single run goes, and the machine.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS, BITS = sys.argv[1:3] if len(sys.argv) > 2 else ("rtn,gptq", "w4a16,w4a16g128,w3a16,w3a16g128")
JOBS = [(method, bits) for method in METHODS.split(",") for bits in BITS.split(",")]
COMMON = ["tracking=none", "model=embedded"]


def main() -> None:
    """Run both and print what they took."""
    folder = Path(tempfile.mkdtemp())
    warm = folder / "warm"
    run(["method=rtn", "bits=w4a8", "eval.limit=1", "calibration.samples=2"], warm, folder / "warmed")  # the kernels
    words = [[f"method={method}", f"bits={bits}"] for method, bits in JOBS]
    single = [run(job, fresh(folder, i, warm), folder / "single") for i, job in enumerate(words)]
    grid = ["-m", f"method={METHODS}", f"bits={BITS}"]
    together = run(grid, fresh(folder, len(JOBS), warm), folder / "sweep")
    wall, cpu = (sum(one[i] for one in single) for i in (0, 1))
    print(f"{len(JOBS)} configurations: {', '.join(f'{m} {b}' for m, b in JOBS)}")
    print(f"single runs {wall:.0f} s (processor {cpu:.0f} s); one sweep {together[0]:.0f} s ({together[1]:.0f} s)")
    print(f"ratio {together[0] / wall:.3f} by wall, {together[1] / cpu:.3f} by processor")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    processor = json.loads(record(folder))["environment"]["processor"]
    print(f"machine: {processor}, {os.cpu_count()} cores, OMP_NUM_THREADS {threads}")
    print("where the first single run went:")
    for line in single[0][2]:
        print("  " + line)


def record(folder: Path) -> str:
    """Return a record of the sweep, as text."""
    return next((folder / "sweep").glob("*/record.json")).read_text()


def fresh(folder: Path, number: int, warm: Path) -> Path:
    """Return an empty cache that has the compiled kernels."""
    cache = folder / f"cache{number}"
    cache.mkdir(parents=True)
    shutil.copytree(warm / "kernels", cache / "kernels")
    return cache


def run(words: list[str], cache: Path, out: Path) -> tuple[float, float, list[str]]:
    """Run the command; return wall and processor seconds and its lines about time."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "qexp", *words, *COMMON, f"output_dir={out}"],
        env={**os.environ, "QEXP_CACHE": str(cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu, re.findall(r"\d\d I (.* in [\d.]+ s)", done.stderr)


if __name__ == "__main__":
    main()
