"""Quality over size: which settings does no other beat in both? One panel per evaluated set and measure.

Quality is the gap in log perplexity to the float model (or KL), on a logarithmic axis where its range asks for one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qexp.report import labels, rows
from qexp.report.rows import Row
from qexp.report.style import INK, MARKERS, PALETTE, literal, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[Row, float, float]  # row, bits per weight, value

_LOG_ABOVE = 3.0  # ratio of largest to smallest value from which an axis is logarithmic
_NARROWEST = 0.5  # bits per weight an axis shows at least
PANELS = 12  # of a figure
_LABELLED = 30  # points; above, names would cover the plot and the legend must do


def figures(lines: Sequence[Row]) -> dict[str, Callable[[], Figure | None]]:
    """Return what draws one model, ``pareto/<model>``, or several, ``pareto/<quality>`` with a panel for each model."""
    models = list(dict.fromkeys(row.model for row in lines))
    if len(models) < 2:
        return {f"pareto/{model}": partial(draw, lines) for model in models}
    found = {key: [row for row in lines if _points([row], key)] for key in _qualities(lines)}
    return {_name(key, rows): partial(draw_models, rows, key) for key, rows in found.items() if rows}


def draw(lines: Sequence[Row]) -> Figure | None:
    """Plot each quality of one model over bits per weight; None where nothing was measured."""
    found = [(key, points) for key in _qualities(lines) if (points := _points(lines, key))]
    return _panels([(_panel_title(key, points), points) for key, points in found])


def draw_models(lines: Sequence[Row], key: str) -> Figure | None:
    """Plot one quality of each model, ``PANELS`` at most, on equal axes."""
    models = dict.fromkeys(row.model for row in lines)
    found = [(model, _points([row for row in lines if row.model == model], key)) for model in list(models)[:PANELS]]
    return _panels([(_model_title(model, key, points), points) for model, points in found], alike=True)


def _panels(panels: Sequence[tuple[str, list[Point]]], *, alike: bool = False) -> Figure | None:
    """Draw titles and their points, two panels beside each other (three of many); ``alike``: on equal axes."""
    if not panels:
        return None
    wide = min(2 if len(panels) <= 4 else 3, len(panels))
    tall = (len(panels) + wide - 1) // wide
    figure = new_figure(5.6 * wide + 0.6, 4.3 * tall)
    styles = _styles([row for _, points in panels for row, _, _ in points])
    axes = figure.subplots(tall, wide, squeeze=False, sharex=alike, sharey=alike).ravel()
    values = [[y for _, _, y in points] for _, points in panels]
    for i, (ax, (title, points)) in enumerate(zip(axes, panels, strict=False)):
        _panel(ax, points, styles)
        _scale(ax, [y for each in values for y in each] if alike else values[i])
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        last = not alike or i + wide >= len(panels)  # of its column: it has the labels
        ax.tick_params(axis="x", labelbottom=last)
        ax.set_xlabel("bits per weight, all that is stored" if last else "", color=INK)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    _legend(figure, styles)
    figure.draw_without_rendering()  # the layout must be final before labels look for room in it
    figure.set_layout_engine("none")
    for ax, (_, points) in zip(axes, panels, strict=False):
        _name_points(ax, points)
    return figure


def _name(key: str, lines: Sequence[Row]) -> str:
    count = len({row.model for row in lines})
    return f"pareto/{_quality_title(key)}" + (f"/the first {PANELS} of {count} models" if count > PANELS else "")


def _qualities(lines: Sequence[Row]) -> list[str]:
    """Return the keys to plot: of each set the gap or perplexity, then KL."""
    keys = [_quality(lines, name) for name in rows.sets(lines, "perplexity")]
    return keys + [f"divergence/kl/{name}" for name in rows.sets(lines, "divergence/kl")]


def _quality(lines: Sequence[Row], name: str) -> str:
    """Return the key to plot for a set: the gap, whose log axis separates methods, else perplexity itself."""
    return f"gap/{name}" if f"gap/{name}" in {key for row in lines for key in row.metrics} else f"perplexity/{name}"


def _points(lines: Sequence[Row], key: str) -> list[Point]:
    """Return (row, bits per weight, value) of quantized rows where both are finite and positive."""
    found = [(row, row.metrics.get("size/bits_per_weight"), row.metrics.get(key)) for row in lines if not row.is_float]
    return [(row, x, y) for row, x, y in found if x is not None and y is not None and y > 0]


def _styles(lines: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Return a colour per method and a marker per activation and cache setting, both in alphabetical order.

    Where colours come a second time, points are hollow.
    """
    methods, kinds = sorted({row.method for row in lines}), sorted({_activations(row) for row in lines})
    return {
        "colour": {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(methods)},
        "fill": {name: "full" if (i // len(PALETTE)) % 2 == 0 else "none" for i, name in enumerate(methods)},
        "marker": {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(kinds)},
    }


def _activations(row: Row) -> str:
    """Return what is left of the name of the bits without weights and groups: ``a4kv4``, ``a16``."""
    return re.sub(r"^w[\d.]+|g-?\d+", "", row.bits) or "a16"


def _filled(fill: str) -> dict[str, Any]:
    """Return how a point is drawn that is full, or hollow."""
    return {"fillstyle": fill, "markeredgewidth": 0 if fill == "full" else 1.8}


def _panel(ax: Axes, points: Sequence[Point], styles: dict[str, dict[str, str]]) -> None:
    """Draw points and frontiers; a point carries the place of its row as ``gid``, by which the page knows it."""
    plain_axes(ax)
    for row, x, y in points:
        colour, marker = styles["colour"][row.method], styles["marker"][_activations(row)]
        look = {"color": colour, "marker": marker, **_filled(styles["fill"][row.method])}
        ax.plot([x], [y], linestyle="none", markersize=8, alpha=0.9, gid=f"row-{row.place}", **look)
    for line in _frontiers(points):
        ax.plot(*zip(*line, strict=True), color=INK, linewidth=1, alpha=0.55, zorder=1)
    ax.grid(visible=True, color=INK, alpha=0.16, linewidth=0.6)


def _scale(ax: Axes, values: Sequence[float]) -> None:
    if max(values) / min(values) > _LOG_ABOVE:
        ax.set_yscale("log")
    ax.margins(x=0.2, y=0.14)
    _widen(ax)


def _panel_title(key: str, points: Sequence[Point]) -> str:
    return literal(_quality_title(key)) + _reference(key, points)


def _model_title(model: str, key: str, points: Sequence[Point]) -> str:
    return literal(model) + _reference(key, points)


def _reference(key: str, points: Sequence[Point]) -> str:
    """Return the float model's perplexity beside a gap, in brackets."""
    kind, _, name = key.rpartition("/")
    reference = points[0][0].metrics.get(f"fp/perplexity/{name}") if kind == "gap" else None
    return f" (float {reference:#.4g})" if reference else ""


def _quality_title(key: str) -> str:
    kind, _, name = key.rpartition("/")
    return {
        "gap": f"log perplexity above the float model on {name}, nats",
        "perplexity": f"perplexity on {name}",
    }.get(kind, f"KL(float ‖ quantized) on {name}, nats per token")


def _name_points(ax: Axes, points: Sequence[Point]) -> None:
    """Write methods beside points: all of a few, of many only those on the frontier."""
    best = {place for line in _frontiers(points) for place in line}
    named = points if len(points) <= _LABELLED else [point for point in points if point[1:] in best]
    labels.place(ax, [(x, y, literal(row.method), f"label-{row.place}") for row, x, y in named], INK)


def _widen(ax: Axes) -> None:
    """Show half a bit at least: what differs by the size of its scales alone should look alike."""
    low, high = ax.get_xlim()
    if (missing := _NARROWEST - (high - low)) > 0:
        ax.set_xlim(low - missing / 2, high + missing / 2)


def _frontiers(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Return one frontier per activation and cache setting: w4a4 pays for what w4a16 does not have."""
    kinds = dict.fromkeys(_activations(row) for row, _, _ in points)
    return [_frontier([point for point in points if _activations(point[0]) == kind]) for kind in kinds]


def _frontier(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the coordinates that no other point beats in both, by rising bits."""
    best: list[tuple[float, float]] = []
    for x, y in sorted((x, y) for _, x, y in points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def _legend(figure: Figure, styles: dict[str, dict[str, str]]) -> None:
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"linestyle": "none", "markersize": 7}
    handles = [
        Line2D([], [], marker="o", color=colour, label=literal(name), **look, **_filled(styles["fill"][name]))
        for name, colour in styles["colour"].items()
    ]
    full = _filled("full")
    handles += [Line2D([], [], marker=m, color=INK, label=name, **look, **full) for name, m in styles["marker"].items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(9, len(handles)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
