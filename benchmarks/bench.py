"""What the benchmarks share: the machine in words, and a run composed as the command line composes it."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Any

from qexp import compose
from qexp.core.build import build
from qexp.launch import Setup, environment


def machine() -> str:
    """Return date, processor, cores this process may use, threads, load and versions: what a figure means without."""
    about = environment()
    versions = ", ".join(
        f"{name} {about['versions'][name]}" for name in ("torch", "transformers") if name in about["versions"]
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    return (
        f"{datetime.now(tz=UTC):%Y-%m-%d %H:%M} UTC; {about['processor'] or about['platform']}, {cores} of "
        f"{os.cpu_count()} cores, {about['threads']} threads, load {load:.1f}, GPU {about['gpu']}; {versions}; "
        f"commit {about['commit']}"
    )


def composed(overrides: list[str]) -> dict[str, Any]:
    """Return the resolved config that ``qexp <overrides>`` runs."""
    with compose.hydra():
        return compose.composed(overrides)


def setup_of(config: dict[str, Any]) -> Setup:
    """Return the built parts of a run. Raises: UserError as the command does."""
    setup = Setup(**{key: build(config[key], key) for key in Setup.__annotations__})
    setup.check()
    return setup


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, padded so that it reads in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
