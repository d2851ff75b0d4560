"""The inputs of all linears before and after the transforms: how loud their outliers are, how well they quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qexp.report.rows import Row
from qexp.report.style import INK, literal, new_figure, plain_axes
from qexp.report.surfaces import transforms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "peak": "loudest channel / median channel",
    "kurtosis": "kurtosis (3: Gaussian)",
    "sqnr_db": "signal / quantization noise, dB",
}
BEFORE, AFTER = "#8a8f98", "#c4422f"


def figures(lines: Sequence[Row]) -> dict[str, Callable[[], Figure]]:
    """Return what draws each row that transforms activations, by name ``inputs/<model>/<row>``."""
    chosen = [row for row in lines if transforms(row) and entries(row)]
    return {f"inputs/{row.model}/{row.label}": partial(draw, entries(row)) for row in chosen}


def entries(row: Row) -> list[Any]:
    """Return the recorded inputs of the row's first run."""
    found: list[Any] = list(row.runs[0].get("diagnostics", {}).get("inputs", []))
    return found


def draw(inputs: Sequence[Any]) -> Figure:
    """Draw one panel per figure that was measured, inputs in forward order, before and after."""
    panels = {key: title for key, title in PANELS.items() if inputs[0]["after"].get(key) is not None}
    figure = new_figure(11.8, 2.9)
    axes = figure.subplots(1, len(panels), squeeze=False).ravel()
    for ax, (key, title) in zip(axes, panels.items(), strict=True):
        _panel(ax, inputs, key, title)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _panel(ax: Axes, inputs: Sequence[Any], key: str, title: str) -> None:
    plain_axes(ax)
    for when, colour in (("before", BEFORE), ("after", AFTER)):
        values = [entry[when].get(key) for entry in inputs]
        ax.plot(range(len(values)), values, color=colour, linewidth=1.4, label=f"{when} the transforms")
    if key != "sqnr_db":
        ax.set_yscale("log")
    ax.set_title(literal(title), loc="left", fontsize=10, color=INK)
    ax.set_xlabel("linear input, in forward order", color=INK, fontsize=8)
