"""A real search with two workers, one of them killed, continued; and W&B's files of a sweep, read back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from test_tracking import parsed, read_back
from tiny_runs import command, process, tiny

from qexp.core.gaps import gaps
from qexp.search_desk import counted
from qexp.search_plan import storage_of

SPACE = """
method: [rtn, gptq]
bits.weight: {low: 2, high: 4}
bits.group: [16, 32]
method.solver.damp_fraction: {low: 1.0e-3, high: 0.1, log: true, when: {method: gptq}}
"""
TRIALS = 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def words(tiny_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "mine.yaml").write_text(SPACE)
    fixed = [word for word in tiny(tiny_folder, tmp_path / "out") if word != "tracking=none"]
    return [f"space={tmp_path}/mine.yaml", *fixed, "tracking=offline", "--trials", str(TRIALS), "--jobs", "2"]


def children(pid: int) -> list[int]:
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in told if "search_worker" in Path(f"/proc/{one}/cmdline").read_text()]


def trials(out: Path) -> list[Any]:
    import optuna

    study = optuna.load_study(study_name="mine", storage=storage_of(str(out / ".search" / "mine" / "study.journal")))
    return study.get_trials()


def wait_for(what: Any, seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_a_search_survives_kill_9_of_a_worker_and_of_itself(words: list[str], tmp_path: Path) -> None:
    out, start = tmp_path / "out", [sys.executable, "-c", "from qexp.search import main; main()", *words]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(start, stdout=log, stderr=log)
    wait_for(lambda: list(out.glob("*/fingerprint.json")) or running.poll() is not None)
    victim = children(running.pid)[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: "another one takes over" in (tmp_path / "log").read_text())
    wait_for(lambda: any(t.state == TrialState.COMPLETE for t in trials(out)))
    workers = children(running.pid)
    assert len(workers) == 2, "the killed worker was replaced"
    for pid in (running.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    running.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/record.json")}
    assert 0 < len(finished) < TRIALS and not (out / "front.json").exists()

    again = process(*words, script="from qexp.search import main; main()")
    assert again.code == 0, again.err
    every = counted(trials(out))
    assert [t.state for t in every] == [TrialState.COMPLETE] * TRIALS, "nothing lost, nothing too much"
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "nothing was computed twice"
    records = {path.parent: json.loads(path.read_text()) for path in out.glob("*/record.json")}
    assert {t.user_attrs["folder"] for t in every} == set(map(str, records)) and len(records) == TRIALS
    for trial in every:
        metrics = records[Path(trial.user_attrs["folder"])]["metrics"]
        assert trial.values == [metrics["divergence/kl/generated"], metrics["size/bits_per_weight"]]

    front = json.loads((out / "front.json").read_text())["front"]
    assert "Pareto front" in again.out and all(point["command"] in again.out for point in front)
    repeated = command(*front[0]["overrides"])
    assert repeated.code == 0 and "nothing to do" in repeated.err, "the line to paste is the same run"
    check_wandb(out, records, len(front))


def check_wandb(out: Path, records: dict[Path, dict[str, Any]], front: int) -> None:
    """Trials are in the group of the study, and the front is a table beside them.

    A kill between the end of a record and the end of its publication leaves half a W&B run, or none: three were killed.
    """
    logs = [parsed(file.parent) for file in sorted((out / "wandb").glob("offline-run-*/*.wandb"))]
    runs = [run for run in logs if "exit_code" in run]
    assert {run["run"].run_group for run in runs} == {"mine"}
    by_print = {record["fingerprint"]: record for record in records.values()}
    shown = [run["config"] for run in runs if run["run"].job_type == "ptq"]
    assert len({config["fingerprint"] for config in shown}) == len(shown) >= TRIALS - 3
    for config in shown:
        record = by_print[config["fingerprint"]]
        assert config["bits"] == record["config"]["bits"]["name"], "not the group's choice, which is w4a16"
        assert config["method"] == record["config"]["method"]["name"]
    (table,) = (out / "wandb").glob("offline-run-*/files/media/table/front*.json")
    assert len(json.loads(table.read_text())["data"]) == front


@pytest.mark.slow
def test_what_w_and_b_reads_back_of_a_sweep_is_the_records(tiny_folder: Path, tmp_path: Path) -> None:
    """W&B's own reader for summary and config; its log for history; its folder for tables and images."""
    words = tiny(tiny_folder, tmp_path / "out", "method=rtn,gptq", "bits=w3a16g32", "tracking=offline")
    done = command("-m", *words, f"hydra.sweep.dir={tmp_path}/out/.sweeps/pair")
    assert done.code == 0, done.err
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*/record.json"))]
    folders = sorted((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(records) == len(folders) == 2
    seen = []
    for folder in folders:
        log = read_back(folder)
        command_line = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--summary", "--json", folder]
        told = json.loads(subprocess.run(command_line, capture_output=True, text=True, check=True).stdout)
        (record,) = [one for one in records if one["fingerprint"] == told["config"]["fingerprint"]]
        expected = record["metrics"] | {f"cost/{key}": value for key, value in record["cost"].items()}
        expected |= gaps(record["metrics"]) | {"status": "completed"}
        assert {key: told["summary"][key] for key in expected} == expected
        assert log["config"]["cfg"] == record["config"]  # leet leaves out what is empty
        assert told["config"]["cfg"]["bits"] == record["config"]["bits"]
        curve = [row for row in log["history"] if "block/index" in row]
        assert [row["block/seconds"] for row in curve] == [block["seconds"] for block in record["blocks"]]
        assert len(curve) == 3 and all(row["block/error"] > 0 for row in curve)
        media = folder / "files" / "media"
        table = json.loads(next((media / "table").glob("layers*.json")).read_text())
        layers = [[b["index"], one["name"], one["error"]] for b in record["blocks"] for one in b["layers"]]
        assert [[row[0], row[1], row[3]] for row in table["data"]] == layers
        assert len(list((media / "images").rglob("*.png"))) >= 2
        seen.append({key: told["config"][key] for key in ("method", "bits", "model", "method/solver", "method/grid")})
        assert parsed(folder)["run"].run_group == "pair"
    by_method = {run["method"]: run for run in seen}
    assert by_method["rtn"]["method/solver"] == "rtn" and by_method["gptq"]["method/solver"] == "gptq"
    assert {run["bits"] for run in seen} == {"w3a16g32"}, "comparable by method, bits and stage"


@pytest.mark.slow
def test_an_agent_gets_its_run_even_if_the_record_was_there(tiny_folder: Path, tmp_path: Path) -> None:
    """The server waits for a run under the id that its agent set; without one it would count as crashed."""
    words = tiny(tiny_folder, tmp_path / "out", "method=rtn", "bits=w3a16g32", "tracking=offline")
    assert command(*words).code == 0
    assert command(*words).code == 0
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*"))) == 1, "repeated by hand: nothing new"
    (tmp_path / "config.yaml").write_text("wandb_version: 1\nmethod: {value: rtn}\nbits.group: {value: 32}\n")
    variables = {"SWEEP_ID": "s1", "RUN_ID": "asked4", "SWEEP_PARAM_PATH": str(tmp_path / "config.yaml")}
    asked = process(*words, **{f"WANDB_{name}": value for name, value in variables.items()})
    assert asked.code == 0 and "nothing to do" in asked.err
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*-asked4")
    back, (record,) = read_back(folder), [json.loads(p.read_text()) for p in (tmp_path / "out").glob("*/record.json")]
    assert {key: back["summary"][key] for key in record["metrics"]} == record["metrics"]
    assert back["config"]["method"] == "rtn" and back["config"]["cfg"] == record["config"]
