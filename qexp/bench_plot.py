"""One figure of a benchmark: how many times faster than each peer, by operator and shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qexp.report.style import INK, MARKERS, PALETTE, literal, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qexp.bench_timing import Row


def figure(rows: Sequence[Row]) -> Figure:
    """Return speed-ups on a logarithmic axis, one line of points per row and one colour per peer; 1 is equal speed."""
    made = new_figure(9, 1.2 + 0.28 * len(rows))
    ax = made.add_subplot()
    plain_axes(ax)
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    for i, name in enumerate(peers):
        points = [(row["peers"][name] / row["ours_ms"], y) for y, row in enumerate(rows) if name in row["peers"]]
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        ax.plot(*zip(*points, strict=True), marker, color=colour, label=literal(name), markersize=5)
    ax.axvline(1, color=INK, linewidth=0.8)
    ax.set_xscale("log")
    ax.set_yticks(range(len(rows)), [literal(_label(row)) for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("times faster: the peer's median over ours", color=INK)
    ax.grid(axis="x", color=INK, alpha=0.2)
    ax.legend(frameon=False, labelcolor=INK, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return made


def _label(row: Row) -> str:
    width = f" {row['n']}" if row["k"] == row["n"] and row["op"] == "had_quant" else f" {row['k']}x{row['n']}"
    shape = width if row["k"] else ""
    return f"{row['op']}{shape} M={row['m']}"
