"""Who computes a run: one process at a time, on however many machines share the folder.

The owner holds an operating-system lock (flock) on ``<output_dir>/.locks/<run>.lock``. It ends with the process,
however that ends, so nothing is ever stale. A file system that says it has no such locks is refused.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qexp.core.errors import Elsewhere, FailedBefore, UserError
from qexp.core.sweep_index import lock_of
from qexp.engine.context import Run
from qexp.engine.fingerprint import claim
from qexp.report import record as records

log = logging.getLogger(__name__)

BUSY = ("skip", "wait")
PROBE_SECONDS = 1.0  # others look whether a lock is held by taking it for a moment


@contextmanager
def owned(work: Run, *, resume: bool, busy: str) -> Iterator[None]:
    """Hold ``work.folder`` while the run is computed; with ``resume`` false what is in it is removed first.

    ``busy``: when another process has it, ``skip`` the run or ``wait`` until it has not.

    Raises: Elsewhere if another process has it. UserError if the folder is that of another computation.
    """
    path = lock_of(work.folder)
    lock = _locked(path, work.name, wait=busy == "wait")
    try:
        if not resume and work.folder.exists():
            (work.folder / records.FILE_NAME).unlink(missing_ok=True)  # first: half a folder is no finished run
            shutil.rmtree(work.folder)
        claim(work.folder, work.parts)
        yield
    finally:
        _owner_of(path).unlink(missing_ok=True)
        if not work.folder.exists():  # a user's mistake leaves nothing behind
            path.unlink()  # while it is held: who waits for it looks whether its file is still there
        lock.release()
        with suppress(OSError):
            path.parent.rmdir()


def is_finished(work: Run) -> bool:
    """Return whether the folder holds a completed record of this fingerprint."""
    return _record(work, "completed") is not None


def check_failed_before(work: Run) -> None:
    """Raise FailedBefore, with its cause, if the folder holds the failed record of this run."""
    if (record := _record(work, "failed")) is not None:
        raise FailedBefore(record.get("error", "no reason recorded"))


def _record(work: Run, status: str) -> records.Record | None:
    """Return the record of this fingerprint if it is there and has that status."""
    path = work.folder / records.FILE_NAME
    if not path.exists():
        return None
    there = records.read(path)
    return there if there["status"] == status and there["fingerprint"] == work.fingerprint else None


def _locked(path: Path, name: str, wait: bool) -> FileLock:
    """Return the lock, taken. Raises: Elsewhere if another process has it and is not waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(path, fallback_to_soft=False), _owner_of(path)
    try:
        try:
            lock.acquire(timeout=PROBE_SECONDS)
        except Timeout:
            if not wait:
                raise Elsewhere(name, _owner(owner)) from None
            log.info("waiting for %s, which computes %s", _owner(owner), name)
            lock.acquire()
    except (NotImplementedError, OSError) as error:
        raise UserError(
            f"{path} cannot be locked ({error})", "a file system that has locks (flock)", "output_dir=<elsewhere>"
        ) from error
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    owner.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
    return lock


def _owner_of(lock: Path) -> Path:
    return lock.with_suffix(".owner")


def _owner(file: Path) -> str:
    try:
        about = json.loads(file.read_text())
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
