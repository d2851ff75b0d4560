"""Weights & Biases as a view of finished records.

A run is published once, at its end, from the record that was written to disk: so W&B and ``record.json`` carry the same
values by construction, and a run that is resumed or repeated never leaves half a W&B run behind.
The record is the truth. Whatever goes wrong here is a warning, never a lost run: no account means offline, no network
means offline, and an offline run is complete (``wandb sync`` uploads it later, ``wandb leet`` shows it locally).

Conventions: ``group`` is the sweep, ``job_type`` is ptq (search: the front that a search found), tags and top-level
config keys are the choices made on the command line (what one filters and groups by), ``cfg`` is the resolved config,
the summary holds the record's metrics under their own flat keys and the gap, ``block/*`` is a history over the blocks
of the model and ``learn/*`` one over the steps of what was learned.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, cast

from qexp.core.errors import UserError, choose
from qexp.core.gaps import gaps
from qexp.tracking import history

if TYPE_CHECKING:
    import wandb
    from matplotlib.figure import Figure

Record: TypeAlias = Mapping[str, Any]
Mode: TypeAlias = Literal["online", "offline", "disabled", "shared"]
Figures: TypeAlias = "Callable[[], Mapping[str, Figure]]"

log = logging.getLogger(__name__)

TAGS = ("method", "bits", "model")


class Tracker(Protocol):
    """What a run needs of its tracking: a check before the work starts, one publication after it ended."""

    def check(self) -> None:
        """Raise UserError, before any work is done, for settings that cannot be honoured."""

    def publish(
        self, record: Record, choices: Mapping[str, str], group: str | None, folder: Path, figures: Figures
    ) -> str | None:
        """Show the finished ``record`` elsewhere and return where (URL or folder), or None."""

    def tabulate(self, name: str, table: history.Table, folder: Path) -> str | None:
        """Show a table about the runs of the sweep ``name`` beside them, and return where, or None."""


@dataclass(frozen=True, kw_only=True)
class NoTracking:
    """``tracking=none``: the record on disk is all there is."""

    def check(self) -> None:
        """Accept."""

    def publish(
        self,
        record: Record,
        choices: Mapping[str, str],
        group: str | None,
        folder: Path,
        figures: Figures,
    ) -> None:
        """Do nothing."""

    def tabulate(self, name: str, table: history.Table, folder: Path) -> None:
        """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """One W&B run per record."""

    mode: str  # auto | online | offline
    project: str
    entity: str | None  # user or team; None is the account's default
    connect_seconds: float  # then the run is kept offline
    upload_seconds: float  # longest wait for the upload at the end; what is missing stays on disk for `wandb sync`

    def check(self) -> None:
        """Raise UserError for an unknown mode, and for online without a login (W&B would wait at a prompt)."""
        choose("tracking.mode", self.mode, ("auto", "online", "offline"), "tracking.mode")
        if self.mode == "online" and not _logged_in():
            need = "a W&B account on this machine (`wandb login`, or WANDB_API_KEY)"
            raise UserError("tracking=online without a login", need, "tracking=offline or tracking=auto")

    def publish(
        self, record: Record, choices: Mapping[str, str], group: str | None, folder: Path, figures: Figures
    ) -> str | None:
        """Write ``record`` as a W&B run; return its URL, or its local folder when offline, or None when W&B failed.

        ``folder`` is where ``wandb/`` is kept: one for all runs of a user (the output directory, not the run's own
        folder), so that one ``wandb leet`` and one ``wandb sync`` see them all. ``figures`` is called only if needed.
        """
        try:
            with self._run(_identity(record, choices, group), folder, failed=record["status"] != "completed") as run:
                if run.disabled:
                    return None
                _fill(run, record, figures)
                return _where(run)
        except Exception as error:  # noqa: BLE001  a view must never cost the run it shows, whatever it raises
            log.warning("W&B failed (%s: %s); the record on disk is complete", type(error).__name__, error)
            return None

    def tabulate(self, name: str, table: history.Table, folder: Path) -> str | None:
        """Write ``table`` as a W&B run of its own, in the group ``name``; return as :meth:`publish`."""
        import wandb

        try:
            with self._run({"name": name, "group": name, "job_type": "search"}, folder, failed=False) as run:
                run.log({"front": wandb.Table(columns=table[0], data=table[1])})
                return None if run.disabled else _where(run)
        except Exception as error:  # noqa: BLE001  as above
            log.warning("W&B failed (%s: %s); the files on disk are complete", type(error).__name__, error)
            return None

    @contextmanager
    def _run(self, identity: dict[str, Any], folder: Path, *, failed: bool) -> Iterator[wandb.Run]:
        """Open a run, offline where the server does not answer, and close it whatever happens."""
        import wandb

        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        start = {"project": self.project, "entity": self.entity, "dir": str(folder.resolve()), **identity}
        mode = resolve_mode(self.mode)
        try:
            run = wandb.init(mode=mode, settings=self._settings(), **start)
        except (wandb.errors.Error, OSError) as error:
            if mode != "online":
                raise
            log.warning("W&B did not answer (%s); kept offline, `wandb sync` uploads it", _first_line(error))
            run = wandb.init(mode="offline", settings=self._settings(), **start)
        try:
            yield run
        finally:
            run.finish(exit_code=int(failed))

    def _settings(self) -> wandb.Settings:
        """Quiet and bounded; no system metrics, since the run is opened after the work was done."""
        import wandb

        return wandb.Settings(
            init_timeout=self.connect_seconds,
            finish_timeout=self.upload_seconds,
            reinit="finish_previous",  # a run left open by a crashed job would otherwise be handed to the next one
            console="off",
            silent=True,
            disable_git=True,
            x_disable_stats=True,
        )


