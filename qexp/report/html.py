"""One HTML file that holds the whole report: style, script and figures inside, no request to anywhere.

The template escapes every value; only the SVG drawn here is passed through as markup. Its ink becomes the text colour
of the page, so the figures follow the light and the dark scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qexp.report import compare, plots, verdicts
from qexp.report.columns import Column, find, split_constant
from qexp.report.record import Record
from qexp.report.rows import Row
from qexp.report.style import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "pareto": "Quality over size",
    "blocks": "Error per block",
    "allocation": "Bits of each layer, where they were measured",
    "inputs": "Inputs of the linears before and after",
    "losses": "Losses of what was learned",
    "activations": "Activations before and after",
}


def render(
    records: Sequence[Record], lines: Sequence[Row], baseline: str | None = None, within: float = verdicts.WITHIN
) -> str:
    """Return the report of ``records`` as a complete HTML document; ``lines`` are their rows, compared already.

    ``within`` is the tolerance of the verdicts on published numbers, in percent.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qexp.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    published = verdicts.compare(lines, within)
    shown, facts = split_constant([c for c in find(lines) if not c.csv_only], lines)
    return environment.get_template("template.html.j2").render(
        count={"runs": len(records), "failed": sum(r["status"] == "failed" for r in records)},
        models=", ".join(dict.fromkeys(row.model for row in lines)),
        baseline=baseline,
        summary=compare.summary(lines),
        columns=shown,
        facts=facts,
        rows=[{"failed": row.failed, "cells": list(_cells(row, lines, shown))} for row in lines],
        sections=_figures(records),
        published=published,
        published_summary="".join(verdicts.summary(published)),
        runs=[_details(record) for record in records],
    )


def svg(figure: Figure, prefix: str) -> str:
    """Return ``figure`` as an inline SVG element that scales with the page, its ids made unique by ``prefix``."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": prefix}):
        figure.savefig(out, format="svg", transparent=True, dpi=110, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'<svg \1style="max-width:\2pt"', text, count=1)


def _cells(row: Row, lines: Sequence[Row], columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    """Yield text, sort value (None sorts last in both directions) and length of the bar of each cell."""
    for column in columns:
        value = column.value(row)
        yield {"text": column.text(row), "sort": value, "kind": column.kind, "bar": _bar(column, row, lines)}


def _bar(column: Column, row: Row, lines: Sequence[Row]) -> float | None:
    """Return the row's gap in percent of the largest one of the same model, None for other columns."""
    value = row.metrics.get(column.key)
    if not column.key.startswith("gap/") or value is None:
        return None
    gaps = [gap for other in lines if other.model == row.model and (gap := other.metrics.get(column.key)) is not None]
    return round(100 * max(value, 0.0) / max(max(gaps), 1e-12), 1)


def _figures(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the sections of figures in the order of ``_TITLES``, each with its drawings."""
    drawn: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _TITLES}
    for i, (name, figure) in enumerate(plots.figures(records).items()):
        kind, _, about = name.partition("/")
        drawn[kind].append({"caption": about.replace("/", " · "), "svg": svg(figure, f"f{i}")})
    return [{"id": kind, "title": _TITLES[kind], "figures": each} for kind, each in drawn.items() if each]


def _details(record: Record) -> dict[str, Any]:
    return {
        "name": record["name"],
        "status": record["status"],
        "error": record.get("error", ""),
        "fingerprint": record["fingerprint"][:10],  # as in the name of the folder
        "warnings": record["warnings"],
        "facts": {**record["cost"], **{key: _short(value) for key, value in record["environment"].items()}},
        "config": _yaml(record["config"]),
    }


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110))


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
