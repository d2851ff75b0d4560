"""A record is either whole and valid or not there, and what is wrong with one is said in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import report_records as examples

from qexp.core.errors import UserError
from qexp.report import record


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    run = examples.with_activations(examples.record("quarot", "w4a4kv4", 0.04))
    path = record.write(tmp_path / "new" / "folder", run)
    assert record.read(path) == run


def test_not_finite_numbers_become_null_in_valid_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = record.write(tmp_path, examples.diverged())
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["metrics"]["perplexity/generated"] is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "42 numbers" in caplog.text


def test_a_failed_write_leaves_the_old_record_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = examples.record("rtn", "w4a16", 0.01)
    record.write(tmp_path, old)

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(json, "dump", broken)
    with pytest.raises(OSError, match="disk full"):
        record.write(tmp_path, examples.record("gptq", "w4a16", 0.01))
    assert record.read(tmp_path / "record.json") == old
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"status": "running"}, "status is 'running'"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"metrics": {"perplexity/generated": "44"}}, "perplexity/generated is '44'"),
        ({"metrics": {"perplexity/generated/ci95": 3.0}}, r"ci95 is 3.0, not \[low, high\]"),
        ({"blocks": [{"index": 0, "layers": [{"name": "q"}]}]}, r"blocks\[0\]"),
        ({"warnings": "one"}, "warnings is str, not list"),
    ],
)
def test_each_break_of_the_schema_is_named(change: dict[str, object], complaint: str) -> None:
    run = {**examples.record("rtn", "w4a16", 0.01), **change}
    with pytest.raises(ValueError, match=complaint):
        record.validate(run)


def test_all_problems_are_told_at_once() -> None:
    run = dict(examples.record("rtn", "w4a16", 0.01), status="lost")
    del run["config"]
    with pytest.raises(ValueError, match=r"config is missing.*status is 'lost'"):
        record.validate(run)


def test_tensors_are_refused_where_they_stand(tmp_path: Path) -> None:
    run = examples.record("rtn", "w4a16", 0.01)
    run["metrics"]["size/bytes"] = object()
    with pytest.raises(TypeError, match=r"record\.metrics\.size/bytes is object"):
        record.write(tmp_path, run)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"schema": 1}'])
def test_a_corrupt_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"record\.json") as caught:
        record.find([tmp_path])
    assert "\n" not in str(caught.value)


def test_records_are_found_once_however_often_their_folder_is_named(tmp_path: Path) -> None:
    for i, gap in enumerate((0.01, 0.02)):
        record.write(tmp_path / "sweep" / str(i), examples.record("rtn", "w4a16", gap))
    found = record.find([tmp_path, tmp_path / "sweep", tmp_path / "sweep" / "0" / "record.json"])
    assert len(found) == 2


@pytest.mark.parametrize("name", ["", "missing"])
def test_nothing_to_find_is_the_users_mistake(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        record.find([tmp_path / name])


def test_the_examples_are_valid_but_for_what_is_not_finite() -> None:
    for run in examples.study():
        record.validate(run)
        assert all(
            not isinstance(v, float) or math.isfinite(v) or run["name"].startswith("smooth")
            for v in run["metrics"].values()
        )
