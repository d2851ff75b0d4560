"""The command line: what Hydra starts. With sources.py, compose.py and explain.py all that knows Hydra.

Nothing heavy is imported before a run starts, so that ``qexp --help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us; we print one line ourselves

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qexp import known
from qexp.compose import CONFIGS, register
from qexp.core import sweep_index
from qexp.core.errors import Elsewhere, FailedBefore, UserError
from qexp.core.files import write_text
from qexp.explain import HYDRA_MISTAKES, NO_NAME, check_keys, explain
from qexp.sources import SWEEPS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

log = logging.getLogger(__name__)

JOB_FILE = "job.json"
FOUND_SECONDS = 1.0  # a job that takes less was found, not computed


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
        folder = finished(config, group) or computed(config, choices, group)
    except (*HYDRA_MISTAKES, UserError) as error:
        if group:
            raise
        _end(error)  # here, since Hydra would add lines of its own
    if group:
        _leave(Path(settings.runtime.output_dir), {"folder": str(folder)})
    else:
        show([folder])


def finished(config: dict[str, Any], sweep: str | None) -> Path | None:
    """Return the folder of a run that ended before, known without torch. Raises: FailedBefore in a sweep."""
    ended = known.recall(config) if config["resume"] else None
    if ended is None or "WANDB_SWEEP_ID" in os.environ:  # a W&B agent waits to be shown the run, whenever it was
        return None
    if not ended.failed:
        log.info("finished before, nothing to do (resume=false repeats it): %s", ended.folder)
        return Path(ended.folder)
    if sweep and not config["retry"]:
        raise FailedBefore(ended.failed)
    return None


def computed(config: dict[str, Any], choices: dict[str, str], sweep: str | None) -> Path:
    """Carry the run out, remember that it ended, and return its folder."""
    from qexp.run import run  # torch: a second that a mistake in the keys need not wait for

    looks = known.looks(config)
    folder = run(config, choices, sweep, HydraConfig.get().overrides.task)
    known.remember(config, folder, looks)
    return folder


class SweepSummary(Callback):
    """Say where a sweep is, keep it going past a failed job, and end it with the table of all jobs."""

    open: ClassVar[SweepSummary | None] = None  # the sweep that began and has no table yet

    def __init__(self) -> None:
        self.jobs, self.seconds, self.began = 0, list[float](), 0.0
        self.folder = Path()

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Count the jobs: the product of the choices per key."""
        _log_to_stderr()
        SweepSummary.open, self.folder = self, Path(config.hydra.sweep.dir)
        asked = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*asked, *config.hydra.overrides.task])
        choices = {o.key_or_group: len(list(o.sweep_string_iterator())) if o.is_sweep_override() else 1 for o in parsed}
        self.jobs = math.prod(choices.values())  # what the command says of a key replaces what the sweep says

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Say which job of the sweep begins."""
        if config.hydra.mode == RunMode.MULTIRUN:
            number = f"{config.hydra.job.num + 1} of {self.jobs}" if self.jobs else str(config.hydra.job.num + 1)
            asked = config.hydra.job.override_dirname.replace(",", " ")
            log.info("job %s%s: %s", number, self._remaining(config.hydra.job.num), asked)
            self.began = time.monotonic()

    def _remaining(self, job: int) -> str:
        """Return how long the rest takes if its jobs take as long as those computed so far."""
        if not self.seconds or not self.jobs:
            return ""
        left = (self.jobs - job) * statistics.median(self.seconds)
        return f" (about {left / 60:.0f} min left)" if left > 90 else f" (about {left:.0f} s left)"

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note a failure where the summary finds it; in a sweep the other jobs go on."""
        settings = job_return.hydra_cfg.hydra if job_return.hydra_cfg else None
        if settings is None or settings.mode != RunMode.MULTIRUN:
            return
        if (seconds := time.monotonic() - self.began) > FOUND_SECONDS:
            self.seconds.append(seconds)
        if job_return.status != JobStatus.FAILED:
            return
        error, asked = job_return._return_value, settings.job.override_dirname
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log.error("%s: %s", asked, told, exc_info=None if isinstance(error, UserError) else error)
        kind = "elsewhere" if isinstance(error, Elsewhere) else "failed"
        _leave(Path(settings.runtime.output_dir), {kind: " ".join(told.split()), "overrides": asked})
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the comparison; exit 1 if a job failed."""
        if not self.tell():
            sys.exit(1)

    def tell(self) -> bool:
        """Print what the jobs of the sweep left, once; return whether none failed or was lost."""
        SweepSummary.open = None
        jobs = [json.loads(file.read_text()) for file in sorted(self.folder.glob(f"*/{JOB_FILE}"), key=_job_number)]
        for output in {Path(job["folder"]).parent for job in jobs if "folder" in job}:
            sweep_index.mend(output)
        lost = self.jobs - len(jobs) if self.jobs else 0
        try:
            if done := [Path(job["folder"]) for job in jobs if "folder" in job]:
                show(done)
        finally:
            for job in jobs:
                for kind in job.keys() & {"elsewhere", "failed"}:
                    sys.stderr.write(f"{kind}  {job['overrides']}: {job[kind]}\n")
            if lost > 0:
                sys.stderr.write(f"lost  {lost} jobs ended without a word (killed?); the same command continues them\n")
        return lost <= 0 and not any("failed" in job for job in jobs)


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
        with _table_if_given_up():
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


@contextmanager
def _table_if_given_up() -> Iterator[None]:
    """Print a sweep's table where its launcher ends with an exception (Ray, Slurm) and Hydra ends nothing."""
    try:
        yield
    except Exception as error:
        if SweepSummary.open is not None and not isinstance(error, (*HYDRA_MISTAKES, UserError)):
            SweepSummary.open.tell()
        raise


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
    write_text(folder / JOB_FILE, json.dumps(note))


def _job_number(file: Path) -> int:
    return int(file.parent.name) if file.parent.name.isdigit() else 0
