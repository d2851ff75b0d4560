"""Rows of text from one local file: .txt, .jsonl, .parquet (and .gz of the first two)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from qexp.core.errors import UserError

LINES: dict[str, Callable[[str], list[str]]] = {
    "whole": lambda text: [text],
    # wikitext on the hub: a row keeps its line end, a blank line is the empty row
    "kept": lambda text: [line if line.strip() else "" for line in text.splitlines(keepends=True)],
    "stripped": lambda text: [line.strip() for line in text.splitlines() if line.strip()],
}
TEXT, JSON, PARQUET = (".txt", ".raw", ".txt.gz"), (".jsonl", ".json", ".jsonl.gz", ".json.gz"), (".parquet",)
SUFFIXES = (*TEXT, *JSON, *PARQUET)


def read(file: Path, column: str, lines: str, key: str) -> list[str]:
    """Return the rows of ``file``: ``lines`` says what a row of a text file is, ``column`` names that of a table.

    Raises: UserError for an unknown suffix, unreadable content, or a table that has neither ``column`` nor ``text``.
    """
    try:
        if file.name.endswith(TEXT):
            return LINES[lines](_content(file))
        if file.name.endswith(JSON):
            return _json(file, column, key)
        if file.name.endswith(PARQUET):
            return _parquet(file, column, key)
    except (UnicodeDecodeError, json.JSONDecodeError, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: {error}", "UTF-8 text", f"{key}=<another file>") from error
    raise UserError(f"{file.name} is not a known kind of file", "one of " + " ".join(SUFFIXES), f"{key}=<file>")


def _content(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")


def _json(file: Path, column: str, key: str) -> list[str]:
    """Return one column of JSON lines, one object a line."""
    rows = [json.loads(line) for line in _content(file).split("\n") if line.strip()]
    if not rows:
        return []
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file.name} has lines that are not JSON objects", "one object a line", f"{key}=<jsonl>")
    name = _column(file, list(rows[0]), column, key)
    if missing := sum(not isinstance(row.get(name), str) for row in rows):
        raise UserError(f"{file.name}: {missing} lines have no string {name!r}", "text in each", f"{key}=<jsonl>")
    return [row[name] for row in rows]


def _parquet(file: Path, column: str, key: str) -> list[str]:
    """Return one column of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        table: Any = parquet.ParquetFile(file)
        name = _column(file, list(table.schema_arrow.names), column, key)
        return cast(list[str], table.read(columns=[name]).column(name).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file.name}: {error}", "a parquet file", f"{key}=<another file>") from error


def _column(file: Path, columns: list[str], wanted: str, key: str) -> str:
    """Return ``wanted`` or, failing that, ``text``."""
    for name in (wanted, "text"):
        if name in columns:
            return name
    raise UserError(f"{file.name} has columns {', '.join(columns)}", f"a column {wanted!r}", f"{key}=<file with it>")
