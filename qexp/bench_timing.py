"""Fair times on a machine that is not quiet: contenders take turns in one process, and medians are compared.

A turn lasts a few hundredths of a second and repeats its call as often as fits; A B C A B C lets every disturbance meet
every contender. Before a turn everything rests: threads that libraries keep spinning after a call would otherwise sit
on the next contender's cores. A call that reads weights gets as many copies of them as no last-level cache holds.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypedDict

Call = Callable[[], object]
CACHE_BYTES = 128 << 20  # four times the largest last-level cache a core of today shares with few others
MOST_COPIES = 64
REST_SECONDS = 0.01  # OpenMP's and onnxruntime's threads have gone to sleep by then


class Row(TypedDict):
    """One case, in milliseconds per call: ours, the floor (None: not known) and each peer; medians, and the least."""

    op: str
    backend: str
    m: int
    k: int
    n: int
    group: int
    ours_ms: float
    floor_ms: float | None
    peers: dict[str, float]
    ours_min_ms: float
    peers_min_ms: dict[str, float]


@dataclass(frozen=True)
class Pace:
    """How long to measure: ``rounds`` of turns, each of at least ``turn_seconds``."""

    rounds: int
    turn_seconds: float


FULL, QUICK = Pace(9, 0.03), Pace(2, 0.001)


def interleaved(calls: Mapping[str, Call], pace: Pace) -> dict[str, list[float]]:
    """Return milliseconds per call of every turn, by name. Each call runs twice before, which is where it warms up."""
    repeats = {name: _repeats(call, pace) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(pace.rounds):
        for name, call in calls.items():
            time.sleep(REST_SECONDS)
            call()  # wakes its own threads
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append(1e3 * (time.perf_counter() - began) / repeats[name])
    return times


def row(about: Mapping[str, Any], times: Mapping[str, list[float]], floor_ms: float | None) -> Row:
    """Return the row of one case; ``about`` has op, backend, m, k, n, group, and times["ours"] are ours."""
    peers = {name: each for name, each in times.items() if name != "ours"}
    return Row(
        op=about["op"],
        backend=about["backend"],
        m=about["m"],
        k=about["k"],
        n=about["n"],
        group=about["group"],
        ours_ms=statistics.median(times["ours"]),
        floor_ms=floor_ms,
        peers={name: statistics.median(each) for name, each in peers.items()},
        ours_min_ms=min(times["ours"]),
        peers_min_ms={name: min(each) for name, each in peers.items()},
    )


def in_turn(make: Callable[[], Call], weight_bytes: int, reads_from_memory: bool) -> Call:
    """Return a call that goes through copies of what ``make`` prepares, so that the cache never has the next one."""
    copies = min(math.ceil(CACHE_BYTES / weight_bytes) + 1, MOST_COPIES) if reads_from_memory else 1
    ring = itertools.cycle([make() for _ in range(copies)])
    return lambda: next(ring)()


def machine() -> dict[str, Any]:
    """Return what the figures were made on and with; ``description`` is one line of it."""
    from qexp.launch import environment

    about = environment()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kernels, load = about["kernels"], os.getloadavg()[0]
    parts = [
        f"{about['processor'] or about['platform']}, {cores} of {os.cpu_count()} cores, {about['threads']} threads",
        f"load {load:.1f}, GPU {about['gpu']}",
        f"kernels {kernels['isa']}" + ("" if kernels["compiled"] else f" ({kernels['reason']})"),
        f"torch {about['versions'].get('torch')}, commit {about['commit']}",
    ]
    date = f"{datetime.now(tz=UTC):%Y-%m-%d %H:%M} UTC"
    return about | {"cores": cores, "load": load, "date": date, "description": "; ".join(parts)}


def _repeats(call: Call, pace: Pace) -> int:
    call()
    began = time.perf_counter()
    call()
    return max(1, round(pace.turn_seconds / max(time.perf_counter() - began, 1e-7)))
