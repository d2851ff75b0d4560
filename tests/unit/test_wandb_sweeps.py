"""What `wandb agent` makes of sweeps/wandb/*.yaml, by its own code, composes and builds; Hydra does not see the files.

The server's part, choosing values, is done here: every option, and both ends of every range.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qexp import compose as qexp_compose
from qexp.core.build import build
from qexp.core.errors import UserError
from qexp.explain import check_keys
from qexp.launch import Setup
from qexp.search_plan import metrics_of

FILES = sorted((Path(__file__).resolve().parents[2] / "sweeps" / "wandb").glob("*.yaml"))
TEXT = """
program: qexp
method: grid
parameters:
  method: {values: [gptq]}
  method.solver.act_order: {values: [true, false]}
  method.solver.damp_fraction: {value: 0.00001}
  model.path: {value: "null"}
command: [qexp, tracking=offline, "${args_no_hyphens}"]
"""


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with qexp_compose.hydra():
        yield


@pytest.fixture(autouse=True)
def _agent_sets_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")


def values(parameter: dict[str, Any]) -> list[Any]:
    """What the server may choose: all options, or the ends of a range."""
    if "value" in parameter or "values" in parameter:
        return parameter.get("values") or [parameter["value"]]
    return [parameter["min"], parameter["max"]]


def commands(sweep: dict[str, Any]) -> list[list[str]]:
    """The command lines that W&B's agent would start for every choice of the server."""
    from wandb import wandb_agent

    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

    parameters = sweep["parameters"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_agent, "AgentProcess", Process)
        for i, chosen in enumerate(itertools.product(*map(values, parameters.values()))):
            agent = object.__new__(wandb_agent.Agent)  # its __init__ asks the server
            agent._sweep_command, agent._in_jupyter, agent._function = sweep["command"], False, None
            agent._run_processes, agent._forward_signals = {}, False
            arguments = {key: {"value": value} for key, value in zip(parameters, chosen, strict=True)}
            agent._command_run({"args": arguments, "run_id": f"run{i}", "program": sweep["program"]})
    return started


def test_there_are_sweeps_to_check() -> None:
    assert len(FILES) >= 3
    assert {yaml.safe_load(file.read_text())["method"] for file in FILES} == {"grid", "random", "bayes"}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_agent_starts_runs_that_compose_and_measure_the_metric(file: Path) -> None:
    from wandb.sdk.launch.sweeps.utils import load_sweep_config

    sweep = load_sweep_config(str(file))
    assert sweep is not None and sweep["program"] == "qexp"
    keys = sweep["parameters"].values()
    assert not any("parameters" in parameter for parameter in keys), "nested keys reach the command as one dict"
    started = commands(sweep)
    assert len(started) > 4
    configs = []
    for name, *words in started:
        assert name == "qexp"
        config = qexp_compose.composed(words)
        Setup(**{key: build(config[key], key) for key in Setup.__annotations__})
        assert sweep["metric"]["name"] in metrics_of(config)
        assert config["output_dir"].startswith("outputs/wandb_")
        configs.append(repr(config))
    assert len(set(configs)) == len(configs), "two of them are the same run"
    assert "wandb sweep --project qexp sweeps/wandb/" + file.name in file.read_text()


def test_values_arrive_as_hydra_writes_them() -> None:
    words = [words[1:] for words in commands(yaml.safe_load(TEXT))]
    assert words[1] == [
        "tracking=offline", "method=gptq", "method.solver.act_order=False", "method.solver.damp_fraction=1e-05",
        "model.path=null",
    ]  # fmt: skip
    config = qexp_compose.composed(words[1])
    assert (config["model"]["path"], config["method"]["solver"]["act_order"]) == (None, False)
    assert config["method"]["solver"]["damp_fraction"] == 1e-5
    bare = TEXT.replace('"null"', "null")
    assert qexp_compose.composed(commands(yaml.safe_load(bare))[0][1:])["model"]["path"] == "None", "hence the quotes"


@pytest.mark.parametrize("folder", ["search", "wandb"])
def test_hydra_does_not_take_them_for_configs(folder: str) -> None:
    (file, *_) = sorted((FILES[0].parents[1] / folder).glob("*.yaml"))
    assert f"sweeps/{folder}" not in qexp_compose.groups("sweeps")
    config = qexp_compose.composed([f"+sweeps/{folder}={file.stem}"])  # to Hydra an ordinary new key
    with pytest.raises(UserError, match=f"sweeps/{folder} is no config key"):
        check_keys(config)


def test_an_agent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from qexp.tracking.wandb import driven_by_agent

    assert os.environ["WANDB_SWEEP_ID"] and driven_by_agent()
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert not driven_by_agent()
