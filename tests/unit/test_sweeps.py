"""Every saved sweep composes, each of its jobs builds, and the command runs it by name."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from omegaconf.errors import InterpolationResolutionError

from qexp import compose as qexp_compose
from qexp.core.build import build
from qexp.launch import Setup
from qexp.report import published
from qexp.sources import OF_OTHERS

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
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
    "ablations/calibration_size": 14,
    "ablations/calibration_source": 8,
    "ablations/clip": 8,
    "ablations/groups": 12,
    "ablations/kv_bits": 16,
    "ablations/rotation_parts": 6,
    "ablations/seeds": 15,
    "ablations/solver_vs_transform": 8,
}
# Jobs of a paper's table, and how many of their records will have a published number beside them.
PAPERS = {
    "affinequant": (3, 3),
    "affinequant_opt": (16, 16),
    "aqlm": (6, 6),
    "awq": (10, 10),
    "awq_opt": (3, 3),
    "crossquant": (12, 0),
    "duquant": (8, 8),
    "efficientqat": (16, 16),
    "flatquant": (10, 10),
    "flexround": (9, 0),
    "gptq": (16, 16),
    "gptq_opt": (10, 0),
    "gptqt": (10, 0),
    "lrq": (9, 0),
    "mixed_precision": (12, 0),
    "norm_tweaking": (18, 0),
    "omniquant": (28, 28),
    "omniquant_wa": (3, 3),
    "power_of_two": (16, 0),
    "pvq": (6, 0),
    "quarot": (5, 5),
    "quarot_128g": (5, 5),
    "quarot_rtn": (6, 6),
    "quik": (6, 6),
    "quik_opt": (3, 3),
    "quip": (6, 6),
    "quip_sharp": (9, 9),
    "signround": (16, 0),
    "smoothquant": (6, 6),
    "spinquant": (15, 15),
    "squeezellm": (12, 12),
}
JOBS |= {f"papers/{name}": jobs for name, (jobs, _) in PAPERS.items()}
NAMES = sorted(JOBS)


def slow_if_long(name: str) -> Any:
    """A job composes in a tenth of a second: long sweeps and the papers' tables would take minutes."""
    long = JOBS[name] > 20 or name.startswith("papers/")
    return pytest.param(name, marks=pytest.mark.slow if long else [])


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with qexp_compose.hydra():
        yield


def asked(name: str) -> str:
    """The override that asks for a saved sweep: +sweeps=demo, +sweeps/papers=quarot."""
    group, _, leaf = f"sweeps/{name}".rpartition("/")
    return f"+{group}={leaf}"


def jobs(name: str) -> list[list[str]]:
    return qexp_compose.jobs(asked(name))


@cache
def configs(name: str) -> list[dict[str, Any]]:
    """The config of every job of a sweep; read, never written."""
    return list(qexp_compose.composed_each(jobs(name)))


def test_the_saved_sweeps_are_those_we_know() -> None:
    files = {str(path.relative_to(SWEEPS).with_suffix("")) for path in SWEEPS.rglob("*.yaml") if path.name[0] != "_"}
    files = {name for name in files if name.partition("/")[0] not in OF_OTHERS}
    assert {name for name in files if not name.startswith(("case/", "stress/"))} == set(NAMES)
    assert sorted(qexp_compose.sweeps()) == sorted(map(asked, NAMES))
    assert qexp_compose.groups("sweeps") == ["sweeps/ablations", "sweeps/case", "sweeps/papers", "sweeps/stress"]


@pytest.mark.parametrize("name", [*map(slow_if_long, NAMES)])
def test_every_job_composes_and_builds(name: str) -> None:
    every = configs(name)
    assert len(every) == JOBS[name]
    for config in every:
        setup = Setup(**{key: build(config[key], key) for key in Setup.__annotations__})
        assert setup.output_dir == f"outputs/{name}"
    assert len({repr(config) for config in every}) == len(every), "two jobs are the same run"


@pytest.mark.slow
def test_jobs_composed_together_are_those_composed_one_by_one() -> None:
    for name in ("rotation_parts", "ablations/kv_bits", "papers/smoothquant"):
        assert configs(name) == [qexp_compose.composed(job) for job in jobs(name)]


@pytest.mark.parametrize("name", PAPERS)
def test_the_first_row_of_a_papers_table_meets_its_published_number(name: str) -> None:
    config = qexp_compose.composed(jobs(f"papers/{name}")[0])
    for key in Setup.__annotations__:
        build(config[key], key)
    found = published.match(config)
    assert bool(found) == (PAPERS[name][1] > 0), "a recipe, the sweep or published.yaml has drifted"
    assert all("windows only" not in entry["note"] for entry in found), "not the whole set"
    lines = (SWEEPS / f"papers/{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = " ".join(line.strip("# ") for line in lines if line.startswith("#"))
    assert bool(found) != ("nothing is published beside these" in header or "holds nothing against them" in header)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_every_row_of_a_papers_table_meets_its_published_number(name: str) -> None:
    found = [published.match(config) for config in configs(f"papers/{name}")]
    assert sum(map(bool, found)) == PAPERS[name][1], "a recipe, the sweep or published.yaml has drifted"


def test_a_setting_that_a_paper_has_for_some_models_only() -> None:
    by_model = {config["model"]["name"]: config for config in configs("papers/smoothquant")}
    alphas = {name: config["method"]["transform"]["smooth"]["alpha"] for name, config in by_model.items()}
    assert alphas["llama-2-7b"] == 0.85 and alphas["llama-2-70b"] == 0.9 and alphas["mistral-7b-v0.1"] == 0.8
    for bits, epochs in (("w2a16", 40), ("w3a16", 20)):
        config = qexp_compose.composed([asked("papers/omniquant"), f"bits={bits}"])
        assert config["method"]["tuner"]["clip"]["training"]["epochs"] == epochs
    with pytest.raises(InterpolationResolutionError, match="KeyError"):
        qexp_compose.composed([asked("papers/aqlm"), "bits=w4a16"])  # the paper has no such codebook


@pytest.mark.parametrize("name", NAMES)
def test_the_header_asks_and_answers(name: str) -> None:
    lines = (SWEEPS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
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
    parts = [job["method"]["transform"]["hadamard"] for job in configs("rotation_parts")]
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
        (["+sweeps/papers=quarot"], "qexp: +sweeps/papers=quarot is a sweep; need qexp -m"),
        (["+sweeps/ablations=seeds"], "qexp: +sweeps/ablations=seeds is a sweep; need qexp -m"),
        (["-m", "+sweeps/papers=quarott"], "qexp: sweeps/papers=quarott is unknown; did you mean quarot?"),
        (["-m", "+sweeps=quarot"], "qexp: sweeps=quarot is unknown; did you mean +sweeps/papers=quarot?"),
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


def test_two_sweeps_of_one_second_have_folders_of_their_own() -> None:
    with qexp_compose.hydra():
        one, other = (compose("config", return_hydra_config=True).hydra.sweep for _ in range(2))
        assert one.dir == one.dir != other.dir
