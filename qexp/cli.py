"""The command line: what Hydra starts. With sources.py, compose.py and explain.py all that knows Hydra.

Nothing heavy is imported before a run starts, so that ``qexp --help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us; we print one line ourselves

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qexp.compose import CONFIGS, register
from qexp.core.errors import UserError
from qexp.explain import HYDRA_MISTAKES, NO_NAME, check_keys, explain
from qexp.sources import SWEEPS

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

JOB_FILE = "job.json"


@hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name="config")
def job(cfg: DictConfig) -> None:
    """Run one job of a sweep, or the only one."""
    _log_to_stderr()  # again: a launcher may have started this job in a process of its own
    settings = HydraConfig.get()
    choices = {k: str(v) for k, v in settings.runtime.choices.items() if not k.startswith("hydra")}
    group = Path(settings.sweep.dir).name if settings.mode == RunMode.MULTIRUN else None
    try:
        saved = [f"+{key}={value}" for key, value in choices.items() if key.split("/")[0] == SWEEPS]
        if saved and settings.sweeper.get("params") and not group:
            raise UserError(f"{saved[0]} is a sweep", "qexp -m")
        config = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
        check_keys(config)
        from qexp.run import run  # torch: a second that a mistake in the keys need not wait for

        folder = run(config, choices, group)
    except (*HYDRA_MISTAKES, UserError) as error:
        if group:
            raise
        _end(error)  # here, since Hydra would add lines of its own
    if group:
        _leave(Path(settings.runtime.output_dir), {"folder": str(folder)})
    else:
        show([folder])


class SweepSummary(Callback):
    """Say where a sweep is, keep it going past a failed job, and end it with the table of all jobs."""

    def __init__(self) -> None:
        self.jobs = 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Count the jobs: the product of the choices per key."""
        _log_to_stderr()
        asked = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*asked, *config.hydra.overrides.task])
        choices = {o.key_or_group: len(list(o.sweep_string_iterator())) if o.is_sweep_override() else 1 for o in parsed}
        self.jobs = math.prod(choices.values())  # what the command says of a key replaces what the sweep says

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Say which job of the sweep begins."""
        if config.hydra.mode == RunMode.MULTIRUN:
            number = f"{config.hydra.job.num + 1} of {self.jobs}" if self.jobs else str(config.hydra.job.num + 1)
            log.info("job %s: %s", number, config.hydra.job.override_dirname.replace(",", " "))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note a failure where the summary finds it; in a sweep the other jobs go on."""
        settings = job_return.hydra_cfg.hydra if job_return.hydra_cfg else None
        if job_return.status != JobStatus.FAILED or settings is None or settings.mode != RunMode.MULTIRUN:
            return
        error = job_return._return_value
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log.error(
            "%s: %s", settings.job.override_dirname, told, exc_info=None if isinstance(error, UserError) else error
        )
        _leave(Path(settings.runtime.output_dir), {"failed": told, "overrides": settings.job.override_dirname})
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the comparison; exit 1 if a job failed."""
        folder = Path(config.hydra.sweep.dir)
        jobs = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*/{JOB_FILE}"), key=_job_number)]
        done = [Path(job["folder"]) for job in jobs if "folder" in job]
        failed = [f"{job['overrides']}: {job['failed']}" for job in jobs if "failed" in job]
        if done:
            show(done)
        for line in failed:
            sys.stderr.write(f"failed  {line}\n")
        if failed:
            sys.exit(1)


def show(folders: Sequence[Path]) -> None:
    """Print the table of the records in ``folders``, and where they are."""
    from qexp.report import compare, record, rows, table

    found = record.find(folders)
    lines = rows.make(found)
    table.show(lines)
    if len(folders) == 1:
        table.say([f"record: {folders[0] / record.FILE_NAME}"])
    else:
        where = folders[0].parent
        table.say([*compare.summary(lines), "", f"records: {where}"])
        table.say([f"report:  qexp-report {where} --html {where / 'report.html'}"])


def main() -> None:
    """Entry point of ``qexp``: 0 done, 2 a user's mistake (one line), 1 anything else."""
    register()
    try:
        job()
    except (*HYDRA_MISTAKES, UserError) as error:
        _end(error)
    except ValueError as error:
        if not any(known in str(error) for known in (NO_NAME, "Only one of --run")):
            raise
        _end(error)
    except KeyboardInterrupt:
        sys.stderr.write("qexp: stopped; the same command continues where it was\n")
        sys.exit(130)


def _end(error: BaseException) -> NoReturn:
    sys.stderr.write(f"qexp: {explain(error, sys.argv[1:])}\n")
    sys.exit(2)


def _log_to_stderr() -> None:
    from qexp.tracking.progress import StderrHandler

    handler, root = StderrHandler(), logging.getLogger()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("qexp").setLevel(logging.INFO)


def _leave(folder: Path, note: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB_FILE).write_text(json.dumps(note))


def _job_number(file: Path) -> int:
    return int(file.parent.name) if file.parent.name.isdigit() else 0
