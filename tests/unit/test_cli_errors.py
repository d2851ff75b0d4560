"""A user's mistake: exit code 2, exactly one line on stderr that helps, and nothing left behind."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_runs import Outcome, command, save_tiny, tiny

# The mistake, and what the line must say: what was got, what is needed or what to type instead.
IN_THE_KEYS = [
    ("method=gtpq", ["method=gtpq", "did you mean gptq", "smoothquant"]),
    ("method/solver=gptk", ["method/solver=gptk", "did you mean gptq", "rtn"]),
    ("method/transform=[fold_norm,hadamart]", ["method/transform=hadamart", "did you mean hadamard"]),
    ("method/solver=", ["method/solver=", "gptq"]),
    ("method/slover=rtn", ["method/slover", "did you mean method/solver"]),
    ("model=lama2_7b", ["model=lama2_7b", "did you mean llama2_7b"]),
    ("+sweeps=nothing", ["sweeps=nothing", "demo"]),
    ("bits=w5", ["bits=w5", "w{2,3,4,6,8}", "bits.weight=5"]),
    ("bits=w4a4kv5", ["bits=w4a4kv5", "e.g. bits=w4a4"]),
    ("method.grid.symetry=x", ["method.grid.symetry", "did you mean method.grid.symmetry"]),
    ("bits.wieght=3", ["bits.wieght", "did you mean bits.weight"]),
    ("grid.symmetry=x", ["grid.symmetry", "did you mean method.grid.symmetry"]),
    ("methd=gptq", ["methd", "did you mean method"]),
    ("model.outliers.chanels=2", ["model.outliers.chanels", "did you mean model.outliers.channels"]),
    ("method.transform.awq.steps=3", ["method.transform.awq.steps", "method/transform=["]),
    ("~nothing", ["nothing", "no config key"]),
    ("bits.weight=abc", ["bits.weight=abc", "a whole number"]),
    ("bits.weight=4.5", ["bits.weight=4.5", "a whole number"]),
    ("seed=x", ["seed=x", "a whole number"]),
    ("seed=null", ["seed=null", "a whole number"]),
    ("resume=perhaps", ["resume=perhaps", "true or false"]),
    ("method=null", ["method=null", "method=gptq"]),
    ("bits=4", ["bits=4", "bits=w4a16"]),
    ("method=[gptq", ["method=[gptq", "key=[a,b]"]),
    ("method gptq", ["method gptq", "key=value"]),
    ("seed", ["seed", "key=value"]),
    ("+x=1", ["x is no config key"]),
    ("+mehtod=gptq", ["mehtod", "did you mean method"]),
    ("~method", ["method"]),
    ("method.grid.bits=${nothing}", ["nothing", "not found"]),
]
IN_THE_VALUES = [
    ("method.grid.group=abc", ["method.grid.group='abc'", "integer"]),
    ("method.grid=5", ["method.grid=5", "Grid"]),
    ("+method.grid.symetry=x", ["method.grid.symetry", "did you mean symmetry"]),
    ("method.grid._target_=qexp.nothing.Nothing", ["qexp.nothing.Nothing", "importable"]),
    (
        "method=spinquant method.transform.learned_rotation.load=/no/such",
        ["/no/such", "does not exist", "set method.transform.learned_rotation.load=''"],
    ),
    (
        "method=flatquant method.transform.kronecker.training.steps=-3",
        ["steps=-3", "set method.transform.kronecker.training.steps="],
    ),
    (
        "method=flatquant method/tuner=[clip]",
        ["kronecker and clip all learning the ranges", "set method/tuner=[]"],
    ),
    ("method=omniquant method/grid=midrise_whole", ["clip learning ranges", "set method.grid.group=-1"]),
    ("method=flatquant method/transform=[kronecker,duquant]", ["duquant behind kronecker", "clip_rate=0"]),
    ("method=signround method.solver.training.steps=0", ["rate=0", "set method.solver.training.steps=200"]),
    ("method=omniquant calibration=none", ["calibration=none", "tuner.clip", "calibration=generated"]),
    (
        "method=lrq method.solver.training.batch=0",
        ["method.solver.training.batch=0", "set method.solver.training.batch=1"],
    ),
    (
        "method=lrq method.solver.training.los=mse",
        ["method.solver.training.los", "did you mean method.solver.training.loss"],
    ),
    ("method=lrq method.solver.training.loss=mes", ["method.solver.training.loss='mes'", "did you mean mse"]),
    (
        "method=omniquant method.tuner.clip.training.load=/no/such",
        ["/no/such", "set method.tuner.clip.training.load=''"],
    ),
    ("method=lrq streams=dsik", ["streams='dsik'", "did you mean disk"]),
    ("method=duquant method.transform.duquant.block=0", ["block=0", "set method.transform.duquant.block="]),
    ("method.inputs=flaot", ["method.inputs", "did you mean float"]),
    ("device=gpu", ["device='gpu'", "cpu"]),
    ("calibration.samples=0", ["calibration.samples=0", "at least 1"]),
    ("calibration=local calibration.path=/no/such.txt", ["/no/such.txt", "does not exist", "calibration.path="]),
    ("eval.perplexity=[wikitext3]", ["wikitext3", "did you mean wikitext2"]),
    ("eval.perplexity=wikitext2", ["eval.perplexity=wikitext2", "[wikitext2]"]),
    ("eval.perplexity=[local] eval.local.path=/no/such.txt", ["/no/such.txt", "eval.local.path="]),
    ("eval.task_path=/no/such", ["/no/such", "eval.task_path="]),
    ("method=gptq calibration=none", ["calibration=none", "Gptq", "calibration=generated"]),
    ("method=awq calibration=none", ["Awq", "calibration=generated"]),
    ("method/transform=[awq,fold_norm]", ["awq,fold_norm", "[fold_norm,awq]"]),
    ("model=hf", ["model.path is not set", "model.path="]),
    ("model=hf model.path=/no/such/model", ["/no/such/model", "existing folder"]),
    ("model=gguf model.path=/no/such.gguf", ["/no/such.gguf", ".gguf"]),
    ("model.outliers.kind=scal", ["model.outliers.kind", "did you mean scale"]),
]


PROGRESS = re.compile(
    r"\d\d:\d\d:\d\d I (rtn|gptq)-w4a16-tiny-llama -> "
)  # the model is loaded before its text is read


def the_line(outcome: Outcome, out: Path) -> str:
    """Return the one line of a user's mistake, after checking that it is one and that nothing was left."""
    assert outcome.code == 2, outcome.err
    (line,) = (text for text in outcome.err.splitlines() if not PROGRESS.match(text))
    assert line.startswith("qexp: ")
    assert "Traceback" not in line and len(line) < 700
    assert outcome.out == ""
    assert not out.exists() or {path.name for path in out.iterdir()} <= {".sweeps"}
    return line


