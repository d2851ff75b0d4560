"""All figures of a set of records, by name: for the HTML report, and as PNG for W&B."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qexp.report import allocation, blocks, inputs, learning, pareto, rows, surfaces
from qexp.report.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Return all figures of ``records`` by name, ``pareto/..``, ``blocks/..``, ``inputs/..`` and so on."""
    lines = [row for row in rows.make(records) if not row.failed]
    models = list(dict.fromkeys(row.model for row in lines))
    drawn: dict[str, Figure | None] = {}
    for model in models:
        ours = [row for row in lines if row.model == model]
        drawn[f"pareto/{model}"] = pareto.draw(ours)
        for bits in dict.fromkeys(row.bits for row in ours):
            drawn[f"blocks/{model}/{bits}"] = blocks.draw([row for row in ours if row.bits == bits])
    drawn |= allocation.figures(lines)
    drawn |= inputs.figures(lines)
    drawn |= learning.figures(lines)
    drawn |= surfaces.figures(lines)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """Render a figure as PNG on white, for places without style sheets such as W&B."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, facecolor="white")
    return out.getvalue()