def driven_by_agent() -> bool:
    """Return whether a W&B agent started this process: it waits for a run under the id that it gave."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def resolve_mode(requested: str) -> Mode:
    """Return the W&B mode for ``requested``: auto is online when logged in, else offline; never one that prompts.

    Auto honours ``WANDB_MODE`` and what ``wandb offline`` wrote. The network is not asked.
    """
    import wandb

    mode = requested
    if requested == "auto":
        mode = os.environ.get("WANDB_MODE", "").lower() or wandb.setup().settings.mode
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode != "online" or _logged_in():
        return cast("Mode", mode)
    if requested == "online" or os.environ.get("WANDB_MODE"):
        log.warning("W&B was asked to be online but nobody is logged in; kept offline, `wandb sync` uploads it")
    return "offline"


def _logged_in() -> bool:
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _identity(record: Record, choices: Mapping[str, str], group: str | None) -> dict[str, Any]:
    """Arguments of ``wandb.init`` that say which run this is.

    The resolved config sits under ``cfg``: at top level, an agent's parameter named ``method`` would overwrite it.
    """
    # of single keys (bits.weight=3) the group's choice knows nothing; the name of the bits does
    choices = {**choices, **({"bits": bits} if (bits := record["config"].get("bits", {}).get("name")) else {})}
    tags = {str(choices[key])[:64] for key in TAGS if choices.get(key)}  # 64 characters is W&B's limit
    return {
        "name": record["name"],
        "group": group,
        "job_type": "ptq",
        "tags": sorted(tags),
        "notes": "\n".join(record.get("warnings", ())) or None,
        "config": {
            **choices,
            "cfg": record["config"],
            "fingerprint": record["fingerprint"],
            "environment": record.get("environment", {}),
            "published": record.get("published", []),
        },
    }


def _fill(run: wandb.Run, record: Record, figures: Figures) -> None:
    """Write summary, histories, tables and figures, the most important first."""
    import wandb

    costs = {f"cost/{key}": value for key, value in record.get("cost", {}).items()}
    metrics = record.get("metrics", {})
    run.summary.update({**metrics, **gaps(metrics), **costs, "status": record["status"]})
    run.define_metric("block/*", step_metric="block/index")
    run.define_metric("learn/*", step_metric="learn/step")
    for row in (*history.block_rows(record), *history.loss_rows(record)):
        run.log(row)
    for name, (columns, rows) in history.tables(record).items():
        run.log({name: wandb.Table(columns=columns, data=rows)})
    images = {f"figure/{name}": _image(figure) for name, figure in figures().items()}
    if images:
        run.log(images)


def _image(figure: Figure) -> wandb.Image:
    """Draw ``figure`` ourselves: W&B's own way in needs pyplot, and with it a global figure manager."""
    import wandb
    from PIL import Image

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return wandb.Image(Image.open(picture))


def _where(run: wandb.Run) -> str:
    return str(run.settings.sync_dir if run.offline else run.url)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
