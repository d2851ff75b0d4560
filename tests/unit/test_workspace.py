"""The workspace is what it was, shows keys that runs write, and says in one line why it cannot be published."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_tracking import CHOICES, OFFLINE, RECORD, no_figures, read_back

from qexp import dashboard
from qexp.tracking import workspace
from qexp.tracking.workspace import View

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "workspace.json"
VIEW = View(entity="team", project="qexp", sets=("generated",), sweeps=("demo",))
ACCESS = re.compile(r"(?:summary|config):([^\"]+)")


def without_ids(node: Any) -> Any:
    """Panels get random ids."""
    if isinstance(node, dict):
        return {key: without_ids(value) for key, value in node.items() if key != "__id__"}
    return [without_ids(item) for item in node] if isinstance(node, list) else node


def panels(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for section in made["spec"]["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def test_the_workspace_is_the_one_that_was_looked_at() -> None:
    """After a change that is meant: python tests/unit/test_workspace.py writes the file anew."""
    assert without_ids(workspace.as_json(workspace.build(VIEW))) == json.loads(GOLDEN.read_text())


def test_each_set_has_its_panels_and_each_sweep_passes_the_filter() -> None:
    made = workspace.as_json(
        workspace.build(View(entity="e", project="p", sets=("generated", "c4"), sweeps=("a", "b")))
    )
    kinds = [panel["viewType"] for panel in panels(made)]
    assert kinds.count("Bar Chart") == 2 and kinds.count("Scatter Plot") == 4
    assert kinds.count("Parallel Coordinates Plot") == 1 and kinds.count("Run History Line Plot") == 4
    (runs,) = made["spec"]["section"]["runSets"]
    assert runs["filters"]["filters"][0]["value"] == ["a", "b"]
    assert [group["name"] for group in runs["grouping"]] == ["method.value", "bits.value"]
    everything = workspace.as_json(workspace.build(View(entity="e", project="p")))["spec"]["section"]["runSets"][0]
    assert not everything["filters"].get("filters")


def test_it_shows_keys_that_a_run_has(tmp_path: Path) -> None:
    config = {**RECORD["config"], "bits": {"name": "w4a4kv4", "weight": 4, "group": 64}}
    metrics = RECORD["metrics"] | {"divergence/kl/generated": 0.1, "fp/perplexity/generated": 12.0}
    run = {**RECORD, "config": config, "metrics": metrics | {"size/bits_per_weight": 4.25}}
    choices = CHOICES | {"method/grid": "integer", "method/act": "per_token"}
    where = OFFLINE.publish(run, choices, "demo", tmp_path, no_figures)
    assert where is not None
    back = read_back(Path(where))
    made = workspace.as_json(workspace.build(VIEW))
    shown = {key.replace(".value", "") for key in ACCESS.findall(json.dumps(panels(made)))}
    shown |= {metric for panel in panels(made) for metric in panel["config"].get("metrics", [])}
    assert len(shown) > 12
    history = {key for row in back["history"] for key in row}
    nested = {f"cfg.bits.{key}" for key in back["config"]["cfg"]["bits"]}
    assert shown <= {*back["summary"], *back["config"], *history, *nested}
    assert back["run"].run_group == "demo"


def test_the_command_writes_it_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.main(["--entity", "team", "--sweep", "demo", "--json", str(tmp_path / "view.json")])
    assert capsys.readouterr().out == f"wrote {tmp_path}/view.json\n"
    assert without_ids(json.loads((tmp_path / "view.json").read_text())) == json.loads(GOLDEN.read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        dashboard.main(["--entity", "team", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("qexp-dashboard: ") and error.count("\n") == 1
    return error


def test_what_stands_in_the_way_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("wandb.login", lambda **_: False)
    assert "nobody is logged in" in refused(capsys)
    assert "cannot write" in refused(capsys, "--json", str(tmp_path))

    def no_answer(_: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", no_answer)
    assert "ConnectionError: no route" in refused(capsys)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert 'pip install "qexp[dashboards]"' in refused(capsys)


def test_publishing_saves_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved: list[Any] = []
    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", lambda made: saved.append(made))
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.url", property(lambda made: "https://somewhere"))
    dashboard.main(["--entity", "team", "--project", "llm"])
    assert capsys.readouterr().out == "https://somewhere\n"
    assert (saved[0].entity, saved[0].project) == ("team", "llm")


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(without_ids(workspace.as_json(workspace.build(VIEW))), indent=1) + "\n")
