"""What runs have in common is made once: files named by what determines them, below one folder of bounded size.

Safe under concurrency: of several processes that want the same file one makes it and the others wait; it is moved into
place when whole; nothing is removed while any run uses the folder. What was used longest ago goes first.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

USERS = ".users"
BOUNDED = ("generated", "calibration", "baseline", "float")  # kernels and converted models are few and stay
DEFAULT_GB = 20.0


def limit() -> float:
    """Return how many bytes may stay: $QEXP_CACHE_GB (10^9 bytes each), else 20 GB."""
    try:
        return float(os.environ.get("QEXP_CACHE_GB") or DEFAULT_GB) * 1e9
    except ValueError:
        log.warning("QEXP_CACHE_GB=%s is no number; %g GB", os.environ["QEXP_CACHE_GB"], DEFAULT_GB)
        return DEFAULT_GB * 1e9


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> Path:
    """Return ``path``, a safetensors file; if it is not there, make its tensors, write beside it and rename."""
    from safetensors.torch import save_file

    with suppress(FileNotFoundError):
        os.utime(path)  # used now
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            save_file(make(), part)
            part.replace(path)
    return path


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep what is in ``folder`` while a run uses it; whoever leaves it last makes room."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / USERS).open("a+") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)
    trim(folder, limit())


def trim(folder: Path, most: float) -> int:
    """Remove the files used longest ago until ``most`` bytes are left; return how many. None while a run uses any."""
    with (folder / USERS).open("a+") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        files = [file for name in BOUNDED for file in (folder / name).rglob("*") if file.is_file()]
        stats = {file: file.stat() for file in files}
        total, gone = sum(about.st_size for about in stats.values()), 0
        for file in sorted(files, key=lambda file: stats[file].st_mtime_ns):
            if total <= most:
                break
            file.unlink()
            total, gone = total - stats[file].st_size, gone + 1
    if gone:
        log.info("removed %d files from %s, which may hold %.3g GB (QEXP_CACHE_GB)", gone, folder, most / 1e9)
    return gone
