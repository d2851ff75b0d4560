"""Sweeps lose nothing and repeat nothing: found without torch, locked while computed, indexed, killed and continued."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from tiny_runs import command, process, tiny

from qexp.core import sweep_index

WITHOUT_TORCH = """
import sys
from qexp.cli import main
main()
assert "torch" not in sys.modules, "torch was imported"
"""
FAILING = """
import qexp.engine.blocks, sys
if "fail" in sys.argv.pop(1):
    def quantize_blocks(*_): raise RuntimeError("the disk is on fire\\nand so is the room")
    qexp.engine.blocks.quantize_blocks = quantize_blocks
from qexp.cli import main
main()
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def index(out: Path) -> list[dict[str, str]]:
    with (out / sweep_index.FILE).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def completed(out: Path) -> dict[str, int]:
    """Return when each completed record was written, by run."""
    files = list(out.glob("*/record.json"))
    return {f.parent.name: f.stat().st_mtime_ns for f in files if json.loads(f.read_text())["status"] == "completed"}


def test_what_is_finished_is_found_without_torch(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["-m", *tiny(tiny_folder, tmp_path, "method=rtn,fp16", "calibration=none", "calibration.samples=8")]
    assert command(*words).code == 0
    before = completed(tmp_path)
    again = process(*words, script=WITHOUT_TORCH)
    assert again.code == 0, again.err
    assert again.err.count("finished before, nothing to do") == 2
    assert completed(tmp_path) == before and len(before) == 2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "note", "record"])
