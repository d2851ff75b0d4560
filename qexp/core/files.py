"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it: a reader sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the name without the content
    part.replace(path)


def settle(part: Path, path: Path) -> None:
    """Move a file that was written under another name into place, its content on the disk first."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
