"""A W&B workspace as code: the dashboard of a project, the same for everyone who opens it.

It shows what runs are compared by: the gap of each method at its bits, quality over stored bits, all choices at once,
and where in the model the error arises. It reads the keys that wandb.py writes. Made and validated without a network
by wandb-workspaces; only :func:`publish` asks the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qexp.core.errors import UserError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

BITS = "size/bits_per_weight"
CHOSEN = ("method", "bits", "method/solver", "method/grid", "method/act")
BLOCKS = ("error", "sqnr_db", "bits", "seconds")
COSTS = ("cost/quantize_seconds", "size/bytes")


@dataclass(frozen=True, kw_only=True)
class View:
    """What a workspace shows: runs of which project, on which evaluated sets, of which sweeps (none: of all)."""

    entity: str
    project: str
    sets: Sequence[str] = ("generated",)
    sweeps: Sequence[str] = field(default=())


def build(view: View) -> Workspace:
    """Return the workspace, validated. Raises: UserError without wandb-workspaces."""
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed", 'pip install "qexp[dashboards]"') from error
    shown = [f"summary:{key}" for key in (*(f"gap/{name}" for name in view.sets), BITS)]
    return ws.Workspace(
        entity=view.entity,
        project=view.project,
        name=f"qexp: {', '.join(view.sweeps)}" if view.sweeps else "qexp",
        sections=[*(_quality(name) for name in view.sets), _choices(view.sets), _blocks()],
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config("method"), ws.Config("bits")],
            filters=[ws.Metric("Group").isin(list(view.sweeps))] if view.sweeps else "",
            pinned_columns=shown,
        ),
        auto_generate_panels=False,
    )


def as_json(workspace: Workspace) -> dict[str, Any]:
    """Return what would be sent to the server."""
    model: dict[str, Any] = workspace._to_model().model_dump(by_alias=True)
    return model


def publish(workspace: Workspace) -> str:
    """Save the workspace on the server and return its URL. Raises: UserError without login or answer."""
    import wandb

    if not wandb.login(prompt=False, verify=False):
        need = "a W&B account on this machine (`wandb login`, or WANDB_API_KEY); --json FILE needs none"
        raise UserError("nobody is logged in to W&B", need)
    try:
        workspace.save()
    except Exception as error:  # of wandb, of its HTTP library, of the server
        told = (str(error).splitlines() or [""])[0]
        need = "a server that answers, and access to the project; --json FILE needs neither"
        raise UserError(f"W&B did not take the workspace ({type(error).__name__}: {told})", need) from error
    return str(workspace.url)


def _quality(name: str) -> Section:
    """Return what quantization did on one set: bars of the gap, and KL and perplexity over stored bits."""
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    bits = wr.SummaryMetric(BITS)
    kl, perplexity = wr.SummaryMetric(f"divergence/kl/{name}"), wr.SummaryMetric(f"perplexity/{name}")
    panels: list[Any] = [
        wr.BarPlot(
            title=f"gap on {name}: log perplexity above the float model, nats", metrics=[f"gap/{name}"],
            groupby=wr.Config("method"), groupby_aggfunc="mean", groupby_rangefunc="minmax",
        ),
        wr.ScatterPlot(title=f"KL(float || quantized) on {name} over bits per weight", x=bits, y=kl, log_y=True),
        wr.ScatterPlot(title=f"perplexity on {name} over bits per weight", x=bits, y=perplexity),
    ]  # fmt: skip
    return ws.Section(name=f"quality: {name}", panels=panels, is_open=True)


def _choices(sets: Sequence[str]) -> Section:
    """Return all choices with what came of them as parallel coordinates."""
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in CHOSEN]
    columns += [
        wr.ParallelCoordinatesPlotColumn(metric=wr.Config(f"cfg.bits.{key}"), display_name=f"bits.{key}")
        for key in ("weight", "group")
    ]
    ends = (BITS, *COSTS, *(f"gap/{name}" for name in sets))
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(key)) for key in ends]
    return ws.Section(
        name="choices", panels=[wr.ParallelCoordinatesPlot(title="choices and outcome", columns=columns)], is_open=True
    )


def _blocks() -> Section:
    """Return the curves over the blocks of the model."""
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    panels: list[Any] = [
        wr.LinePlot(title=f"{key} by block", x="block/index", y=[f"block/{key}"], groupby=wr.Config("method"))
        for key in BLOCKS
    ]
    return ws.Section(name="blocks", panels=panels, is_open=True)
