"""Where the error sits: relative output error of each layer of each block, one map per row of the comparison.

All maps of a figure share one logarithmic colour scale, so that methods compare by eye.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from qexp.report.rows import Row
from qexp.report.style import INK, literal, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure


PANELS = 12  # of a figure


def figures(lines: Sequence[Row]) -> dict[str, Callable[[], Figure | None]]:
    """Return what draws the rows of each model and bits that have errors, by name ``blocks/<model>/<bits>``."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in lines:
        if any(layer["error"] is not None for block in row.runs[0]["blocks"] for layer in block["layers"]):
            groups[f"blocks/{row.model}/{row.bits}"].append(row)
    return {_name(name, len(rows)): partial(draw, rows) for name, rows in groups.items()}


def _name(name: str, rows: int) -> str:
    return name if rows <= PANELS else f"{name}/the {PANELS} rows of lowest perplexity of {rows}"


def draw(lines: Sequence[Row]) -> Figure | None:
    """Draw one panel per row, blocks across and layers down, ``PANELS`` at most; None where no row has errors."""
    grids = [(row, *grid) for row in lines[:PANELS] if (grid := _grid(row))]
    values = [value for _, _, cells in grids for line in cells for value in line if value > 0]  # NaN compares false
    if not values:
        return None
    from matplotlib.colors import LogNorm

    low, high = min(values), max(values)
    norm = LogNorm(low, high if high > low else low * 1.01)
    wide = min(len(grids), _panels_beside(max(len(cells[0]) for _, _, cells in grids)))
    tall = (len(grids) + wide - 1) // wide
    layers = max(len(names) for _, names, _ in grids)
    figure = new_figure(11.8, tall * (0.5 + 0.2 * layers) + 0.4)
    axes = figure.subplots(tall, wide, squeeze=False).ravel()
    for i, (ax, (row, names, cells)) in enumerate(zip(axes, grids, strict=False)):
        _panel(ax, row, cells, norm)
        told = i % wide and names == grids[i - 1][1]  # by the panel to the left
        ax.set_yticks(range(len(names)), [] if told else [literal(name) for name in names], fontsize=8)
        if i + wide >= len(grids):
            ax.set_xlabel("decoder block", color=INK, fontsize=8)
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    bar = figure.colorbar(axes[0].images[0], ax=list(axes), pad=0.012, fraction=0.02, aspect=max(10, 14 * tall))
    bar.set_label("relative output error", color=INK)
    bar.ax.tick_params(colors=INK, which="both", labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _panel(ax: Axes, row: Row, cells: list[list[float]], norm: LogNorm) -> None:
    from matplotlib.ticker import MaxNLocator

    plain_axes(ax)
    ax.imshow(cells, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    ax.set_title(literal(row.label), loc="left", fontsize=10, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _panels_beside(blocks: int) -> int:
    """Return how many error maps of this many blocks stand in one line without cells too thin to see."""
    return 3 if blocks <= 16 else 2 if blocks <= 40 else 1


def _grid(row: Row) -> tuple[list[str], list[list[float]]] | None:
    """Return layer names and errors [layers][blocks] of the first run; experts of one block are averaged."""
    blocks = row.runs[0]["blocks"]
    sums: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for i, block in enumerate(blocks):
        for layer in block["layers"]:
            if layer["error"] is not None:
                sums[_layer_name(layer["name"])][i].append(layer["error"])
    if not sums:
        return None
    cells = [[sum(v) / len(v) if (v := by[i]) else float("nan") for i in range(len(blocks))] for by in sums.values()]
    return list(sums), cells


def _layer_name(name: str) -> str:
    """Cut the block's path off a layer's name, blank other numbers: ``layers.3.mlp.up_proj`` is ``up_proj``."""
    inside = re.sub(r"^.*?\b(?:layers|blocks|h)\.\d+\.", "", name)
    return re.sub(r"\.\d+\.", ".*.", inside).removeprefix("self_attn.").removeprefix("mlp.")
