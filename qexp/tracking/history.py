"""What W&B shows of a record as curves and tables: errors by block, figures of inputs, losses of what was learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from qexp.core.losses import curves

Record: TypeAlias = Mapping[str, Any]
Table: TypeAlias = "tuple[list[str | int], list[list[Any]]]"

LAYERS = ("bits", "error", "sqnr_db")
LEARNED = ("plain", "start", "best", "seconds")  # measures on held-out sequences
INPUTS = ("kurtosis", "peak", "sqnr_db")


def block_rows(record: Record) -> Iterator[dict[str, float]]:
    """Yield one point of the ``block/*`` curves per block: seconds, and the means of its layers' numbers."""
    for block in record.get("blocks", []):
        row = {"block/index": block["index"], "block/seconds": block["seconds"]}
        for key in LAYERS:
            values = [layer[key] for layer in block["layers"] if layer.get(key) is not None]
            if values:
                row[f"block/{key}"] = sum(values) / len(values)
        for name, facts in block.get("learned", {}).items():
            row |= {f"block/{name}/{key}": facts[key] for key in LEARNED if facts.get(key) is not None}
        yield row


def loss_rows(record: Record) -> Iterator[dict[str, float]]:
    """Yield one point of the ``learn/<member>/<place>`` curves per step, all blocks on one axis of steps."""
    flat = {
        f"learn/{name}/{place.replace(' ', '_')}": losses
        for name, each in curves(record).items()
        for place, losses in each.items()
    }
    for step in range(max(map(len, flat.values()), default=0)):
        yield {"learn/step": step + 1} | {
            key: losses[step] for key, losses in flat.items() if step < len(losses) and math.isfinite(losses[step])
        }


def tables(record: Record) -> dict[str, Table]:
    """Return columns and rows by name: ``layers`` and ``inputs``; what a record lacks is left out."""
    layers = [
        [block["index"], layer["name"], *(layer.get(key) for key in LAYERS)]
        for block in record.get("blocks", [])
        for layer in block["layers"]
    ]
    inputs = [
        [entry["layer"], *(entry[when].get(key) for key in INPUTS for when in ("before", "after"))]
        for entry in record.get("diagnostics", {}).get("inputs", [])
    ]
    columns: list[str | int] = ["layer", *(f"{key}_{when}" for key in INPUTS for when in ("before", "after"))]
    found: dict[str, Table] = {"layers": (["block", "layer", *LAYERS], layers), "inputs": (columns, inputs)}
    return {name: (head, rows) for name, (head, rows) in found.items() if rows}
