"""The losses of what was learned, by step: one curve for a transform of the whole model, one per block for others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qexp.core.losses import Curves, curves
from qexp.report.rows import Row
from qexp.report.style import INK, PALETTE, literal, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMIT = 4  # figures; W&B has the curves of every run
WINDOW = 0.12  # of the steps: what a thick line is the mean of; batches differ more than steps help


def figures(lines: Sequence[Row]) -> dict[str, Figure]:
    """Return one figure for each learned member of each row, by name ``losses/<model>/<row>/<member>``."""
    found = [
        (f"losses/{row.model}/{row.label}/{name}", each) for row in lines for name, each in curves(row.runs[0]).items()
    ]
    return {name: draw(each) for name, each in found[:LIMIT]}


def draw(each: Curves) -> Figure:
    """Draw the curves over steps: every step thin, running means thick."""
    figure = new_figure(7.6, 2.9)
    ax = figure.subplots()
    plain_axes(ax)
    for i, (place, losses) in enumerate(each.items()):
        _curve(ax, place, losses, PALETTE[i % len(PALETTE)])
    ax.set_yscale("linear" if "model" in each else "log")
    ax.set_xlabel("step", color=INK, fontsize=8)
    ax.set_ylabel(literal("cross-entropy, nats" if "model" in each else "error / mean square"), color=INK, fontsize=8)
    if len(each) > 1:
        ax.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=max(1, len(each) // 12), loc="upper right")
    return figure


def _curve(ax: Axes, place: str, losses: Sequence[float], colour: str) -> None:
    width = max(1, round(WINDOW * len(losses)))
    means = [_mean(losses[i : i + width]) for i in range(len(losses) - width + 1)]
    ax.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=0.6, alpha=0.35)
    ax.plot([i + (width + 1) / 2 for i in range(len(means))], means, color=colour, linewidth=1.6, label=place)


def _mean(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan
