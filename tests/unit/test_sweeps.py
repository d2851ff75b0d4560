"""Every saved sweep composes, each of its jobs builds, and the command runs it by name."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser

from qexp import compose as qexp_compose
from qexp.core.build import build
from qexp.launch import Setup

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
JOBS = {
    "acceptance_a": 24,
    "acceptance_c": 42,
    "acceptance_d": 66,
    "acceptance_e": 63,
    "baseline_comparison": 24,
    "calibration_size": 14,
    "demo": 8,
    "rotation_parts": 6,
    "rotations": 15,
    "seeds": 15,
    "solver_vs_transform": 8,
    "two_bits": 9,
}


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with qexp_compose.hydra():
        yield


def jobs(name: str) -> list[list[str]]:
    """The overrides of each job, as Hydra's sweeper makes them from the parameters of a saved sweep."""
    params = compose("config", [f"+sweeps={name}"], return_hydra_config=True).hydra.sweeper.params
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    choices = [[f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] for o in parsed]
    return [[f"+sweeps={name}", *job] for job in itertools.product(*choices)]


def test_the_saved_sweeps_are_those_we_know() -> None:
    assert sorted(JOBS) == NAMES
    assert qexp_compose.options("sweeps") == NAMES
    assert qexp_compose.groups("sweeps") == ["sweeps/case", "sweeps/stress"]


@pytest.mark.parametrize("name", NAMES)
def test_every_job_composes_and_builds(name: str) -> None:
    every = [qexp_compose.composed(job) for job in jobs(name)]
    assert len(every) == JOBS[name]
    for config in every:
        setup = Setup(**{key: build(config[key], key) for key in Setup.__annotations__})
        assert setup.output_dir == f"outputs/{name}"
    assert len({repr(config) for config in every}) == len(every), "two jobs are the same run"


@pytest.mark.parametrize("name", NAMES)
def test_the_header_asks_and_answers(name: str) -> None:
    lines = (SWEEPS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert header[0] == "# @package _global_"
    for word in ("Question", "Expect", "Feeds"):
        assert sum(line.startswith(f"# {word}: ") for line in header) == 1, word
    assert f"# Jobs:     {JOBS[name]}." in header
    assert f"`{name}`" in (SWEEPS / "README.md").read_text(encoding="utf-8")


def test_what_a_sweep_fixes_and_what_it_varies() -> None:
    config: dict[str, Any] = qexp_compose.composed(["+sweeps=acceptance_a", "+sweeps/stress=scale_w8a8", "method=awq"])
    assert config["model"]["outliers"] == {"kind": "scale", "channels": 4, "scale": 30, "seed": 0}
    assert config["bits"]["name"] == "w8a8"
    assert "sweeps" not in config
    parts = [qexp_compose.composed(job)["method"]["transform"]["hadamard"] for job in jobs("rotation_parts")]
    off = [{key for key in ("residual", "heads", "across_heads", "keys", "down") if not part[key]} for part in parts]
    assert off == [set(), {"residual"}, {"heads"}, {"across_heads"}, {"keys"}, {"down"}]


def test_the_command_runs_a_sweep_by_name_and_tells_which_jobs_failed(tmp_path: Path) -> None:
    command = ["-m", "+sweeps=demo", "tracking=none", "device=abacus", f"output_dir={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-m", "qexp", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "QEXP_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 1, done.stderr
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed  ")]
    assert len(failed) == 8 and all("device='abacus' is unknown" in line for line in failed)
    assert "method=quarot" in failed[-1] and "bits=w4a4kv4" in failed[-1]
    assert "job 8 of 8" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "a log file was left behind"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["+sweeps=demo"], "qexp: +sweeps=demo is a sweep; need qexp -m"),
        (["-m", "+sweeps=demoo"], "qexp: sweeps=demoo is unknown; did you mean demo?"),
        (["-m", "+sweeps=demo", "--cfg", "job"], "qexp: Only one of --run, --multirun, --cfg"),
    ],
)
def test_a_sweep_asked_for_wrongly_is_one_line(command: list[str], told: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qexp", *command], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith(told) and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
