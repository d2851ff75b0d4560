"""Show a run's record to the tracker, once; what is on disk is the truth."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from qexp.core.files import write_text
from qexp.engine.context import Run
from qexp.launch import Setup
from qexp.report import plots
from qexp.report import record as records

log = logging.getLogger(__name__)

FILE = "wandb.txt"  # in the run's folder: where it is in W&B


def publish(work: Run, setup: Setup, choices: Mapping[str, str], sweep: str | None) -> None:
    """Show the record on disk to the tracker; whatever happens here, the record stays."""
    stored = records.read(work.folder / records.FILE_NAME)
    where = setup.tracking.publish(stored, choices, sweep, Path(setup.output_dir), lambda: plots.figures([stored]))
    if where:
        write_text(work.folder / FILE, where)
        log.info("W&B run: %s", where if "://" in where else f"{where} (offline; `wandb sync` uploads it)")


def is_published(work: Run) -> bool:
    """Return whether the tracker has the run: a kill between record and tracker is made good by the next command."""
    return (work.folder / FILE).exists()
