"""What a sweep loses when it is killed: JOBS runs, kill -9 KILLS times at random, the same command until all is done.

    python benchmarks/sweep_killed.py [JOBS KILLS]        # default 200 20: about 20 minutes on two cores

Each time the whole process group dies, after a random number of further runs and up to 0.6 s. Prints, after every kill,
how many runs are completed, half done, and computed twice (a completed record that changed), and in the end the index.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOBS, KILLS = (int(word) for word in (sys.argv[1:3] or ("200", "20")))
OUT = Path(tempfile.mkdtemp())
COMMAND = [
    sys.executable, "-m", "qexp", "-m", "method=rtn,gptq", f"seed=range({JOBS // 2})", "bits=w4a16", "tracking=none",
    "eval.limit=1", "eval.window_tokens=64", "calibration.samples=2", "calibration.tokens=32", f"output_dir={OUT}",
]  # fmt: skip


def main() -> None:
    """Kill, look, and go on; print what was found."""
    rng, seen, twice, began = random.Random(0), dict[str, str](), list[str](), time.monotonic()
    for kill in range(1, KILLS + 1):
        killed(rng)
        look(seen, twice)
        half = sum(not (blocks.parent / "record.json").exists() for blocks in OUT.glob("*/blocks"))
        spent = time.monotonic() - began
        print(f"kill {kill}: {len(seen)} completed, {half} half done, {len(twice)} twice, {spent:.0f} s", flush=True)
    code = subprocess.run(COMMAND, capture_output=True, check=False).returncode
    look(seen, twice)
    with (OUT / "index.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    told = {status: sum(line["status"] == status for line in lines) for status in {line["status"] for line in lines}}
    print(f"exit {code}: {len(seen)} completed, {len(twice)} twice, index {told}, {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    again = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    look(seen, twice)
    print(f"again: {again.stderr.count('nothing to do')} found in {time.monotonic() - began:.0f} s, {len(twice)} twice")


def killed(rng: random.Random) -> None:
    """Start the sweep and kill it some runs later."""
    sweep = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    goal = min(JOBS - 1, ended() + rng.randint(1, 17))
    while ended() < goal and sweep.poll() is None:
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.6))
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()


def ended() -> int:
    """Return how many runs have a record."""
    return len(list(OUT.glob("*/record.json")))


def look(seen: dict[str, str], twice: list[str]) -> None:
    """Add the completed records to ``seen``, and to ``twice`` those that are not as they were."""
    now = {}
    for file in OUT.glob("*/record.json"):
        content = file.read_bytes()
        if json.loads(content)["status"] == "completed":
            now[file.parent.name] = f"{file.stat().st_mtime_ns} {hashlib.sha256(content).hexdigest()}"
    twice.extend(name for name, was in seen.items() if now.get(name) != was)
    seen.update(now)


if __name__ == "__main__":
    main()
