"""Seconds and memory of the parts of a program, without changing it: functions are wrapped from outside.

Time goes to the innermost phase that is running, so phases add up to the whole. Memory is the resident set, sampled by
a thread (torch releases the interpreter lock while it computes).
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")


class Meter:
    """Wall seconds, CPU seconds (all threads) and peak resident bytes by phase."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self._stack = ["other"]
        self._since = (time.perf_counter(), time.process_time())
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[Meter]:
        """Measure until the block ends."""
        sampler = threading.Thread(target=self._sample, daemon=True)
        self._since = (time.perf_counter(), time.process_time())
        sampler.start()
        try:
            yield self
        finally:
            self._charge()
            self._stop.set()
            sampler.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what runs inside to ``name``."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def wrap(self, place: str, name: str) -> None:
        """Charge every call of ``place``, "module:attribute" or "module:Class.method", to phase ``name``."""
        module, _, path = place.partition(":")
        *owners, leaf = path.split(".")
        owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
        original: Callable[..., Any] = getattr(owner, leaf)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, leaf, timed)

    def _charge(self) -> None:
        now = (time.perf_counter(), time.process_time())
        self.wall[self._stack[-1]] += now[0] - self._since[0]
        self.cpu[self._stack[-1]] += now[1] - self._since[1]
        self._since = now

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            phase = self._stack[-1]
            self.peak[phase] = max(self.peak[phase], resident_bytes())


def resident_bytes() -> int:
    """Return the resident set of this process (Linux; 0 elsewhere)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * PAGE if statm.exists() else 0