@pytest.mark.parametrize(("mistake", "said"), IN_THE_KEYS + IN_THE_VALUES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_one_line(mistake: str, said: list[str], tmp_path: Path) -> None:
    words = [mistake] if mistake == "method gptq" else mistake.split(" ")
    line = the_line(command(*words, f"output_dir={tmp_path}/out", "tracking=none"), tmp_path / "out")
    assert [part for part in said if part not in line] == [], line


def test_a_key_is_looked_for_in_the_recipe_that_was_chosen(tmp_path: Path) -> None:
    outcome = command("method=awq", "method.transform.awq.stepz=3", f"output_dir={tmp_path}/out")
    assert "did you mean method.transform.awq.steps?" in the_line(outcome, tmp_path / "out")


def test_a_mistake_in_a_sweep_is_told_before_the_first_job(tmp_path: Path) -> None:
    outcome = command("-m", "method=rtn,gtpq", f"output_dir={tmp_path}/out")
    assert "did you mean gptq" in the_line(outcome, tmp_path / "out")


def broken(folder: Path, tiny_folder: Path, how: str) -> Path:
    """Return a copy of the tiny model with its weights spoilt."""
    shutil.copytree(tiny_folder, folder)
    file = folder / "model.safetensors"
    if how == "nan":
        weights = load_file(file)
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "garbage":
        file.write_bytes(b"no safetensors at all" * 100)
    elif how == "missing":
        file.unlink()
    else:
        (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nan", ["model.norm.weight", "not finite"]),
        ("cut", ["corrupt"]),
        ("garbage", ["corrupt"]),
        ("missing", ["cannot be loaded"]),
        ("config", ["cannot be loaded"]),
    ],
)
def test_a_spoilt_model_is_one_line(how: str, said: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    folder = broken(tmp_path / "spoilt", tiny_folder, how)
    line = the_line(command(*tiny(folder, tmp_path / "out")), tmp_path / "out")
    assert [part for part in [*said, "model.path="] if part not in line] == [], line


def test_a_group_must_divide(tiny_folder: Path, tmp_path: Path) -> None:
    line = the_line(command(*tiny(tiny_folder, tmp_path / "out", "bits=w4a16g64")), tmp_path / "out")
    assert "64" in line and "in_features=32" in line and "bits.group=32" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds no text"), ("w1 w2 w3", "tokens")],
    ids=["empty", "short"],
)
@pytest.mark.parametrize("reader", ["calibration", "eval"])
def test_too_little_text(reader: str, text: str, said: str, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(text)
    words = [f"eval.local.path={file}", "eval.perplexity=[local]", "calibration=none", "calibration.samples=8"]
    if reader == "calibration":
        words = ["calibration=local", f"calibration.path={file}"]
    line = the_line(command(*tiny(tiny_folder, tmp_path / "out"), *words), tmp_path / "out")
    assert said in line and f"{reader}." in line


def test_a_transform_on_an_unknown_architecture(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "neox", model_type="gpt_neox", hidden_dropout=0.0)
    outcome = command(*tiny(folder, tmp_path / "out", "method=quarot", "bits=w4a16"))
    line = the_line(outcome, tmp_path / "out")
    assert "gpt_neox" in line and "method/transform=[]" in line


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that nobody serves, at the discard port of this machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_a_hub_id_without_a_hub(no_hub: None, tmp_path: Path) -> None:
    words = ["model=hf", "model.path=some/model", f"output_dir={tmp_path}/out"]
    line = the_line(command(*words), tmp_path / "out")
    assert "some/model" in line and "model.path=<folder>" in line


def test_a_task_of_the_hub_without_a_hub(no_hub: None, tmp_path: Path) -> None:
    line = the_line(command("eval.tasks=[qexp_gramar]", f"output_dir={tmp_path}/out"), tmp_path / "out")
    assert "'qexp_gramar'" in line and "eval.tasks=[<of qexp_grammar>]" in line


def test_a_data_set_of_the_hub_without_a_hub(no_hub: None, tmp_path: Path) -> None:
    line = the_line(command("calibration=wikitext2", f"output_dir={tmp_path}/out"), tmp_path / "out")
    assert "wikitext2" in line and "calibration.path=<folder" in line


@pytest.mark.slow  # building lm-eval's index of tasks takes most of a minute on a busy core
def test_an_unknown_task_gets_the_nearest(tmp_path: Path) -> None:
    outcome = command("eval.tasks=[hellaswg]", f"output_dir={tmp_path}/out")
    assert "hellaswag" in the_line(outcome, tmp_path / "out")


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = command(f"output_dir={tmp_path}/file/out")
    assert outcome.code == 2 and "is a file" in outcome.err and outcome.err.count("\n") == 1


def test_mistakes_need_no_transformers() -> None:
    """The slowest import, four seconds of it, must not stand between a mistake and its line."""
    code = "import sys, qexp.run; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
