"""All figures of a set of records, by name: for the HTML report, and as PNG for W&B."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qexp.report import allocation, blocks, inputs, learning, pareto, rows, surfaces
from qexp.report.record import Record
from qexp.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Figures of each kind, in this order. Drawing one takes up to a second and a surface 60 kB; the tables say the rest.
LIMITS = {"pareto": 8, "blocks": 6, "allocation": 4, "inputs": 4, "losses": 4, "activations": 24}


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Return the figures of ``records`` by name, ``pareto/..``, ``blocks/..``, ``inputs/..`` and so on."""
    return bounded(rows.make(records))[0]


def bounded(lines: Sequence[Row]) -> tuple[dict[str, Figure], dict[str, list[str]]]:
    """Return the first figures of each kind, ``LIMITS`` of them, by name; and the names of the others by kind."""
    done = [row for row in lines if not row.failed]
    named: dict[str, Callable[[], Figure | None]] = {}
    for module in (pareto, blocks, allocation, inputs, learning, surfaces):
        named |= module.figures(done)
    drawn: dict[str, Figure] = {}
    left_out: dict[str, list[str]] = {}
    for kind, most in LIMITS.items():
        names = [name for name in named if name.startswith(f"{kind}/")]
        drawn |= {name: figure for name in names[:most] if (figure := named[name]()) is not None}
        left_out[kind] = [name.partition("/")[2] for name in names[most:]]
    return drawn, left_out


def png(figure: Figure) -> bytes:
    """Render a figure as PNG on white, for places without style sheets such as W&B."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, facecolor="white")
    return out.getvalue()
