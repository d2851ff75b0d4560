"""What the page's script computes with: rows, compact losses per window, and configs as what differs between runs."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qexp.report import bootstrap, compare
from qexp.report.record import Record
from qexp.report.rows import Row, flatten, sets

MOST = 200  # rows the table shows at first: laying out a thousand takes a browser longer than all else


def build(lines: Sequence[Row], baseline: str | None) -> dict[str, Any]:
    """Return plain data; the runs stand in the order of their rows, and ``shared`` holds what all of them have."""
    runs = [run for row in lines for run in row.runs]
    configs, config = _split([dict(flatten(run["config"], keep_seeds=True, every=True)) for run in runs])
    facts, fact = _split([_facts(run) for run in runs])
    known = {key for run in runs for key, _ in flatten(run["config"], keep_seeds=True)}
    first = [sum(len(row.runs) for row in lines[:i]) for i in range(len(lines))]
    return {
        "baseline": baseline or "",
        "resamples": bootstrap.RESAMPLES,
        "levels": bootstrap.LEVELS,
        "same": compare.SAME_WINDOWS,
        "most": MOST,
        "sets": sets(lines, "perplexity"),
        "settings": sorted({key for own in config for key in own} & known),
        "shared": {"config": configs, "facts": facts},
        "rows": [_row(row, range(start, start + len(row.runs))) for row, start in zip(lines, first, strict=True)],
        "runs": [_run(*each) for each in zip(runs, config, fact, strict=True)],
    }


def script(data: Mapping[str, Any]) -> str:
    """Return ``data`` as JSON that may stand in a script element: nothing in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def outcome(row: Row) -> str:
    """Return ``failed``, ``diverged`` where a perplexity is not finite, or ``completed``."""
    if row.failed:
        return "failed"
    scores = [row.metrics.get(f"perplexity/{name}", 0.0) for name in sets([row], "perplexity")]
    return "diverged" if None in scores else "completed"


def _row(row: Row, runs: range) -> dict[str, Any]:
    names = sets([row], "perplexity")
    return {
        "id": row.runs[0]["fingerprint"][:10],
        "name": row.runs[0]["name"],
        "label": f"{row.label}, {row.model}",
        "method": row.method,
        "bits": row.bits,
        "model": row.model,
        "status": outcome(row),
        "float": row.is_float,
        "runs": list(runs),
        "gap": {name: row.metrics.get(f"gap/{name}") for name in names},
        "fp": {name: row.metrics.get(f"fp/perplexity/{name}") for name in names},
        "losses": {name: packed for name in names if (packed := _losses(row, name))},
    }


def _losses(row: Row, name: str) -> str | None:
    """Return the loss per window as base64 of little-endian float32, 5.4 characters each: 2e-7 of a loss is lost."""
    losses = compare.losses(row, name)
    return None if losses is None else base64.b64encode(losses.astype("<f4").tobytes()).decode("ascii")


def _run(run: Record, config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"error": run.get("error", ""), "warnings": run["warnings"], "config": config, "facts": facts}


def _facts(run: Record) -> dict[str, Any]:
    environment = {key: _short(value) for key, value in run["environment"].items()}
    return {**run["cost"], **environment, "fingerprint": run["fingerprint"]}


def _short(value: Any) -> Any:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value


def _split(each: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what all mappings hold, and of each what not all do."""
    first = each[0] if each else {}
    shared = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in each)}
    return shared, [{k: v for k, v in own.items() if k not in shared} for own in each]
