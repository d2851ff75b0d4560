"""What the comparison shows: one ``Column`` per fact, found from the metrics that the rows have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Literal

from qexp.report.record import Published
from qexp.report.rows import Row, sets

ABSENT = "–"
DIVERGED = "diverged"
_MOST_SETTINGS = 2  # columns of settings; more of them are one column, so that figures stay in sight

Scalar = str | float | None
Kind = Literal["text", "number"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: ``value`` for sorting and CSV, ``text`` for people; ``key`` is the metric's key in the record."""

    key: str
    title: str
    kind: Kind
    value: Callable[[Row], Scalar]
    text: Callable[[Row], str]
    help: str = ""
    csv_only: bool = False
    spare: int = 0  # a narrow terminal drops the columns of highest number first, those of 0 never
    pinned: bool = False  # of a baseline, which a page may choose later


def find(rows: Sequence[Row], *, pinned: bool = False) -> list[Column]:
    """Return every column that has a value in at least one of ``rows``, identity first, status last.

    ``pinned`` keeps the columns of a baseline that was not chosen yet, for sets whose windows were recorded.
    """
    every = [*_identity(rows), *_perplexity(rows), *_agreement(rows), *_size_and_cost(), *_outcome()]
    scored = {name for row in rows for run in row.runs for name in run.get("window_losses", {})} if pinned else set()
    return [
        column
        for column in every
        if any(column.text(row) != ABSENT for row in rows) or (column.pinned and column.key.partition("/")[2] in scored)
    ]


def settings() -> Column:
    """Return all settings that tell rows apart as one column."""

    def text(row: Row) -> str:
        return ", ".join(f"{key.removeprefix('method.')}={value}" for key, value in row.settings.items()) or ABSENT

    return Column(key="settings", title="settings", kind="text", value=text, text=text)


def split_constant(visible: Sequence[Column], rows: Sequence[Row]) -> tuple[list[Column], list[str]]:
    """Return the columns whose values differ between rows, and the others as ``title: text``."""
    texts = {column.key: {column.text(row) for row in rows} - {ABSENT} for column in visible}
    always = {column.key for column in visible if len(rows) == 1 or column.key == "method" or column.pinned}
    kept = [column for column in visible if len(texts[column.key]) > 1 or column.key in always]
    return kept, [f"{column.title}: {min(texts[column.key])}" for column in visible if column not in kept]


def _identity(rows: Sequence[Row]) -> Iterator[Column]:
    for name in ("method", "bits", "model"):
        yield _text(name, attrgetter(name))
    for kind in dict.fromkeys(key for row in rows for key in row.stages):
        yield _text(f"stage/{kind}", _looked_up("stages", kind), kind, spare=9 if _implied(kind, rows) else 0)
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    merged = len(keys) > _MOST_SETTINGS
    for key in keys:
        yield replace(
            _text(f"setting/{key}", _looked_up("settings", key), key.removeprefix("method.")), csv_only=merged
        )
    if merged:
        yield settings()


def _perplexity(rows: Sequence[Row]) -> Iterator[Column]:
    for name, of in _named(sets(rows, "perplexity")):
        yield _number(f"perplexity/{name}", f"ppl{of}", "{:#.4g}", "perplexity; lower is better", spread=True)
        yield _number(f"fp/perplexity/{name}", f"float ppl{of}", "{:.4g}", csv_only=True)
        for i, end in enumerate(("low", "high")):
            yield _bound(f"perplexity/{name}/ci95", i, end)
        about = "log perplexity minus that of the float model, nats; lower is better"
        yield _number(f"gap/{name}", f"gap{of}", "{:+.4f}", about, spread=True)
        yield from _baseline(name, of)
        yield _raw(f"versus/{name}/low", _looked_up("low", f"versus/{name}"))
        yield _raw(f"versus/{name}/high", _looked_up("high", f"versus/{name}"))
        yield from _published(f"perplexity/{name}", f"published{of}")


def _baseline(name: str, of: str) -> Iterator[Column]:
    about = "better or worse than the baseline where the 95 % interval excludes zero, else undecided"
    yield replace(_text(f"verdict/{name}", _verdict(name), f"verdict{of}", spare=1), help=about, pinned=True)
    about = "log perplexity minus the baseline's, nats, paired 95 % interval; negative is better"
    yield _number(f"versus/{name}", f"vs baseline{of}", "{:+.4f}", about, spread=True, pinned=True)
    about = "gap divided by the baseline's gap"
    yield _number(f"ratio/{name}", f"gap ratio{of}", "{:.2f}×", about, spare=3, pinned=True)


def _verdict(name: str) -> Callable[[Row], str | None]:
    def verdict(row: Row) -> str | None:
        low, high = (ends.get(f"versus/{name}") for ends in (row.low, row.high))
        if low is None or high is None:
            return None
        return "better" if high < 0 else "worse" if low > 0 else "undecided"

    return verdict


def _agreement(rows: Sequence[Row]) -> Iterator[Column]:
    for name, of in _named(sets(rows, "divergence/kl")):
        yield _number(f"divergence/kl/{name}", f"KL{of}", "{:.4f}", "KL(float || quantized), nats per token", spare=2)
    for name, of in _named(sets(rows, "divergence/top1")):
        yield _number(f"divergence/top1/{name}", f"top-1{of}", "{:.1%}", "tokens with the float model's guess", spare=4)
    for name in sets(rows, "accuracy"):
        yield _accuracy(f"accuracy/{name}", name)
        yield _number(f"accuracy/{name}/stderr", f"{name} stderr", "{:.1%}", csv_only=True)
        yield _number(f"fp/accuracy/{name}", f"float {name}", "{:.1%}", "accuracy of the float model", spare=7)


