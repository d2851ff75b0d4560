"""Progress bars that know when to be quiet.

On a terminal a bar with the remaining time is drawn on stderr (stdout stays clean for tables); bars may be nested.
Anywhere else (a file, CI, a cluster's log) nothing is drawn: one log line closes the loop, and if it is long, a line
every few minutes says how far it is and what is left.
Log lines and bars share stderr without mixing as long as the log goes through :class:`StderrHandler`.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
log = logging.getLogger(__name__)

SECONDS_OF_SILENCE = 120.0  # in a log, between two lines of one loop


def track(description: str, iterable: Iterable[T], total: int | None = None) -> Iterator[T]:
    """Yield the items of ``iterable`` and show how far it is; ``total`` is their number where ``len`` cannot tell."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    console = _stderr_console()
    return (_drawn if console.is_terminal else _logged)(description, iterable, total)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Write log lines to whatever ``sys.stderr`` is now: while a bar is drawn, that is rich's proxy above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # StreamHandler stores it; we must ask each time
        """The current stderr."""
        return sys.stderr


@functools.cache
def _stderr_console() -> Console:
    """One console for one terminal: nested bars can only share the screen through the same console."""
    from rich.console import Console

    return Console(stderr=True)


def _drawn(description: str, iterable: Iterable[T], total: int | None) -> Iterator[T]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_stderr_console(), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total)
        for item in iterable:
            yield item
            bar.advance(task)


def _logged(description: str, iterable: Iterable[T], total: int | None) -> Iterator[T]:
    start, done = time.monotonic(), 0
    told = start
    for item in iterable:
        yield item
        done, now = done + 1, time.monotonic()
        if total and done < total and now - told >= SECONDS_OF_SILENCE:
            left = (now - start) / done * (total - done)
            log.info("%s: %d of %d, about %.0f min left", description, done, total, max(1, left / 60))
            told = now
    count = str(done) if total in (None, done) else f"{done} of {total}"
    log.info("%s: %s in %.1f s", description, count, time.monotonic() - start)
