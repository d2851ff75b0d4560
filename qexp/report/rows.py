"""From records to the rows of a comparison: who it was (method, bits, model, what differs) and what was measured.

Runs that differ in nothing but seeds become one row: metrics are means, with their range kept. So do runs of the float
model that differ in bits, which it does not use. A stage is shown where it differs between any two rows that quantize;
another setting is shown where nothing else tells two rows of one method apart.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexp.core.gaps import gaps
from qexp.report.record import Record

KINDS = ("transform", "grid", "solver", "act", "kv", "tuner", "allocation")
# Where a run was written and who watched it; the fingerprint leaves them out as well.
_NOT_A_SETTING = (
    "output_dir", "resume", "tracking", "hydra", "method.name", "method._target_", "bits.name", "model.name",
)  # fmt: skip
FLOAT_BITS = "w16a16"  # of a float row, whatever bits its run was given
FULL_BITS = 16  # of a quantizer that does nothing
_FLOAT_GAP = 1e-6  # nats; below it a 16-bit row is the float model itself, evaluated once more


@dataclass(kw_only=True)
class Row:
    """One line of the comparison.

    ``metrics`` holds means over ``runs``, None where a value was not finite; ``low`` and ``high`` the range over seeds,
    or the 95 % interval of a difference to the baseline.
    """

    method: str
    bits: str
    model: str
    runs: tuple[Record, ...]
    metrics: dict[str, float | None]
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    place: int = 0  # in the comparison, from 0

    @property
    def failed(self) -> bool:
        """Whether the run ended in an error."""
        return self.runs[0]["status"] == "failed"

    @property
    def label(self) -> str:
        """Return the shortest text that tells this row from the others of its model."""
        extra = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.method} {self.bits}" + (f" ({extra})" if extra else "")

    @property
    def is_float(self) -> bool:
        """Whether this row is the unquantized model: 16 bits or more, and no gap on any set."""
        return _is_float(self.metrics)


def make(records: Sequence[Record], *, by_seed: bool = False) -> list[Row]:
    """Return the rows of ``records``, ordered by model, bits and first perplexity; failed runs stand last."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for i, record in enumerate(records):
        alone = by_seed or record["status"] == "failed"
        groups[f"{i}" if alone else json.dumps(_setting(record), sort_keys=True)].append(record)
    rows = [_row(tuple(group)) for group in groups.values()]
    _name_stages(rows)
    _name_settings(rows, by_seed=by_seed)
    rows.sort(key=lambda row: (row.failed, row.model, row.bits, _rank(row)))
    for place, row in enumerate(rows):
        row.place = place
    return rows


