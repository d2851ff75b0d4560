"""What was learned: losses by step, one curve for the whole model or one per block, and what came of it by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qexp.core.losses import Curves, curves
from qexp.report.rows import Row
from qexp.report.style import INK, PALETTE, literal, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW = 0.12  # of the steps: what a thick line is the mean of; batches differ more than steps help
MEASURES = {
    "plain": ("plain rounding", INK, ":"), "start": ("start", PALETTE[1], "--"), "best": ("kept", PALETTE[0], "-"),
}  # fmt: skip


def figures(lines: Sequence[Row]) -> dict[str, Callable[[], Figure]]:
    """Return what draws each learned member of each row, by name ``losses/<model>/<row>/<member>``."""
    return {
        f"losses/{row.model}/{row.label}/{name}": partial(draw, each, measures(row.runs[0], name))
        for row in lines
        for name, each in curves(row.runs[0]).items()
    }


def measures(run: Mapping[str, Any], name: str) -> dict[int, Mapping[str, float]]:
    """Return what came of a member by block: the loss on held-out sequences of plain rounding, start and kept state."""
    return {b["index"]: b["learned"][name] for b in run.get("blocks", []) if name in b.get("learned", {})}


def draw(each: Curves, told: Mapping[int, Mapping[str, float | None]] = MappingProxyType({})) -> Figure:
    """Draw the curves over steps, every step thin, running means thick; beside them the measures over blocks."""
    figure = new_figure(7.6, 2.9)
    axes = figure.subplots(1, 2, width_ratios=(2, 1)) if len(told) > 1 else [figure.subplots()]
    ax = axes[0]
    plain_axes(ax)
    for i, (place, losses) in enumerate(each.items()):
        _curve(ax, place, losses, PALETTE[i % len(PALETTE)])
    whole = "model" in each
    ax.set_yscale("linear" if whole else "log")
    _say(ax, "step", "cross-entropy, nats" if whole else "loss of a step")
    if len(each) > 1:
        ax.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=max(1, len(each) // 12), loc="upper right")
    if len(told) > 1:
        _over_blocks(axes[1], told)
    return figure


def _over_blocks(ax: Axes, told: Mapping[int, Mapping[str, float | None]]) -> None:
    plain_axes(ax)
    for key, (label, colour, style) in MEASURES.items():
        values = [math.nan if (value := facts.get(key)) is None else value for facts in told.values()]
        ax.plot(list(told), values, style, color=colour, linewidth=1.6, label=label)
    ax.set_yscale("log")
    _say(ax, "block", "loss on held-out sequences")
    ax.legend(frameon=False, fontsize=8, labelcolor=INK)


def _say(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, color=INK, fontsize=8)
    ax.set_ylabel(literal(y), color=INK, fontsize=8)


def _curve(ax: Axes, place: str, losses: Sequence[float], colour: str) -> None:
    width = max(1, round(WINDOW * len(losses)))
    means = [_mean(losses[i : i + width]) for i in range(len(losses) - width + 1)]
    ax.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=0.6, alpha=0.35)
    ax.plot([i + (width + 1) / 2 for i in range(len(means))], means, color=colour, linewidth=1.6, label=place)


def _mean(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan
