"""What a run leaves behind: one ``record.json`` per output folder, and nothing else the report needs.

Schema 1 is the public contract (docs/report.md). Numbers that are not finite are stored as ``null``, so that the file
is JSON for every reader. A record is written beside its place and renamed: a reader sees all of it or none.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from qexp.core.errors import UserError

log = logging.getLogger(__name__)

SCHEMA = 1
FILE_NAME = "record.json"


class LayerRecord(TypedDict):
    """One quantized layer: stored bits, relative output error ||dW X||^2 / ||W X||^2, and the same in decibel."""

    name: str
    bits: float
    error: float | None
    sqnr_db: float | None


class BlockRecord(TypedDict):
    """One decoder block: its layers and the seconds it took."""

    index: int
    seconds: float
    layers: list[LayerRecord]


class ActivationRecord(TypedDict):
    """|x| of one layer's input on a small grid, tokens x channels, before and after the transforms."""

    layer: str
    before: list[list[float]]
    after: list[list[float]]
    kurtosis_before: float
    kurtosis_after: float


class Diagnostics(TypedDict, total=False):
    """Optional material for plots: ``inputs`` {layer, before, after}, ``losses`` learned, ``allocation`` measured."""

    activations: list[ActivationRecord]
    inputs: list[dict[str, Any]]
    losses: dict[str, list[float]]
    allocation: dict[str, Any]


class Cost(TypedDict, total=False):
    """What the run used, in seconds and bytes."""

    quantize_seconds: float
    evaluate_seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int


class _PublishedNumber(TypedDict):
    value: float
    source: str


class Published(_PublishedNumber, total=False):
    """One published number of the same setting; ``metric`` is the metric key it stands beside."""

    metric: str
    fp_value: float | None
    note: str


class _Schema1(TypedDict):
    schema: int
    status: Literal["completed", "failed"]
    fingerprint: str
    name: str
    config: dict[str, Any]
    warnings: list[str]
    environment: dict[str, Any]
    metrics: dict[str, Any]
    cost: Cost
    blocks: list[BlockRecord]
    published: list[Published]


class Record(_Schema1, total=False):
    """``record.json``, schema 1. ``metrics`` is flat: a number, null (not finite), or [low, high] for ``.../ci95``.

    ``window_losses``: mean loss of each window in nats per token, for paired statistics. ``error``: of a failed run.
    """

    window_losses: dict[str, list[float | None]]
    diagnostics: Diagnostics
    error: str


_REQUIRED: dict[str, type] = {
    "schema": int, "status": str, "fingerprint": str, "name": str, "config": dict, "warnings": list,
    "environment": dict, "metrics": dict, "cost": dict, "blocks": list, "published": list,
}  # fmt: skip
_OPTIONAL: dict[str, type] = {"window_losses": dict, "diagnostics": dict, "error": str}


def write(folder: Path | str, record: Record) -> Path:
    """Write ``record`` to ``folder/record.json`` by atomic rename and return that path.

    Raises: ValueError if the record does not follow the schema, TypeError if a value is not plain data.
    """
    lost: list[str] = []
    clean = _plain(record, "record", lost)
    validate(clean)
    if lost:
        log.warning("%d numbers are not finite and stored as null, the first is %s", len(lost), lost[0])
    target = Path(folder) / FILE_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{FILE_NAME}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(clean, file, ensure_ascii=False, allow_nan=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes files only the owner can read
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def read(path: Path | str) -> Record:
    """Read one ``record.json``. Raises: UserError if the file is missing, not JSON or not a record of this schema."""
    redo = "remove the file or run that experiment again with resume=false"
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        validate(record)
    except (OSError, UnicodeDecodeError, ValueError) as error:  # JSONDecodeError is a ValueError
        raise UserError(f"{path} cannot be read as a record: {error}", f"schema {SCHEMA}; {redo}") from error
    return cast("Record", record)


def find(paths: Iterable[Path | str]) -> list[Record]:
    """Read every record below ``paths`` (folders, or record files themselves), each file once, in path order.

    Raises: UserError if a path does not exist, a record is corrupt, or there is none at all.
    """
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.exists():
            raise UserError(f"{root} does not exist", "a folder that holds runs", "output_dir of a run, e.g. outputs")
    files = {file.resolve() for root in roots for file in ([root] if root.is_file() else root.rglob(FILE_NAME))}
    if not files:
        raise UserError(
            f"no {FILE_NAME} below {', '.join(map(str, roots))}", "at least one finished run; start one with: qexp"
        )
    return [read(file) for file in sorted(files)]


def validate(record: Any) -> None:
    """Check a record against schema 1. Raises: ValueError that lists every problem, not only the first."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a record is an object, got {type(record).__name__}")
    problems = [*_key_problems(record), *_metric_problems(record), *_block_problems(record)]
    if problems:
        raise ValueError("; ".join(problems))


def _key_problems(record: Mapping[str, Any]) -> list[str]:
    expected = _REQUIRED | _OPTIONAL
    problems = [f"{key} is missing" for key in _REQUIRED if key not in record]
    problems += [f"unknown key {key}" for key in record if key not in expected]
    problems += [
        f"{key} is {type(record[key]).__name__}, not {kind.__name__}"
        for key, kind in expected.items()
        if key in record and not isinstance(record[key], kind)
    ]
    if record.get("schema", SCHEMA) != SCHEMA:
        problems.append(f"schema is {record['schema']!r}, this program reads {SCHEMA}")
    if record.get("status", "failed") not in ("completed", "failed"):
        problems.append(f"status is {record['status']!r}, not completed or failed")
    return problems


def _metric_problems(record: Mapping[str, Any]) -> list[str]:
    metrics = record.get("metrics")
    if not isinstance(metrics, Mapping):
        return []
    return [
        f"metrics.{key} is {value!r}, not {'[low, high]' if key.endswith('/ci95') else 'a number or null'}"
        for key, value in metrics.items()
        if not (_is_interval(value) if key.endswith("/ci95") else _is_number(value))
    ]


def _block_problems(record: Mapping[str, Any]) -> list[str]:
    blocks = record.get("blocks")
    if not isinstance(blocks, list):
        return []
    return [
        f"blocks[{i}] lacks index or layers of name and error"
        for i, block in enumerate(blocks)
        if not (
            isinstance(block, Mapping)
            and "index" in block
            and all(
                isinstance(layer, Mapping) and {"name", "error"} <= layer.keys() for layer in block.get("layers", [{}])
            )
        )
    ]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))


def _plain(value: Any, where: str, lost: list[str]) -> Any:
    """Copy ``value`` as JSON data; a number that is not finite becomes None and its place goes into ``lost``."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        lost.append(where)
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}", lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", lost) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{where} is {type(value).__name__}; a record holds plain data only")
