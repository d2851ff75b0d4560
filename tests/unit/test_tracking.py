"""W&B equals the record, never hangs, never loses a run; progress is quiet where nobody watches."""

from __future__ import annotations

import json
import logging
import math
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qexp.core.errors import UserError
from qexp.core.losses import curves
from qexp.report import learning
from qexp.tracking.progress import StderrHandler, track
from qexp.tracking.wandb import NoTracking, Wandb, resolve_mode

OFFLINE = Wandb(mode="offline", project="qexp", entity=None, connect_seconds=1.0, upload_seconds=5.0)
CHOICES = {"method": "quarot", "method/solver": "gptq", "bits": "w4a4kv4", "model": "embedded"}
RECORD: dict[str, Any] = {
    "schema": 1,
    "status": "completed",
    "fingerprint": "0123abcd",
    "name": "quarot-w4a4kv4",
    "config": {"method": {"name": "quarot"}, "bits": {"weight": 4}, "eval": {"tasks": ["qexp_grammar"]}, "seed": 0},
    "warnings": ["one silent fallback"],
    "environment": {"torch": "2.13.0"},
    "metrics": {
        "perplexity/generated": 12.345678901234567,
        "perplexity/generated/ci95": [12.1, 12.6],
        "accuracy/qexp_grammar": 0.75,
        "size/bytes": 3_456_789,
        "speed/decode_tokens_per_s": None,
    },
    "cost": {"quantize_seconds": 12.5, "peak_rss_bytes": 10**9},
    "blocks": [
        {
            "index": index,
            "seconds": 1.5,
            "layers": [
                {"name": f"layers.{index}.q_proj", "bits": 4, "error": 0.02, "sqnr_db": 17.0},
                {"name": f"layers.{index}.k_proj", "bits": 4, "error": 0.04, "sqnr_db": None},
            ],
        }
        for index in range(2)
    ],
    "published": [{"value": 5.5, "source": "2404.00456 Table 1"}],
}


def no_figures() -> dict[str, Any]:
    return {}


