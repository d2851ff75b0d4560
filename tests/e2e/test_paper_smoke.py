"""`make paper-smoke`: what it shortens, what it runs, and that it says what failed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from qexp import compose, paper_smoke
from qexp.core.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with compose.hydra():
        yield


def ends(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        yield from ends(value, f"{path}.{name}") if isinstance(value, dict) else [(f"{path}.{name}", value)]


@pytest.mark.slow
def test_every_key_of_the_settings_shortens_something() -> None:
    known = {
        path for name in compose.options("method") for path, _ in ends(compose.composed([f"method={name}"])["method"])
    }
    assert [key for key in paper_smoke.settings()["keys"] if not any(path.endswith(f".{key}") for path in known)] == []
    compose.composed(paper_smoke.settings()["overrides"])


@pytest.mark.slow
def test_jobs_that_differ_in_the_model_alone_run_once() -> None:
    found = list(paper_smoke.distinct("+sweeps/papers=spinquant"))
    assert [job[1:] for job, _ in found] == [
        ["model=llama2_7b", f"bits={bits}"] for bits in ("w4a4kv4", "w4a4", "w4a16")
    ]
    for _, config in found:
        assert config["model"]["name"] == "embedded" and config["calibration"]["source"] == "generated"
        assert config["method"]["transform"]["learned_rotation"]["steps"] == 2
        assert config["eval"]["limit"] == 2


def test_what_was_asked_for_is_what_runs() -> None:
    assert paper_smoke.chosen(["ablations/clip", "papers/pvq"]) == ["+sweeps/ablations=clip", "+sweeps/papers=pvq"]
    every = paper_smoke.chosen([])
    assert set(every) == {one for one in compose.sweeps() if "/" in one} and len(every) > 35
    with pytest.raises(UserError, match="did you mean papers/quarot"):
        paper_smoke.chosen(["papers/quarott"])


@pytest.mark.slow
def test_a_failed_job_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(config: dict[str, Any]) -> str | None:
        ran.append(config["bits"]["name"])
        return "ValueError: no" if config["bits"]["name"] == "w4a4" else None

    monkeypatch.setattr(paper_smoke, "failure", run)
    with pytest.raises(SystemExit) as ended:
        paper_smoke.main(["papers/spinquant", "papers/awq_opt"])
    assert ended.value.code == 1 and ran == ["w4a4kv4", "w4a4", "w4a16", "w3a16g128"]
    out = capsys.readouterr().out
    assert re.search(r"^ *\+sweeps/papers=spinquant +3 +\d+ +1 failed", out, flags=re.MULTILINE)
    assert re.search(r"^ *\+sweeps/papers=awq_opt +1 +\d+ +ok", out, flags=re.MULTILINE)
    assert "failed  +sweeps/papers=spinquant model=llama2_7b bits=w4a4: ValueError: no" in out
    assert "2 sweeps, 4 jobs, " in out


def test_a_config_that_does_not_build_is_a_failure_in_one_line() -> None:
    (_, config), *_ = paper_smoke.distinct("+sweeps/papers=awq_opt")
    config["method"]["grid"]["bitz"] = 3
    assert "bitz is no setting of" in (paper_smoke.failure(config) or "")


@pytest.mark.slow
def test_two_sweeps_run_to_their_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        paper_smoke.main(["papers/awq_opt", "papers/affinequant"])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert "2 sweeps, 2 jobs, " in out and out.count(" ok") == 2
