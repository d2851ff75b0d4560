"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it: a reader sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
