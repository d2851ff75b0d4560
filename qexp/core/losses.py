"""The losses that a record keeps of what was learned, as curves: for the report and for W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Curves: TypeAlias = Mapping[str, Sequence[float]]
"""Losses by step, by place: ``model``, or ``block 3``."""


def curves(run: Mapping[str, Any]) -> dict[str, Curves]:
    """Return the losses of a record by member and by place: ``model``, or ``block 3``."""
    whole = run.get("diagnostics", {}).get("losses", {})
    found: dict[str, dict[str, Sequence[float]]] = {name: {"model": each} for name, each in whole.items() if each}
    for block in run.get("blocks", []):
        for name, each in block.get("losses", {}).items():
            if each:
                found.setdefault(name, {})[f"block {block['index']}"] = each
    return dict(found)
