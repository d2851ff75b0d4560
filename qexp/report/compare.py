"""Does A beat B? The paired bootstrap over windows, and what it says about a set of rows.

Both runs scored the same windows, so the difference of their losses per window has far less noise than either
perplexity: d = mean(loss_A - loss_B) in nats is exactly the difference of their log perplexities. The HTML report
compares by the same rules, in report.js.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qexp.core.errors import UserError, nearest
from qexp.report import bootstrap
from qexp.report.rows import Row, sets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SAME_WINDOWS = 1e-4  # relative: two runs whose float model has the same perplexity scored the same windows


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean difference in nats per token (negative: the first is better) with its 95 % interval."""

    mean: float
    low: float
    high: float
    windows: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired(ours: Row, theirs: Row, name: str) -> Difference | None:
    """Return the difference in log perplexity on set ``name``, or None where the same windows were not scored twice.

    Losses of several seeds are averaged per window first. Needs two windows at least.
    """
    a, b = losses(ours, name), losses(theirs, name)
    if a is None or b is None:
        return None
    if len(a) != len(b) or len(a) < 2 or not _same_reference(ours, theirs, name):
        log.warning(
            "%s and %s did not score the same windows of %s: no paired interval", ours.label, theirs.label, name
        )
        return None
    delta = a - b
    low, high = bootstrap.interval(delta)
    return Difference(mean=float(delta.mean()), low=low, high=high, windows=len(delta))


def against(rows: Sequence[Row], baseline: str) -> None:
    """Give each row ``versus/<set>`` (paired difference, interval in low/high) and ``ratio/<set>`` (of the two gaps).

    ``baseline`` is a method name (or a run's name); each row is held against that row of its own model and bits, or
    against the float row of its model.
    Raises: UserError if no row has that name.
    """
    candidates = [row for row in rows if baseline in (row.method, row.runs[0]["name"]) and not row.failed]
    if not candidates:
        known = nearest(baseline, {row.method for row in rows if not row.failed})
        raise UserError(f"--baseline {baseline} is not among the completed runs", known)
    for row in rows:
        same = [
            other for other in candidates if other.model == row.model and (other.is_float or other.bits == row.bits)
        ]
        if len(same) > 1 and row is not same[0]:
            log.warning("%d rows of %s %s; %s is held against the first", len(same), baseline, row.bits, row.label)
        if same and not row.failed:
            _hold_against(row, same[0])


def summary(rows: Sequence[Row]) -> list[str]:
    """Return one sentence per model and bits: the best method, its gap, and by how much it beats the next one."""
    done = [row for row in rows if not row.failed and not row.is_float]
    groups = list(dict.fromkeys((row.model, row.bits) for row in done))
    return [
        sentence
        for model, bits in groups
        if (sentence := _sentence([row for row in done if (row.model, row.bits) == (model, bits)]))
    ]


def _sentence(rows: list[Row]) -> str:
    for name in sets(rows, "perplexity"):
        ranked = [(value, row) for row in rows if (value := row.metrics.get(f"perplexity/{name}")) is not None]
        if ranked:
            ranked.sort(key=lambda pair: pair[0])
            ordered = [row for _, row in ranked]
            return f"{ordered[0].model}, {ordered[0].bits}: {_verdict(ordered, name)}"
    return ""


def _verdict(ordered: list[Row], name: str) -> str:
    best = ordered[0]
    gap = best.metrics.get(f"gap/{name}")
    measured = f"perplexity {best.metrics[f'perplexity/{name}']:#.4g} on {name}"
    measured += f", {gap:+.4f} nats from the float model" if gap is not None else ""
    if len(ordered) == 1:
        return f"{_who(best)} is the only method that finished ({measured})."
    second = ordered[1]
    difference = paired(best, second, name)
    if difference is None:
        return f"{_who(best)} is best ({measured}); {_who(second)} is next. No paired interval."
    interval = f"{-difference.mean:.4f} nats, 95 % interval {-difference.high:.4f} to {-difference.low:.4f}"
    if difference.decided:
        return f"{_who(best)} is best ({measured}); it beats {_who(second)} by {interval}."
    return f"{_who(best)} leads ({measured}) but is not separable from {_who(second)}: {interval}."


def _who(row: Row) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in row.settings.items())
    return f"{row.method} ({settings})" if settings else row.method


def _hold_against(row: Row, base: Row) -> None:
    for name in sets([row], "perplexity"):
        gap, base_gap = row.metrics.get(f"gap/{name}"), base.metrics.get(f"gap/{name}")
        if gap is not None and base_gap is not None and base_gap > 0:
            row.metrics[f"ratio/{name}"] = gap / base_gap
        difference = None if row is base else paired(row, base, name)
        if difference is not None:
            key = f"versus/{name}"
            row.metrics[key], row.low[key], row.high[key] = difference.mean, difference.low, difference.high


def losses(row: Row, name: str) -> NDArray[np.float64] | None:
    """Return the loss per window [windows], float64, averaged over seeds; None where a run lacks one."""
    import numpy as np

    each: list[Mapping[str, list[float | None]]] = [run.get("window_losses", {}) for run in row.runs]
    if any(not scored.get(name) or None in scored[name] for scored in each):
        return None
    if len({len(scored[name]) for scored in each}) > 1:
        return None
    mean: NDArray[np.float64] = np.asarray([scored[name] for scored in each], dtype=np.float64).mean(axis=0)
    return mean


def _same_reference(ours: Row, theirs: Row, name: str) -> bool:
    a, b = (row.metrics.get(f"fp/perplexity/{name}") for row in (ours, theirs))
    return a is None or b is None or abs(a - b) <= SAME_WINDOWS * abs(a)
