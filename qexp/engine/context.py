"""What a run carries through the engine: its folder, store, seed and a way to show progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.engine.shelf import Shelf, shelf_for
from qexp.engine.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from qexp.models.view import ModelView

log = logging.getLogger(__name__)

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]


def quiet(_: str, items: Iterable[Any]) -> Iterable[Any]:
    """Show no progress."""
    return items


class MicroBatches:
    """How many sequences a learning step takes at once: what it wants, or what has fitted into memory so far."""

    def __init__(self) -> None:
        self._most: int | None = None

    def size(self, wanted: int) -> int:
        """Return the number of sequences."""
        return wanted if self._most is None else min(wanted, self._most)

    def halve(self, tried: int) -> None:
        """Remember that ``tried`` sequences do not fit."""
        self._most = tried // 2
        log.warning("out of memory with %d sequences at once: %d from now on", tried, self._most)


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
    streams: str = "auto"  # where they are kept
    shared: Path | None = None  # where runs of one sweep share what the float model does; None outside a sweep
    parts: dict[str, Any] = field(default_factory=dict)  # what the fingerprint is the hash of

    @property
    def store(self) -> Store:
        """Return the store of finished blocks."""
        return Store(self.folder / "blocks", self.warnings)

    def shelf(self, view: ModelView, tokens: Tensor, streams: int) -> Shelf:
        """Return where to keep so many streams of hidden states for ``tokens``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = streams * tokens.numel() * view.config.hidden_size * view.model.dtype.itemsize
        return shelf_for(self.streams, needed, view.model.device, self.folder)


class WarningCollector(logging.Handler):
    """Append the text of warnings to a list."""

    def __init__(self, target: list[str]) -> None:
        super().__init__(level=logging.WARNING)
        self.target = target

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.target.append(record.getMessage())
