"""The two kinds of failure a user can meet, each told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the configuration or its inputs: exit code 2, one line, no traceback.

    The line has three parts, e.g. ``grid.group=128 does not divide in_features=288 of layer X;
    need a divisor of 288; set method.grid.group=96 or -1``.
    """

    def __init__(self, got: str, need: str = "", override: str = "") -> None:
        super().__init__(
            "; ".join(part for part in (got, need and f"need {need}", override and f"set {override}") if part)
        )


class Elsewhere(UserError):
    """Another process computes this run now."""

    def __init__(self, run: str, owner: str) -> None:
        super().__init__(f"{run} is being computed by {owner}", "its end", "busy=wait to wait for it")


class FailedBefore(UserError):
    """A job of a sweep failed before, with this cause; it is tried again on request only."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"failed before: {' '.join(cause.split())}", "", "retry=true to try again")


class NumericalError(Exception):
    """An algorithm broke down on numbers (non-finite values, a matrix that is not positive definite)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean X?`` plus the sorted list of what is known, for messages about unknown names."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return (f"did you mean {close[0]}? " if close else "") + "known: " + ", ".join(options)


def choose(name: str, value: str, known: Iterable[str], key: str) -> None:
    """Raise :class:`UserError` unless ``value`` is one of ``known``; ``key`` is the config key to set."""
    options = list(known)
    if value not in options:
        raise UserError(f"{name}={value!r} is unknown", nearest(value, options), f"{key}=<one of them>")
