"""The bits that an allocation gave to each layer, and what it expects of them: one picture for each measured run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qexp.report.rows import Row
from qexp.report.style import INK, literal, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACE = re.compile(r"\.(\d+)\.(?:.*\.)?(\w+)$")  # block, and the layer's own name


def figures(lines: Sequence[Row]) -> dict[str, Callable[[], Figure]]:
    """Return what draws each row whose bits were measured, by name ``allocation/<model>/<row>``."""
    every = {f"allocation/{row.model}/{row.label}": row.runs[0].get("diagnostics", {}) for row in lines}
    found = {name: told["allocation"] for name, told in every.items() if told.get("allocation")}
    return {name: partial(draw, told) for name, told in found.items()}


def table(bits: Mapping[str, int]) -> tuple[list[int], list[str], dict[tuple[int, str], int]]:
    """Return blocks, layers within a block and the bits of both, from bits by layer name."""
    places = {name: place for name in bits if (place := PLACE.search(name))}
    cells = {(int(place[1]), place[2]): bits[name] for name, place in places.items()}
    return sorted({block for block, _ in cells}), list(dict.fromkeys(layer for _, layer in cells)), cells


def draw(told: Mapping[str, Any]) -> Figure:
    """Draw bits over blocks and layers, with the number in each cell; the title says what is expected."""
    blocks, layers, cells = table(told["bits"])
    figure = new_figure(max(5.2, 1.6 + 0.36 * len(blocks)), 1.1 + 0.3 * len(layers))
    ax = figure.subplots()
    plain_axes(ax)
    ax.grid(False)
    grid = [[float(cells.get((block, layer), float("nan"))) for block in blocks] for layer in layers]
    ax.imshow(grid, cmap="viridis", vmin=1, vmax=8, aspect="auto", alpha=0.35)
    for (block, layer), bits in cells.items():
        ax.text(blocks.index(block), layers.index(layer), str(bits), ha="center", va="center", color=INK, fontsize=8)
    ax.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    ax.set_yticks(range(len(layers)), [literal(layer) for layer in layers])
    ax.set_xlabel("block", color=INK, fontsize=8)
    ax.set_title(expected(told), color=INK, fontsize=9, loc="left")
    return figure


def expected(told: Mapping[str, Any]) -> str:
    """Return the total damage that each choice was expected to do, by the metric."""
    figures = {k.removeprefix("predicted/"): v for k, v in told["told"].items() if k.startswith("predicted/")}
    return f"damage expected by {told['metric']}: " + ", ".join(
        f"{name} {value:.3g}" for name, value in figures.items()
    )