def stages(method: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the member names of each stage kind of a resolved ``config.method``, in the order they are applied."""
    return {kind: list(_members(method.get(kind))) for kind in KINDS}


def _active(method: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the stages of a method without quantizers of 16 bits, which do nothing."""
    idle = [kind for kind in ("act", "kv") if ((method.get(kind) or {}).get("bits") or 0) >= FULL_BITS]
    return stages(method) | {kind: [] for kind in idle}


def sets(rows: Iterable[Row], prefix: str) -> list[str]:
    """Return the names ``x`` of all metrics ``prefix/x`` of the rows, in order of appearance."""
    start = f"{prefix}/"
    keys = (key for row in rows for key in row.metrics if key.startswith(start))
    return list(dict.fromkeys(key[len(start) :] for key in keys if "/" not in key[len(start) :]))


def title(record: Record) -> tuple[str, str, str]:
    """Return method, bits and model as the config names them, ``?`` for what a failed run never resolved.

    A model under a stress test is another model: ``embedded +rotate``, ``embedded +scale 4 x 30``.
    """
    config = record["config"]
    names = ((config.get(key) or {}).get("name") for key in ("method", "bits", "model"))
    method, bits, model = (str(name) if name else "?" for name in names)
    return method, bits, model + _stress((config.get("model") or {}).get("outliers") or {})


def _stress(outliers: Mapping[str, Any]) -> str:
    kind, channels = outliers.get("kind", "none"), outliers.get("channels", 0)
    size = f" {channels} x {outliers.get('scale', 1):g}" if channels else ""
    return "" if kind == "none" else f" +{kind}{size}"


def _members(node: Any) -> Iterator[str]:
    """Yield ``module`` of each ``package.module.Class`` below ``node``: the file a member lives in is its name."""
    if isinstance(node, Mapping) and "_target_" in node:
        path = str(node["_target_"]).split(".")
        yield path[-2] if len(path) > 1 else path[0]
    elif isinstance(node, Mapping | list):
        for item in node.values() if isinstance(node, Mapping) else node:
            yield from _members(item)


def _without_seeds(node: Any) -> Any:
    """Drop every key called ``seed``, and the keys that are no setting, from a resolved config."""
    if isinstance(node, Mapping):
        return {k: _without_seeds(v) for k, v in node.items() if k != "seed" and k not in _NOT_A_SETTING}
    return [_without_seeds(item) for item in node] if isinstance(node, list) else node


def _setting(record: Record) -> Any:
    """Return what tells rows apart: the config without seeds, of a float row without the bits it does not use."""
    setting = _without_seeds(record["config"])
    if isinstance(setting.get("method"), Mapping):  # where the class of all recipes lives is none, either
        setting["method"] = {key: value for key, value in setting["method"].items() if key != "_target_"}
    if _is_float(_measured(record)):
        setting = {key: value for key, value in setting.items() if key not in ("bits", "method")}
        setting["method"] = title(record)[0]
    return setting


def _is_float(metrics: Mapping[str, float | None]) -> bool:
    gaps = [value for key, value in metrics.items() if key.startswith("gap/")]
    wide = (metrics.get("size/bits_per_weight") or 16.0) >= 16.0
    return wide and bool(gaps) and all(gap is not None and abs(gap) < _FLOAT_GAP for gap in gaps)


def _row(runs: tuple[Record, ...]) -> Row:
    method, bits, model = title(runs[0])
    each = [_measured(run) for run in runs]
    row = Row(method=method, bits=FLOAT_BITS if _is_float(each[0]) else bits, model=model, runs=runs, metrics={})
    for key in dict.fromkeys(key for metrics in each for key in metrics):
        values = [metrics.get(key) for metrics in each]
        finite = [value for value in values if value is not None]
        row.metrics[key] = sum(finite) / len(finite) if finite and len(finite) == len(values) else None
        if len(finite) == len(values) > 1:
            row.low[key], row.high[key] = min(finite), max(finite)
    return row


def _measured(record: Record) -> dict[str, float | None]:
    """Return the scalar metrics and costs of one run, plus ``gap/<set>`` = log perplexity - log float perplexity."""
    scalars = {k: v for k, v in record["metrics"].items() if not isinstance(v, list)}
    costs = {f"cost/{key}": value for key, value in record["cost"].items()}
    return {**scalars, **costs, **gaps(scalars)}


def _name_stages(rows: list[Row]) -> None:
    """Set ``row.stages`` to the kinds whose members differ between any two rows that quantize."""
    each = [_active(row.runs[0]["config"].get("method") or {}) for row in rows]
    compared = [names for row, names in zip(rows, each, strict=True) if not row.is_float]
    differing = [kind for kind in KINDS if len({tuple(names[kind]) for names in compared}) > 1]
    for row, names in zip(rows, each, strict=True):
        row.stages = {} if row.is_float else {kind: " + ".join(names[kind]) or "none" for kind in differing}


def _name_settings(rows: list[Row], *, by_seed: bool) -> None:
    """Set ``row.settings`` to the other config values that tell rows of one method, bits and model apart."""
    alike: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        alike[(row.method, row.bits, row.model, *row.stages.values())].append(row)
    for group in alike.values():
        flat = [dict(flatten(row.runs[0]["config"], keep_seeds=by_seed)) for row in group]
        shared = [key for key in flat[0] if all(key in config for config in flat)]
        columns = {key: tuple(str(config[key]) for config in flat) for key in shared}
        # An interpolated value (method.grid.group from bits.group) is the same column twice: the first name stays.
        unique = {values: key for key, values in reversed(columns.items()) if len(set(values)) > 1}
        for i, row in enumerate(group):
            row.settings = {key: values[i] for values, key in reversed(unique.items())}


def flatten(node: Any, *, keep_seeds: bool, every: bool = False, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each leaf of a resolved config; ``every`` key, or those that are settings."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if every or (path not in _NOT_A_SETTING and (keep_seeds or key != "seed")):
                yield from flatten(value, keep_seeds=keep_seeds, every=every, prefix=f"{path}.")
    else:
        yield prefix.removesuffix("."), node


def _rank(row: Row) -> float:
    first = next((value for key, value in row.metrics.items() if key.startswith("perplexity/")), None)
    return math.inf if first is None else first