def _named(names: list[str]) -> list[tuple[str, str]]:
    """Pair each set with its suffix in titles, none where there is but one set."""
    return [(name, f" {name}" if len(names) > 1 else "") for name in names]


def _size_and_cost() -> Iterator[Column]:
    yield _number("size/bits_per_weight", "bits/weight", "{:.3f}", "of all that is stored: scales, tables, outliers")
    yield _number("size/bytes", "size", "bytes", "bytes of the whole model", spare=5)
    yield _number("size/kv_bytes_per_token", "KV/token", "bytes", "cache bytes per token", spare=6)
    for phase in ("prefill", "decode"):
        yield _number(f"speed/{phase}_tokens_per_s", f"{phase} tok/s", "{:.4g}", "on packed integers", spare=4)
    yield _number("cost/quantize_seconds", "quantize s", "{:.1f}", "seconds to quantize", spare=5)
    yield _number("cost/evaluate_seconds", "evaluate s", "{:.1f}", "seconds to evaluate", spare=8)


def _outcome() -> Iterator[Column]:
    yield _raw("seeds", lambda row: float(len(row.runs)))
    yield _text("status", status)


def status(row: Row) -> str:
    """Return how the runs of a row ended, with the first line of the error of a failed one."""
    run = row.runs[0]
    if row.failed:
        lines = run.get("error", "").strip().splitlines()
        return f"failed: {lines[0]}" if lines else "failed"
    warnings = sum(len(r["warnings"]) for r in row.runs)
    return "completed" + (f" ({warnings} warning{'s' * (warnings > 1)})" if warnings else "")


def _looked_up(mapping: str, key: str) -> Callable[[Row], Any]:
    """Return the function that looks ``key`` up in one of a row's mappings, None where it is absent."""
    return lambda row: getattr(row, mapping).get(key)


def _implied(kind: str, rows: Sequence[Row]) -> bool:
    """Return whether a row's method says which members of ``kind`` it has: none was swapped in any row."""
    return len({(row.method, row.stages.get(kind)) for row in rows}) == len({row.method for row in rows})


def _text(key: str, value: Callable[[Row], str | None], heading: str = "", spare: int = 0) -> Column:
    def text(row: Row) -> str:
        return value(row) or ABSENT

    return Column(key=key, title=heading or key, kind="text", value=value, text=text, spare=spare)


def _raw(key: str, value: Callable[[Row], Any]) -> Column:
    def text(row: Row) -> str:
        return ABSENT if value(row) is None else str(value(row))

    return Column(key=key, title=key, kind="number", value=value, text=text, csv_only=True)


def _number(key: str, heading: str, form: str, about: str = "", *, spread: bool = False, **flags: Any) -> Column:
    def text(row: Row) -> str:
        if key not in row.metrics:
            return ABSENT
        value = row.metrics[key]
        if value is None:
            return DIVERGED
        return readable(value, form) + (_range(row, key, form) if spread else "")

    return Column(
        key=key, title=heading, kind="number", value=lambda r: r.metrics.get(key), text=text, help=about, **flags
    )


def _range(row: Row, key: str, form: str) -> str:
    if key not in row.low or row.low[key] == row.high[key]:
        return ""
    return f" [{readable(row.low[key], form)}, {readable(row.high[key], form)}]"


def _accuracy(key: str, heading: str) -> Column:
    def text(row: Row) -> str:
        value, error = row.metrics.get(key), row.metrics.get(f"{key}/stderr")
        if value is None:
            return DIVERGED if key in row.metrics else ABSENT
        return f"{value:.1%}" + (f" ± {100 * error:.1f}" if error is not None else "")

    return Column(key=key, title=heading, kind="number", value=lambda r: r.metrics.get(key), text=text, help="accuracy")


def _bound(key: str, index: int, end: str) -> Column:
    def value(row: Row) -> float | None:
        interval = row.runs[0]["metrics"].get(key) if len(row.runs) == 1 else None
        return interval[index] if interval else None

    return _raw(f"{key}/{end}", value)


def _published(key: str, heading: str) -> Iterator[Column]:
    """Yield the published numbers of the setting, and for CSV the first one's source and how far off it the row is."""

    def entries(row: Row) -> list[Published]:
        return [entry for entry in row.runs[0]["published"] if entry.get("metric", key) == key]

    def text(row: Row) -> str:
        return " / ".join(f"{entry['value']:g}" for entry in entries(row)) or ABSENT

    def difference(row: Row) -> float | None:
        measured, first = row.metrics.get(key), next(iter(entries(row)), None)
        return None if measured is None or first is None else 100 * (measured / first["value"] - 1)

    yield Column(
        key=f"published/{key}", title=heading, kind="number", text=text, help="printed in a paper for this setting",
        value=lambda row: next((entry["value"] for entry in entries(row)), None),
    )  # fmt: skip
    yield _raw(f"published/{key}/difference_percent", difference)
    yield _raw(f"published/{key}/source", lambda row: next((entry["source"] for entry in entries(row)), None))


def readable(value: float, form: str) -> str:
    """Format by a format string, or as bytes with a decimal unit where ``form`` is ``bytes``."""
    if form != "bytes":
        return form.format(value)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"
