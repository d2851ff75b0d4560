"""The command line: the only file that knows Hydra. It composes the config, explains mistakes and ends sweeps.

Nothing heavy is imported before a run starts, so that ``qexp --help`` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions reach us; we print one line ourselves

import hydra
from hydra._internal.sources_registry import SourcesRegistry  # the one way to add a source from outside hydra_plugins
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qexp.core.errors import UserError
from qexp.schema import COMMON_BITS, QexpConfig, bits_of, explain

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

JOB_FILE = "job.json"


class QexpSearchPath(SearchPathPlugin):
    """Add the names of bits and the config folders of other packages (entry points ``qexp.configs``)."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append them behind qexp's own."""
        search_path.append("qexp-bits", "qexp://bits")
        for entry in entry_points(group="qexp.configs"):
            search_path.append(f"qexp-{entry.name}", f"pkg://{entry.value}")


class BitsSource(ConfigSource):
    """The group ``bits``: 600 names of one pattern, read from the name instead of from 600 files."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme of the search path entry."""
        return "qexp"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what a name like bits/w4a4kv4 says."""
        node = bits_of(_bits_name(config_path) or "")
        assert node is not None
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(node), header={"package": None})

    def is_group(self, config_path: str) -> bool:
        """Return whether this is the group itself."""
        return config_path.strip("/") in ("", "bits")

    def is_config(self, config_path: str) -> bool:
        """Return whether this is a name of the pattern."""
        name = _bits_name(config_path)
        return name is not None and bits_of(name) is not None

    def available(self) -> bool:
        """Return True: the names are in this program."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names to show: the common ones."""
        if config_path.strip("/") == "bits" and results_filter in (None, ObjectType.CONFIG):
            return sorted(COMMON_BITS)
        return ["bits"] if not config_path.strip("/") and results_filter in (None, ObjectType.GROUP) else []


def _bits_name(config_path: str) -> str | None:
    group, _, name = config_path.removesuffix(".yaml").rpartition("/")
    return name if group == "bits" else None


def register() -> None:
    """Tell Hydra our schema, the names of bits (w4a4kv4, ...) and where other packages keep configs."""
    ConfigStore.instance().store(name="base_config", node=QexpConfig)
    SourcesRegistry.instance().register(BitsSource)
    Plugins.instance().register(QexpSearchPath)


@hydra.main(version_base="1.3", config_path="pkg://qexp.conf", config_name="config")
def job(cfg: DictConfig) -> None:
    """Run one job of a sweep, or the only one."""
    from qexp.run import run
    from qexp.tracking.progress import StderrHandler

    _log_to(StderrHandler())
    settings = HydraConfig.get()
    choices = {k: str(v) for k, v in settings.runtime.choices.items() if not k.startswith("hydra")}
    config = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    config.pop("sweeps", None)
    group = Path(settings.sweep.dir).name if settings.mode == RunMode.MULTIRUN else None
    folder = run(config, choices, group)
    if group:
        _leave(Path(settings.runtime.output_dir), {"folder": str(folder)})
    else:
        show([folder])


class SweepSummary(Callback):
    """Keep a sweep going past a failed job, and end it with the table of all jobs."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note a failure where the summary finds it; in a sweep the other jobs go on."""
        settings = job_return.hydra_cfg.hydra if job_return.hydra_cfg else None
        if job_return.status != JobStatus.FAILED or settings is None or settings.mode != RunMode.MULTIRUN:
            return
        error = job_return._return_value
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log.error("%s: %s", settings.job.override_dirname, told, exc_info=None if isinstance(error, UserError) else error)
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
    from qexp.report import record, rows, table

    found = record.find(folders)
    lines = rows.make(found)
    table.show(lines)
    table.say([f"records: {folders[0] if len(folders) == 1 else folders[0].parent}"])


def main() -> None:
    """Entry point of ``qexp``: 0 done, 2 a user's mistake (one line), 1 anything else."""
    register()
    try:
        job()
    except (HydraException, OmegaConfBaseException, UserError) as error:
        sys.stderr.write(f"qexp: {explain(error)}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("qexp: stopped; the same command continues where it was\n")
        sys.exit(130)


def _log_to(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("qexp").setLevel(logging.INFO)


def _leave(folder: Path, note: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB_FILE).write_text(json.dumps(note))


def _job_number(file: Path) -> int:
    return int(file.parent.name) if file.parent.name.isdigit() else 0
