"""The losses that a record keeps of what was learned, as curves: for the report and for W&B."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Curves: TypeAlias = Mapping[str, Sequence[float]]
"""Losses by step, by place: ``model``, or ``block 3``."""


def curves(run: Mapping[str, Any]) -> Mapping[str, Curves]:
    """Return the losses of a record by member and by place: ``model``, or ``block 3``; NaN for a step without one."""
    whole = run.get("diagnostics", {}).get("losses", {})
    found: dict[str, dict[str, Sequence[float]]] = {n: {"model": _numbers(each)} for n, each in whole.items() if each}
    for block in run.get("blocks", []):
        for name, each in block.get("losses", {}).items():
            if each:
                found.setdefault(name, {})[f"block {block['index']}"] = _numbers(each)
    return found


def _numbers(losses: Sequence[float | None]) -> list[float]:
    """Return NaN for what a record cannot hold: the loss of a step that overflowed, and was left out."""
    return [math.nan if loss is None else loss for loss in losses]
