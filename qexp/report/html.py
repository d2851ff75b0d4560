"""One HTML file that holds the whole report: style, script and figures inside, no request to anywhere.

The template escapes every value; only the SVG drawn here is passed through as markup. Its ink becomes the text colour
of the page, so the figures follow the light and the dark scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from qexp.report import bootstrap, compare, payload, plots, verdicts
from qexp.report.columns import Column, find, split_constant
from qexp.report.record import Record
from qexp.report.rows import Row, sets
from qexp.report.style import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCRIPTS = ("bootstrap.js", "points.js", "details.js", "filters.js", "report.js")
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

    A ``baseline`` is pinned when the page opens; any other may be chosen in it. ``within`` is the tolerance of the
    verdicts on published numbers, in percent.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qexp.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    published = verdicts.compare(lines, within)
    shown, facts = split_constant([c for c in find(lines, pinned=True) if not c.csv_only], lines)
    widest = _widest(lines, shown)
    return environment.get_template("template.html.j2").render(
        count={"runs": len(records), "failed": sum(r["status"] == "failed" for r in records)},
        models=", ".join(dict.fromkeys(row.model for row in lines)),
        style=_file("report.css"),
        script="".join(map(_file, SCRIPTS)),
        data=payload.script(payload.build(lines, baseline)),
        baseline=baseline,
        resamples=bootstrap.RESAMPLES,
        summary=compare.summary(lines),
        columns=shown,
        facts=facts,
        rows=[_line(row, shown, widest) for row in lines],
        sections=_figures(lines),
        published=published,
        published_summary="".join(verdicts.summary(published)),
        runs=[_heading(run) | {"beyond": row.place >= payload.MOST} for row in lines for run in row.runs],
    )


def svg(figure: Figure, prefix: str, names: Mapping[int, str] | None = None) -> str:
    """Return ``figure`` as an inline SVG element that scales with the page, its ids made unique by ``prefix``.

    What has the ``gid`` ``row-<place>`` becomes a point that can take the focus, under the name of its row;
    ``label-<place>`` is text beside it.
    """
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(out, format="svg", transparent=True, dpi=110, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    text = re.sub(r">\s+<", "><", text)  # a browser makes a node of each line break, half of all
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'<g id="row-(\d+)">', lambda found: _point(int(found[1]), names or {}), text)
    text = re.sub(r'<g id="label-(\d+)">', r'<g class="name" data-row="\1">', text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'<svg \1style="max-width:\2pt"', text, count=1)


def _point(place: int, names: Mapping[int, str]) -> str:
    name = escape(names.get(place, ""), quote=True)
    return f'<g class="point" data-row="{place}" tabindex="-1" role="img" aria-label="{name}">'


def _file(name: str) -> str:
    return resources.files("qexp.report").joinpath(name).read_text(encoding="utf-8")


def _line(row: Row, columns: Sequence[Column], widest: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    cells = list(_cells(row, columns, widest))
    return {"beyond": row.place >= payload.MOST, "failed": row.failed, "label": row.label, "cells": cells}


def _cells(row: Row, columns: Sequence[Column], widest: Mapping[tuple[str, str], float]) -> Iterator[dict[str, Any]]:
    """Yield text, sort value (None sorts last in both directions) and length of the bar of each cell."""
    for column in columns:
        value, largest = column.value(row), widest.get((row.model, column.key))
        bar = (
            round(100 * max(row.metrics[column.key] or 0.0, 0.0) / largest, 1)
            if largest and value is not None
            else None
        )
        yield {"text": column.text(row), "sort": value, "kind": column.kind, "pinned": column.pinned, "bar": bar}


def _widest(lines: Sequence[Row], columns: Sequence[Column]) -> dict[tuple[str, str], float]:
    """Return the largest gap of each model and gap column: the full length of a bar."""
    widest: dict[tuple[str, str], float] = {}
    for key in (column.key for column in columns if column.key.startswith("gap/")):
        for row in lines:
            widest[row.model, key] = max(widest.get((row.model, key), 1e-12), row.metrics.get(key) or 0.0)
    return widest


def _figures(lines: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the sections of figures in the order of ``_TITLES``, each with its drawings and what was left out."""
    drawn, left_out = plots.bounded(lines)
    names = {row.place: _says(row) for row in lines}
    figures: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _TITLES}
    for i, (name, figure) in enumerate(drawn.items()):
        kind, _, about = name.partition("/")
        figures[kind].append({"caption": _caption(about), "svg": svg(figure, f"f{i}", names)})
    return [
        {"id": kind, "title": _TITLES[kind], "figures": each, "left_out": [_caption(name) for name in left_out[kind]]}
        for kind, each in figures.items()
        if each
    ]


def _caption(name: str) -> str:
    return name.replace("/", " · ")


def _says(row: Row) -> str:
    """Return what a point of the Pareto plot says of itself."""
    facts = [
        f"gap {row.metrics[f'gap/{name}']:+.4f} on {name}" for name in sets([row], "gap") if row.metrics[f"gap/{name}"]
    ]
    bits = row.metrics.get("size/bits_per_weight")
    return "; ".join([f"{row.label}, {row.model}", *facts, *([f"{bits:.3f} bits per weight"] if bits else [])])


def _heading(run: Record) -> dict[str, Any]:
    return {
        "name": run["name"],
        "status": run["status"],
        "fingerprint": run["fingerprint"][:10],  # as in the name of the folder
        "warnings": len(run["warnings"]),
    }
