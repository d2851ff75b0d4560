"""A package that is not qexp adds a member and a recipe: they are found, run, swapped and checked like our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_runs import command, process, record_below, tiny

from qexp import compose, methods

EXAMPLE = Path(__file__).resolve().parents[1] / "plugin_example"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip leaves of the example on the path: the package, and its metadata with the entry points."""
    site = tmp_path / "site"
    shutil.copytree(EXAMPLE / "qexp_toward_zero", site / "qexp_toward_zero")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    about = site / "qexp_toward_zero-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]" + "".join(f"\n{k} = {v}" for k, v in names.items())
        for group, names in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("QEXP_CACHE", str(tmp_path / "cache"))
    yield site
    for name in [name for name in sys.modules if name.startswith("qexp_toward_zero")]:
        del sys.modules[name]


def test_without_the_package_its_names_are_unknown(tiny_folder: Path, tmp_path: Path) -> None:
    outcome = command(*tiny(tiny_folder, tmp_path / "out", "method=toward_zero"))
    assert outcome.code == 2 and "method=toward_zero is unknown" in outcome.err


def test_its_recipe_runs(installed: Path, tiny_folder: Path, tmp_path: Path) -> None:
    outcome = command(*tiny(tiny_folder, tmp_path / "ours", "method=rtn", "bits=w3a16"))
    assert outcome.code == 0, outcome.err
    outcome = command(*tiny(tiny_folder, tmp_path / "theirs", "method=toward_zero", "bits=w3a16"))
    assert outcome.code == 0, outcome.err
    ours, theirs = record_below(tmp_path / "ours"), record_below(tmp_path / "theirs")
    assert theirs["name"].startswith("toward_zero-w3a16")
    assert theirs["config"]["method"]["solver"] == {"_target_": "qexp_toward_zero.solver.TowardZero", "share": 1.0}
    for block, rounded in zip(theirs["blocks"], ours["blocks"], strict=True):
        for layer, nearest in zip(block["layers"], rounded["layers"], strict=True):
            assert layer["sqnr_db"] < nearest["sqnr_db"], "a grid point farther away"


def test_its_member_swaps_into_our_recipe_and_ours_into_its(installed: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """With share 0 it is rounding to nearest, so both ways round give the metrics of rtn."""
    recipes = {
        "rtn": ["method=rtn"],
        "theirs in ours": ["method=rtn", "method/solver=toward_zero", "method.solver.share=0"],
        "ours in theirs": ["method=toward_zero", "method/solver=rtn"],
    }
    metrics = []
    for name, words in recipes.items():
        assert command(*tiny(tiny_folder, tmp_path / name, *words)).code == 0
        metrics.append(record_below(tmp_path / name)["metrics"])
    assert metrics[0] == metrics[1] == metrics[2]


def test_its_settings_are_checked_like_ours(installed: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for wrong, said in [
        ("method.solver.shar=1", "did you mean method.solver.share"),
        ("method.solver.share=much", "method.solver.share='much'"),
        ("method.solver.share=2", "a number from 0 to 1"),
    ]:
        outcome = command(*tiny(tiny_folder, tmp_path / "out", "method=toward_zero", wrong))
        assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.slow
def test_it_is_listed_and_composes_with_everything(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with compose.hydra():
        assert "toward_zero" in compose.options("method") and "toward_zero" in compose.options("method/solver")
        theirs = [one for one in methods.swaps() if any(word.endswith("=toward_zero") for word in one)]
        assert len(theirs) >= 25 + 6, "their recipe with every member, and their member in each of ours"
        assert {" ".join(one): wrong for one in theirs if (wrong := methods.mistake(one))} == {}
    with pytest.raises(SystemExit):
        methods.main(["toward_zero"])
    shown = capsys.readouterr().out
    assert "method=toward_zero" in shown and "method/solver=toward_zero" in shown and "IEEE 754" in shown


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("setuptools") and find_spec("pip")), reason="no pip with setuptools in this environment"
)
def test_pip_installs_it(tmp_path: Path, tiny_folder: Path) -> None:
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))  # the build writes beside its sources
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(source)], check=True, timeout=300)
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    words = tiny(tiny_folder, tmp_path / "out", "method=toward_zero")
    outcome = process(*words, PYTHONPATH=path, QEXP_CACHE=str(tmp_path / "cache"))
    assert outcome.code == 0, outcome.err
    assert record_below(tmp_path / "out")["status"] == "completed"
