"""The worker processes of one ``qexp-search``: started together, replaced when killed, sent home at the end."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

from qexp.search_plan import Plan

log = logging.getLogger(__name__)


class Crew:
    """The worker processes of this command; one that is killed is replaced, one that cannot start is not."""

    def __init__(self, plan: Plan, size: int) -> None:
        self.plan, self.size, self.spare = plan, size, 3 * size
        threads = str(max(1, (os.cpu_count() or 1) // max(1, size)))
        self.environment = {"OMP_NUM_THREADS": threads, **os.environ}
        (plan.home / "workers").mkdir(parents=True, exist_ok=True)
        self.running = dict(self._start() for _ in range(size))

    def _start(self) -> tuple[str, subprocess.Popen[bytes]]:
        name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        command = [sys.executable, "-m", "qexp.search_worker", self.plan.to_json(), name]
        with self._log_of(name).open("wb") as file:
            return name, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment)

    def look(self) -> bool:
        """Replace who was killed; return whether anybody still works."""
        for name, process in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[name]
            if process.returncode < 0 and self.spare:
                self.spare -= 1
                log.warning("a worker was killed by signal %d; another one takes over", -process.returncode)
                self.running.update([self._start()])
            elif process.returncode:
                log.error("a worker ended with code %d: %s", process.returncode, self._log_of(name))
        return bool(self.running)

    def dismiss(self) -> None:
        """End who still works; their trials are continued by whoever comes next."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait()

    def _log_of(self, name: str) -> Path:
        return self.plan.home / "workers" / f"{name}.log"
