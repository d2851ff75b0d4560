"""The gap: log perplexity minus the float model's. Derived from a record wherever one is shown, never stored in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def gaps(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return ``gap/<set>`` in nats per token for each evaluated set; None where a perplexity is not finite."""
    found: dict[str, float | None] = {}
    for key, value in metrics.items():
        kind, _, name = key.partition("/")
        if kind == "perplexity" and f"fp/{key}" in metrics and not isinstance(value, list):
            found[f"gap/{name}"] = _log_ratio(value, metrics[f"fp/{key}"])
    return found


def _log_ratio(value: float | None, reference: float | None) -> float | None:
    if value is None or reference is None or value <= 0 or reference <= 0:
        return None
    return math.log(value) - math.log(reference)
