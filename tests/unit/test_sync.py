"""`qexp-report DIR --sync` finds what waits, uploads that through W&B's own command, and never asks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qexp.report import cli


def run_folder(out: Path, name: str, *, synced: bool = False) -> Path:
    folder = out / "wandb" / f"offline-run-20261123_0143{name}"
    folder.mkdir(parents=True)
    (folder / f"run-{name}.wandb").write_bytes(b":W&B")
    if synced:
        (folder / f"run-{name}.wandb.synced").touch()
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two that wait, in two output folders; one that is uploaded, one online, and one empty besides."""
    waiting = [run_folder(tmp_path / "b", "01-first"), run_folder(tmp_path / "a", "02-second")]
    run_folder(tmp_path / "a", "00-old", synced=True)
    (tmp_path / "a" / "wandb" / "run-20261123_014309-online").mkdir()
    (tmp_path / "a" / "wandb" / "offline-run-empty").mkdir()
    return waiting


def test_a_dry_run_tells_which(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([str(tmp_path), "--sync", "--dry-run"])
    assert capsys.readouterr().out.splitlines() == [*map(str, runs), "2 W&B runs to upload"]


def test_w_and_b_agrees_on_what_waits(runs: list[Path], tmp_path: Path) -> None:
    """Its own dry run takes our list whole, and nothing of what we left out."""
    every = [str(path) for path in tmp_path.glob("*/wandb/offline-run-2*")]
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *every]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, cwd=tmp_path)
    told = done.stdout + done.stderr
    assert "Would sync 2 run(s)" in told and all(run.name in told for run in runs) and "00-old" not in told


def test_nothing_to_do_needs_no_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path, "old", synced=True)
    cli.main([str(tmp_path), "--sync"])
    assert capsys.readouterr().out == "0 W&B runs uploaded\n"


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path), "--sync"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("qexp-report: ") and error.count("\n") == 1
    return error


@pytest.mark.usefixtures("runs")
def test_a_missing_key_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wandb.login", lambda **_: False)
    assert "2 W&B runs wait, and nobody is logged in" in refused(tmp_path, capsys)


@pytest.mark.usefixtures("runs")
def test_a_server_that_does_not_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def no_answer(**asked: Any) -> bool:
        assert asked == {"prompt": False, "verify": True}
        raise wandb.errors.CommError("no answer\nafter 20 s")

    monkeypatch.setattr("wandb.login", no_answer)
    assert "2 W&B runs wait: no answer;" in refused(tmp_path, capsys)


def test_w_and_bs_own_command_uploads(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def arrive(command: list[str], **how: Any) -> Any:
        assert how["stdin"] == subprocess.DEVNULL, "it must not be able to ask"
        asked.append(command[3:])
        for folder in map(Path, command[4:]):
            (log,) = folder.glob("*.wandb")
            log.with_suffix(".wandb.synced").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setattr("qexp.report.sync.subprocess.run", arrive)
    cli.main([str(tmp_path), "--sync"])
    cli.main([str(tmp_path), "--sync"])
    assert asked == [["sync", *map(str, runs)]], "and nothing twice"
    assert capsys.readouterr().out.splitlines() == ["2 W&B runs uploaded", "0 W&B runs uploaded"]


@pytest.mark.usefixtures("runs")
def test_runs_that_did_not_arrive_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setattr("qexp.report.sync.subprocess.run", lambda *_, **__: SimpleNamespace(returncode=0))
    assert "2 of 2 W&B runs were not uploaded" in refused(tmp_path, capsys)
