"""What runs have in common is made once: files named by what determines them, below one folder of bounded size.

Safe under concurrency: of several processes that want the same file one makes it and the others wait; it is moved into
place when whole; nothing is removed while any run uses the folder. What was used longest ago goes first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from qexp.core.files import settle, write_text

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

USERS = ".users"
BOUNDED = ("generated", "calibration", "baseline", "float")  # kernels and converted models are few and stay
DEFAULT_GB = 20.0
REMEMBERED = 1 << 24  # bytes of a file from which on hashing is worth remembering
DAY = 86400.0


def cache_folder() -> Path:
    """Return where what can be made again is kept: $QEXP_CACHE, else ~/.cache/qexp."""
    return Path(os.environ.get("QEXP_CACHE") or Path.home() / ".cache" / "qexp")


def file_digest(file: Path) -> str:
    """Return the sha256 of a file; of large ones it is remembered for as long as size and time of change stay."""
    about = file.stat()
    name = hashlib.sha256(f"{file.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:32]
    note = cache_folder() / "digests" / name
    if about.st_size > REMEMBERED and note.exists():
        return note.read_text(encoding="ascii")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if about.st_size > REMEMBERED:
        write_text(note, digest)
    return digest


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

    if _is_whole(path):
        with suppress(FileNotFoundError):
            os.utime(path)  # used now
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not _is_whole(path):
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            save_file(make(), part)
            settle(part, path)
    return path


def _is_whole(path: Path) -> bool:
    """Return whether the file is there and as long as its header says; one that is not is made again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return True
    except FileNotFoundError:
        return False
    except SafetensorError as error:
        log.warning("%s is damaged (%s) and is made again", path, error)
        return False


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
    """Remove the files used longest ago until ``most`` bytes are left; return how many.

    While a run uses the folder, only what was not touched for a day.
    """
    with (folder / USERS).open("a+") as users:
        before = math.inf
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            before = time.time() - DAY
        files = [file for name in BOUNDED for file in (folder / name).rglob("*") if file.is_file()]
        stats = {file: file.stat() for file in files}
        total, gone = sum(about.st_size for about in stats.values()), 0
        for file in sorted(files, key=lambda file: stats[file].st_mtime_ns):
            if total <= most or stats[file].st_mtime > before:
                break
            file.unlink()
            total, gone = total - stats[file].st_size, gone + 1
    if gone:
        log.info("removed %d files from %s, which may hold %.3g GB (QEXP_CACHE_GB)", gone, folder, most / 1e9)
    return gone
