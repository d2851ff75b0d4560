"""What a run carries through the engine: its folder, store, seed and a way to show progress."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qexp.engine.store import Store

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]


def quiet(_: str, items: Iterable[Any]) -> Iterable[Any]:
    """Show no progress."""
    return items


def cache_folder() -> Path:
    """Return where what can be made again is kept: $QEXP_CACHE, else ~/.cache/qexp."""
    return Path(os.environ.get("QEXP_CACHE") or Path.home() / ".cache" / "qexp")


@dataclass
class Run:
    """One run: ``warnings`` collects every warning of qexp's loggers, for the record."""

    folder: Path
    name: str
    fingerprint: str
    seed: int
    device: str
    progress: Progress
    cache: Path
    model_identity: str  # of the weights before any outliers are injected
    warnings: list[str] = field(default_factory=list)

    @property
    def store(self) -> Store:
        """Return the store of finished blocks."""
        return Store(self.folder / "blocks", self.warnings)


class WarningCollector(logging.Handler):
    """Append the text of warnings to a list."""

    def __init__(self, target: list[str]) -> None:
        super().__init__(level=logging.WARNING)
        self.target = target

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.target.append(record.getMessage())
