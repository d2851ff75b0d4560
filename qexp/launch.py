"""Around the main path: check the parts of a run, name it by what it computes, keep its record whatever happens."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from qexp import known
from qexp.core import sweep_index
from qexp.core.cache import cache_folder
from qexp.core.errors import UserError, choose
from qexp.core.memory import keep_freed_memory
from qexp.core.method import Method
from qexp.data.calibration import Calibration
from qexp.engine.context import Run, WarningCollector
from qexp.engine.fingerprint import digest, digest_of
from qexp.engine.shelf import PLACES
from qexp.engine.streams import MICRO_TOKENS
from qexp.eval.evaluation import Evaluation
from qexp.models.load import ModelSource
from qexp.ownership import BUSY
from qexp.report import published
from qexp.report import record as records
from qexp.tracking.progress import track
from qexp.tracking.wandb import Tracker

log = logging.getLogger(__name__)

VERSION = 5  # of the engine: raised when its numbers change
PACKAGES = ("qexp", "torch", "transformers", "datasets", "lm-eval", "safetensors", "wandb", "hydra-core")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The built parts of a run; the keys are those of the config."""

    model: ModelSource
    method: Method
    bits: Mapping[str, Any]
    calibration: Calibration
    eval: Evaluation
    tracking: Tracker
    seed: int
    device: str
    output_dir: str
    resume: bool
    retry: bool
    busy: str
    streams: str

    def check(self) -> None:
        """Raise UserError for what can be known wrong before anything heavy is done."""
        for key, options in (("device", ("auto", "cpu", "cuda")), ("streams", PLACES), ("busy", BUSY)):
            choose(key, getattr(self, key), options, key)
        for part in (self.model, self.calibration, self.eval, self.tracking):
            part.check()
        existing = next(p for p in (Path(self.output_dir), *Path(self.output_dir).absolute().parents) if p.exists())
        if not existing.is_dir():
            raise UserError(f"output_dir={self.output_dir}: {existing} is a file", "a folder", "output_dir=<folder>")


def begin(setup: Setup, sweep: str | None) -> Run:
    """Return the run with its fingerprint and folder, one of ``sweep`` if it is one's; nothing is on disk yet."""
    keep_freed_memory()
    device = device_of(setup.device)
    model = setup.model.identity()
    parts = {
        "engine": VERSION,
        "model": model,
        "method": _plain(setup.method, "method") | {"versions": setup.method.versions()},
        "micro_tokens": MICRO_TOKENS,
        "bits": dict(setup.bits),
        "calibration": setup.calibration.identity(),
        "eval": setup.eval.identity(),
        "seed": setup.seed,
        "device": device,
    }
    fingerprint = digest(parts)
    name = f"{setup.method.name}-{setup.bits['name']}-{Path(setup.model.name).name}"  # of a path its last part
    folder = Path(setup.output_dir) / f"{name}-{fingerprint[:10]}"
    cache = cache_folder()
    base = {key: value for key, value in model.items() if key != "outliers"}
    return Run(
        folder=folder, name=name, fingerprint=fingerprint, seed=setup.seed, device=device, progress=track,
        cache=cache, shared=cache / "float" / f"v{VERSION}" if sweep else None, streams=setup.streams, parts=parts,
        model_identity=digest({**base, "device": device}),
    )  # fmt: skip


@contextlib.contextmanager
def recording(work: Run, config: Mapping[str, Any], asked: Sequence[str]) -> Iterator[None]:
    """Collect warnings; on any failure but a user's mistake leave a record that says ``failed``.

    The index of the folder of runs tells of it from the beginning; ``asked`` are the overrides that it shows.
    """
    collector, looks = WarningCollector(work.warnings), known.looks(config)
    sweep_index.begun(work.folder, " ".join(asked))
    _forget_peak_memory()
    logging.getLogger("qexp").addHandler(collector)
    try:
        yield
    except UserError:
        _remove_if_empty(work.folder)
        raise
    except Exception as error:
        failed = record_of(work, config, {}) | {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        records.write(work.folder, cast("records.Record", failed))
        known.remember(config, work.folder, looks)
        raise
    finally:
        logging.getLogger("qexp").removeHandler(collector)
        sweep_index.ended(work.folder)


def write(work: Run, config: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Write the record of a run that completed."""
    records.write(work.folder, cast("records.Record", record_of(work, config, measured)))


def record_of(work: Run, config: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record (schema of design.md section 3) of a run."""
    cost = {"peak_rss_bytes": _peak_memory(), **measured.get("cost", {})}
    if work.device == "cuda":
        import torch

        cost["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return {
        "schema": records.SCHEMA,
        "status": "completed",
        "fingerprint": work.fingerprint,
        "name": work.name,
        "config": dict(config),
        "warnings": work.warnings,
        "environment": environment(),
        "metrics": measured.get("metrics", {}),
        "window_losses": measured.get("window_losses", {}),
        "cost": cost,
        "blocks": [asdict(block) for block in measured.get("blocks", [])],
        "diagnostics": measured.get("diagnostics", {}),
        "published": published.match(config),
    }


def environment() -> dict[str, Any]:
    """Return what the numbers were made with: versions, commit, processor, threads, kernels."""
    import torch

    from qexp.kernels.ops import kernel_info

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "kernels": kernel_info(),
        "commit": _commit(),
        "command": Path(sys.argv[0]).name + " " + " ".join(sys.argv[1:]),
        "versions": versions,
    }


def device_of(wanted: str) -> str:
    """Return cpu or cuda; auto is cuda where there is one. Raises: UserError for cuda without a GPU."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # Hessians need all their bits
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU", "a CUDA device and a CUDA build of torch", "device=cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _plain(member: Any, key: str) -> Any:
    """Return a member (or mapping of members) as plain data with class names, for the fingerprint; ``key`` names it."""
    if is_dataclass(member) and not isinstance(member, type):
        values = {f.name: _plain(getattr(member, f.name), f"{key}.{f.name}") for f in fields(member)}
        if values.get("load"):
            values["load"] = digest_of(Path(values["load"]), f"{key}.load")
        return {"class": type(member).__qualname__} | values
    if isinstance(member, Mapping):
        # A list: the order of transforms matters.
        return [[name, _plain(value, f"{key}.{name}")] for name, value in member.items()]
    return list(member) if isinstance(member, tuple | list) else member


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder in which nothing but its claim was made: a user's mistake leaves nothing behind."""
    blocks = folder / "blocks"
    if not (blocks.exists() and any(blocks.iterdir())) and not (folder / records.FILE_NAME).exists():
        shutil.rmtree(folder, ignore_errors=True)


def _forget_peak_memory() -> None:
    """Start counting peak memory anew, so that a job of a sweep does not report its predecessors'."""
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Return the peak resident bytes since :func:`_forget_peak_memory`, or of the process where there is no /proc."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