def test_it_is_not_taken_for_finished_where_anything_changed(what: str, tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny(tiny_folder, tmp_path / "out", "method=rtn", "eval=none")
    assert command(*words).code == 0
    if what == "weights":
        os.utime(tiny_folder / "model.safetensors")
    elif what == "note":
        next((tmp_path / "out" / ".known").glob("*.json")).write_text("{")
    else:
        next((tmp_path / "out").glob("*/record.json")).unlink()
    outcome = process(*words, script=WITHOUT_TORCH)
    assert outcome.code == 1 and "torch was imported" in outcome.err
    assert len(completed(tmp_path / "out")) == 1


def test_the_index_tells_what_where_how_long_and_how_good(tiny_folder: Path, tmp_path: Path) -> None:
    assert command("-m", *tiny(tiny_folder, tmp_path, "method=rtn,gptq", "bits=w3a16")).code == 0
    lines = {line["run"]: line for line in index(tmp_path)}
    assert lines.keys() == completed(tmp_path).keys() and len(lines) == 2
    for run, line in lines.items():
        metrics = json.loads((tmp_path / run / "record.json").read_text())["metrics"]
        assert line["status"] == "completed" and float(line["seconds"]) > 0
        assert "bits=w3a16" in line["overrides"] and f"method={run.split('-')[0]}" in line["overrides"]
        assert float(line["perplexity/generated"]) == pytest.approx(metrics["perplexity/generated"], rel=1e-5)


def test_the_report_tells_what_has_not_ended(tmp_path: Path) -> None:
    for i in range(3):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        (folder / "fingerprint.json").write_text("{}")
        sweep_index.begun(folder, "method=rtn")
    assert sweep_index.unfinished(tmp_path) == f"3 interrupted: {tmp_path}/index.csv"
    with FileLock(sweep_index.lock_of(tmp_path / "run0")):
        assert sweep_index.unfinished(tmp_path) == f"1 running, 2 interrupted: {tmp_path}/index.csv"
    (tmp_path / "run1" / "fingerprint.json").unlink()
    (tmp_path / "run1").rmdir()
    sweep_index.mend(tmp_path)
    assert {line["run"]: line["status"] for line in index(tmp_path)} == {"run0": "interrupted", "run2": "interrupted"}


@pytest.mark.slow
def test_a_run_that_another_process_computes_is_left_to_it(tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny(tiny_folder, tmp_path, "method=rtn", "eval=none")
    assert command(*words).code == 0
    (folder,) = (file.parent for file in tmp_path.glob("*/record.json"))
    (folder / "record.json").unlink()
    lock = sweep_index.lock_of(folder)
    hold = (
        "import sys, time; from pathlib import Path; from qexp.ownership import _locked; "
        "lock = _locked(Path(sys.argv[1]), 'it', True); print(1, flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline()
    try:
        alone, sweep = command(*words), command("-m", *words)
        waiting = subprocess.Popen(
            [sys.executable, "-m", "qexp", *words, "busy=wait"], stderr=subprocess.PIPE, text=True
        )
        assert waiting.stderr is not None
        assert any("waiting for process" in line for line in waiting.stderr)
    finally:
        holder.kill()
    assert alone.code == 2 and "is being computed by process" in alone.err and "busy=wait" in alone.err
    assert sweep.code == 0 and "elsewhere  " in sweep.err
    waiting.communicate(timeout=300)
    assert waiting.returncode == 0 and (folder / "record.json").exists()


@pytest.mark.slow
def test_what_failed_is_listed_and_tried_again_on_request_only(tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny(tiny_folder, tmp_path, "method=rtn", "eval=none")
    first = process("fail", "-m", *words, script=FAILING)
    assert first.code == 1
    assert index(tmp_path)[0]["status"] == "failed"
    assert index(tmp_path)[0]["cause"] == "RuntimeError: the disk is on fire and so is the room"
    second = process("go", "-m", *words, script=FAILING)
    assert second.code == 1
    failed = [line for line in second.err.splitlines() if line.startswith("failed  ")]
    assert len(failed) == 1 and "failed before: RuntimeError: the disk is on fire" in failed[0]
    assert "retry=true" in failed[0]
    assert command("-m", *words, "retry=true").code == 0
    assert index(tmp_path)[0]["status"] == "completed" and index(tmp_path)[0]["cause"] == ""


GIVEN_UP = """
import hydra.core.utils
run_job, done = hydra.core.utils.run_job, []
def given_up(*told, **more):
    if done:
        raise RuntimeError("the cluster is gone")
    done.append(run_job(*told, **more))
    return done[0]
hydra.core.utils.run_job = given_up
from qexp.cli import main
main()
"""


@pytest.mark.slow
def test_the_table_is_printed_where_a_launcher_gives_up(tiny_folder: Path, tmp_path: Path) -> None:
    done = process("-m", *tiny(tiny_folder, tmp_path, "method=rtn", "seed=0,1,2", "eval=none"), script=GIVEN_UP)
    assert done.code == 1 and "the cluster is gone" in done.err
    assert "completed" in done.out and "lost  2 jobs ended without a word" in done.err


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_jobs(tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny(tiny_folder, tmp_path, "method=rtn,gptq", "seed=0,1,2", "eval=none")
    both = [
        subprocess.Popen([sys.executable, "-m", "qexp", "-m", *words], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [one.communicate(timeout=300)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], errors
    assert {line["status"] for line in index(tmp_path)} == {"completed"} and len(index(tmp_path)) == 6
    walks = sum(error.count("quantize blocks") for error in errors)
    assert walks == 6, "a job was computed twice"


@pytest.mark.slow
def test_a_sweep_killed_at_any_time_ends_whole(tiny_folder: Path, tmp_path: Path) -> None:
    rng, seen = random.Random(0), dict[str, int]()
    words = tiny(tiny_folder, tmp_path, "method=rtn,gptq", "seed=range(8)", "eval=none")
    for kill in range(5):
        sweep = subprocess.Popen(
            [sys.executable, "-m", "qexp", "-m", *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while len(completed(tmp_path)) < 3 * kill + 1 and sweep.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.5))
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
        now = completed(tmp_path)
        assert {run: now[run] for run in seen} == seen, "a completed run was computed again"
        seen = now
    assert command("-m", *words).code == 0
    now = completed(tmp_path)
    assert {run: now[run] for run in seen} == seen and len(now) == 16
    assert len(index(tmp_path)) == 16 and {line["status"] for line in index(tmp_path)} == {"completed"}


@pytest.mark.slow
def test_a_run_killed_before_the_tracker_had_it_is_shown_by_the_next_command(tiny_folder: Path, tmp_path: Path) -> None:
    words = [*tiny(tiny_folder, tmp_path, "method=rtn", "eval=none"), "tracking=offline"]
    kill = """
import os, signal
import qexp.run
qexp.run.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from qexp.cli import main
main()
"""
    assert process(*words, script=kill).code == -signal.SIGKILL
    assert len(completed(tmp_path)) == 1 and not list(tmp_path.glob("wandb/offline-run-*"))
    for _ in range(2):
        assert command(*words).code == 0
        assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