def one_figure() -> dict[str, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    return {"error_by_block": figure}


def protobuf_records(run_folder: Path, block: int = 32768) -> Iterator[Any]:
    """Read a .wandb file: LevelDB log framing (crc, length, type) after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data = next(run_folder.glob("*.wandb")).read_bytes()
    assert data[:4] == b":W&B", "not a W&B log"
    at, buffer = 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0 or at + 7 + size > len(data):  # the writer has not come further yet
            break
        buffer = (b"" if kind in (1, 2) else buffer) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(buffer)
            yield record


def read_back(run_folder: Path, seconds: float = 30.0) -> dict[str, Any]:
    """Return run (protobuf), exit code, config, summary and history rows as the log holds them.

    W&B's writer is another process: `finish` may return a moment before the log is on disk (seen in 13 of 40 runs).
    """
    deadline = time.monotonic() + seconds
    while "exit_code" not in (back := parsed(run_folder)):
        assert time.monotonic() < deadline, f"no end of run in {run_folder}"
        time.sleep(0.02)
    return back


def parsed(run_folder: Path) -> dict[str, Any]:
    back: dict[str, Any] = {"config": {}, "summary": {}, "history": []}
    for record in protobuf_records(run_folder):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            back["run"] = record.run
            back["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "summary":
            back["summary"] |= {key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "history":
            back["history"].append({key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "exit":
            back["exit_code"] = record.exit.exit_code
    return back


def key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("wandb.login", lambda **_: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings_of("online", monkeypatch)  # W&B's own default; the process-wide one was made under WANDB_MODE=offline
    return monkeypatch


def settings_of(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)))


def test_an_offline_run_holds_what_the_record_holds(tmp_path: Path) -> None:
    where = OFFLINE.publish(RECORD, CHOICES, "sweep-1", tmp_path, one_figure)
    assert where is not None
    assert Path(where).parent == tmp_path / "wandb"
    back = read_back(Path(where))

    assert {name: back["summary"][name] for name in RECORD["metrics"]} == RECORD["metrics"]
    assert back["summary"]["cost/quantize_seconds"] == 12.5
    assert back["summary"]["status"] == "completed"
    assert back["config"]["cfg"] == RECORD["config"]
    assert {name: back["config"][name] for name in CHOICES} == CHOICES
    run = back["run"]
    assert (run.display_name, run.run_group, run.job_type, run.project) == (
        "quarot-w4a4kv4",
        "sweep-1",
        "ptq",
        "qexp",
    )
    assert sorted(run.tags) == ["embedded", "quarot", "w4a4kv4"]
    assert run.notes == "one silent fallback"
    assert back["exit_code"] == 0


def test_the_gap_and_the_name_of_the_bits_are_there_to_compare_by(tmp_path: Path) -> None:
    config = RECORD["config"] | {"bits": {"name": "w3a16g64", "weight": 3}}
    metrics = RECORD["metrics"] | {"fp/perplexity/generated": 12.0}
    where = OFFLINE.publish({**RECORD, "config": config, "metrics": metrics}, CHOICES, "s", tmp_path, no_figures)
    assert where is not None
    back = read_back(Path(where))
    assert back["summary"]["gap/generated"] == math.log(metrics["perplexity/generated"]) - math.log(12.0)
    assert back["config"]["bits"] == "w3a16g64" and "w3a16g64" in back["run"].tags, "not w4a4kv4, which keys changed"


def test_a_table_about_a_sweep_is_a_run_in_its_group(tmp_path: Path) -> None:
    where = OFFLINE.tabulate("study", (["trial", "method"], [[3, "gptq"], [5, "rtn"]]), tmp_path)
    assert where is not None
    run = read_back(Path(where))["run"]
    assert (run.display_name, run.run_group, run.job_type) == ("study", "study", "search")
    table = json.loads(next((Path(where) / "files" / "media" / "table").glob("front*.json")).read_text())
    assert table["columns"] == ["trial", "method"] and table["data"] == [[3, "gptq"], [5, "rtn"]]


def test_a_table_that_cannot_be_shown_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert OFFLINE.tabulate("study", (["trial"], [[1, "too many"]]), tmp_path) is None
    assert "the files on disk are complete" in caplog.text
    NoTracking().tabulate("study", (["trial"], []), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_blocks_and_figures_become_curves_a_table_and_images(tmp_path: Path) -> None:
    where = OFFLINE.publish(RECORD, CHOICES, None, tmp_path, one_figure)
    assert where is not None
    curve = [row for row in read_back(Path(where))["history"] if "block/index" in row]
    assert [row["block/index"] for row in curve] == [0, 1]
    assert curve[0]["block/error"] == pytest.approx(0.03)
    assert curve[0]["block/sqnr_db"] == 17.0  # an unknown value is left out of the mean, not counted as zero

    media = Path(where) / "files" / "media"
    table = json.loads(next((media / "table").glob("layers*.json")).read_text())
    assert table["columns"] == ["block", "layer", "bits", "error", "sqnr_db"]
    assert table["data"][2] == [1, "layers.1.q_proj", 4, 0.02, 17.0]
    assert next((media / "images").rglob("*.png")).read_bytes()[:4] == b"\x89PNG"


def test_losses_become_curves_over_steps_and_inputs_a_table(tmp_path: Path) -> None:
    loud, quiet = {"kurtosis": 9.0, "peak": 30.0, "sqnr_db": 11.0}, {"kurtosis": 3.0, "peak": 2.0, "sqnr_db": None}
    told = {"kronecker": {"plain": 0.4, "start": 0.3, "best": 0.1, "seconds": 2.0, "degraded": 0.0}}
    blocks = [
        {**block, "losses": {"kronecker": [0.3, 0.2 - i / 10]}, "learned": told}
        for i, block in enumerate(RECORD["blocks"])
    ]
    about = {
        "inputs": [{"layer": "layers.0.q_proj", "before": loud, "after": quiet}],
        "losses": {"learned_rotation": [4.0, 3.5, 3.25]},
    }
    where = OFFLINE.publish({**RECORD, "blocks": blocks, "diagnostics": about}, CHOICES, None, tmp_path, no_figures)
    assert where is not None
    steps = [row for row in read_back(Path(where))["history"] if "learn/step" in row]
    assert [row["learn/step"] for row in steps] == [1, 2, 3]
    assert [row["learn/learned_rotation/model"] for row in steps] == [4.0, 3.5, 3.25]
    assert [row.get("learn/kronecker/block_1") for row in steps] == [0.3, 0.1, None]
    per_block = [row for row in read_back(Path(where))["history"] if "block/index" in row]
    assert [row["block/kronecker/best"] for row in per_block] == [0.1] * len(blocks)
    table = json.loads(next((Path(where) / "files" / "media" / "table").glob("inputs*.json")).read_text())
    names = [f"{key}_{when}" for key in ("kurtosis", "peak", "sqnr_db") for when in ("before", "after")]
    assert table["columns"] == ["layer", *names]
    assert table["data"] == [["layers.0.q_proj", 9.0, 3.0, 30.0, 2.0, 11.0, None]]


def test_a_failed_run_is_marked_failed_and_the_next_one_is_its_own(tmp_path: Path) -> None:
    failed = {**RECORD, "name": "broken", "status": "failed", "metrics": {}, "blocks": []}
    first = OFFLINE.publish(failed, CHOICES, "sweep-1", tmp_path, no_figures)
    second = OFFLINE.publish(RECORD, CHOICES, "sweep-1", tmp_path, no_figures)
    assert first is not None
    assert second is not None
    assert first != second
    assert read_back(Path(first))["exit_code"] == 1
    assert read_back(Path(second))["run"].display_name == "quarot-w4a4kv4"


def test_a_broken_figure_costs_a_warning_but_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no ink")

    assert OFFLINE.publish(RECORD, CHOICES, None, tmp_path, broken) is None
    assert "no ink" in caplog.text
    run_folder = next((tmp_path / "wandb").glob("offline-run-*"))
    assert read_back(run_folder)["summary"]["perplexity/generated"] == RECORD["metrics"]["perplexity/generated"]


def test_an_unreachable_server_falls_back_to_offline(
    tmp_path: Path, logged_out: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    real = wandb.init

    def no_network(**arguments: Any) -> Any:
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("Run initialization has timed out after 1.0 sec.")
        return real(**arguments)

    logged_out.setattr("wandb.login", lambda **_: True)
    logged_out.setattr("wandb.init", no_network)
    where = replace(OFFLINE, mode="online").publish(RECORD, CHOICES, None, tmp_path, no_figures)
    assert where is not None
    assert "offline-run" in where
    assert "timed out" in caplog.text


@pytest.mark.parametrize(
    ("requested", "environment", "logged_in", "expected"),
    [
        ("auto", None, False, "offline"),
        ("auto", None, True, "online"),
        ("auto", "offline", True, "offline"),
        ("auto", "dryrun", True, "offline"),
        ("auto", "disabled", True, "disabled"),
        ("auto", "online", False, "offline"),  # W&B itself would wait at a prompt
        ("online", "offline", True, "online"),  # what is typed beats the environment
        ("online", None, False, "offline"),
        ("offline", None, True, "offline"),
    ],
)
def test_the_mode_never_prompts(
    logged_out: pytest.MonkeyPatch, requested: str, environment: str | None, logged_in: bool, expected: str
) -> None:
    logged_out.setattr("wandb.login", lambda **_: logged_in)
    if environment is not None:
        logged_out.setenv("WANDB_MODE", environment)
    assert resolve_mode(requested) == expected


def test_what_wandb_offline_wrote_is_honoured(logged_out: pytest.MonkeyPatch) -> None:
    logged_out.setattr("wandb.login", lambda **_: True)
    settings_of("offline", logged_out)
    assert resolve_mode("auto") == "offline"


def test_disabled_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert replace(OFFLINE, mode="auto").publish(RECORD, CHOICES, None, tmp_path, no_figures) is None
    assert not list(tmp_path.rglob("*.wandb"))


def test_online_without_a_login_is_refused_before_the_work(logged_out: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="tracking=offline"):
        replace(OFFLINE, mode="online").check()
    with pytest.raises(UserError, match="did you mean offline"):
        replace(OFFLINE, mode="ofline").check()
    OFFLINE.check()
    NoTracking().check()


def test_none_publishes_nothing(tmp_path: Path) -> None:
    def never() -> dict[str, Any]:
        raise AssertionError("figures must not be drawn for nobody")

    NoTracking().publish(RECORD, CHOICES, None, tmp_path, never)
    assert not list(tmp_path.iterdir())


def test_progress_off_a_terminal_is_one_log_line(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        assert list(track("blocks", iter("abc"), total=3)) == ["a", "b", "c"]
    assert [record.getMessage()[:12] for record in caplog.records] == ["blocks: 3 in"]
    assert capsys.readouterr() == ("", "")


def test_a_long_loop_off_a_terminal_says_now_and_then_how_far_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("qexp.tracking.progress.time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO):
        for _ in track("blocks", iter(range(6)), total=6):
            now[0] += 90.0
    told = [record.getMessage() for record in caplog.records]
    assert told == ["blocks: 2 of 6, about 6 min left", "blocks: 4 of 6, about 3 min left", "blocks: 6 in 540.0 s"]


def test_progress_on_a_terminal_nests_and_leaves_log_lines_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    console = Console(stderr=True, force_terminal=True, width=100)
    monkeypatch.setattr("qexp.tracking.progress._stderr_console", lambda: console)
    logger = logging.getLogger("qexp.test_progress")
    handler = StderrHandler()
    logger.addHandler(handler)
    try:
        for block in track("blocks [0/1]", range(2)):
            assert list(track("layers", range(3))) == [0, 1, 2]
            logger.warning("block %d [bold]done[/bold]", block)
    finally:
        logger.removeHandler(handler)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "blocks [0/1]" in shown.err  # a description is text, not markup
    assert "block 1 [bold]done[/bold]\n" in shown.err.replace("\r", "")
    assert "2/2" in shown.err


def test_a_step_without_a_loss_is_left_out_of_the_curve(tmp_path: Path) -> None:
    about = {"losses": {"learned_rotation": [4.0, None, 3.0]}}
    where = OFFLINE.publish({**RECORD, "diagnostics": about}, CHOICES, None, tmp_path, no_figures)
    assert where is not None
    steps = [row for row in read_back(Path(where))["history"] if "learn/step" in row]
    assert [row.get("learn/learned_rotation/model") for row in steps] == [4.0, None, 3.0]
    assert learning.draw(curves({"diagnostics": about})["learned_rotation"]).axes[0].lines
