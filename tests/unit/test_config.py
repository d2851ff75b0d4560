"""The configs: every recipe with every member in the place of its own, names of bits, models; composed and built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_search_path import ConfigSearchPath
from hypothesis import given
from hypothesis import strategies as st

from qexp import compose, methods
from qexp.core.build import build
from qexp.explain import HYDRA_MISTAKES
from qexp.launch import Setup
from qexp.models.load import ModelSource
from qexp.schema import BITS_PATTERN, KINDS, LISTS, QexpConfig, bits_of
from qexp.sources import QexpSearchPath

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with compose.hydra():
        yield


def files(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONF / folder).glob("*.yaml") if not path.stem.startswith("_"))


def method(*overrides: str) -> dict[str, Any]:
    return compose.composed(overrides)["method"]


def test_every_file_is_a_choice() -> None:
    """Third-party packages may add to what Hydra sees, so: at least every file of ours."""
    for group in ["method", "model", "calibration", "eval", "tracking", *(f"method/{kind}" for kind in KINDS)]:
        assert set(files(group)) <= set(compose.options(group))
    assert len(files("method")) >= 6
    assert sum(len(files(f"method/{kind}")) for kind in KINDS) >= 21


@pytest.mark.slow
def test_every_recipe_and_every_member_in_one_of_them() -> None:
    tried = [one for one in methods.swaps() if len(one) == 1 or one[0] == "method=quarot"]
    assert len(tried) > len(compose.options("method")) + 40
    assert {" ".join(one): wrong for one in tried if (wrong := methods.mistake(one))} == {}


@pytest.mark.slow
def test_every_recipe_with_every_member() -> None:
    tried = list(methods.swaps())
    per_recipe = 1 + sum(len(compose.options(f"method/{kind}")) + (kind in LISTS) for kind in KINDS)
    assert len(tried) == len(compose.options("method")) * per_recipe
    assert len(tried) >= 6 * (1 + 21 + 2)
    assert {" ".join(one): wrong for one in tried if (wrong := methods.mistake(one))} == {}


@pytest.mark.parametrize("recipe", files("method"))
def test_a_recipe_names_every_kind_and_no_settings(recipe: str) -> None:
    """Otherwise a kind could not be swapped by one override, or a setting would survive the swap (style.md 3.2)."""
    text = (CONF / "method" / f"{recipe}.yaml").read_text()
    defaults = re.search(r"^defaults: \[(.*)\]$", text, flags=re.MULTILINE)
    assert defaults, "the defaults list stands on one line"
    assert set(re.findall(r"\{(\w+):", defaults[1])) == set(KINDS)
    body = re.findall(r"^(\w+):", text, flags=re.MULTILINE)
    assert set(body) <= {"defaults", "name", "inputs", "quantize_stream"}
    assert method(f"method={recipe}")["name"] == recipe
    assert text.startswith("#") and len(text.splitlines()) <= 12


@pytest.mark.parametrize("recipe", files("method"))
def test_lists_keep_their_order(recipe: str) -> None:
    swapped = method(f"method={recipe}", "method/transform=[fold_norm,hadamard]", "method/tuner=[]")
    assert list(swapped["transform"]) == ["fold_norm", "hadamard"]
    assert list(method(f"method={recipe}", "method/transform=[hadamard,fold_norm]")["transform"]) == [
        "hadamard",
        "fold_norm",
    ]
    assert method(f"method={recipe}", "method/transform=[]")["transform"] == {}
    assert swapped["tuner"] == {}


def test_a_swap_changes_its_kind_and_nothing_else() -> None:
    plain, swapped = method("method=quarot"), method("method=quarot", "method/solver=rtn")
    assert swapped.pop("solver") == {"_target_": "qexp.stages.solver.rtn.Rtn"} != plain.pop("solver")
    assert plain == swapped


def test_a_member_takes_settings_by_one_override() -> None:
    assert method("method=gptq", "method.solver.act_order=false")["solver"]["act_order"] is False
    steps = method("method=awq", "method.transform.awq.steps=5")["transform"]["awq"]["steps"]
    assert steps == 5


@given(st.sampled_from([2, 3, 4, 6, 8]), st.sampled_from([None, 4, 6, 8, 16]), st.sampled_from([None, 2, 3, 4, 8, 16]),
       st.sampled_from([None, 32, 64, 128]))  # fmt: skip
def test_a_name_of_bits_says_its_keys(w: int, a: int | None, kv: int | None, g: int | None) -> None:
    name = f"w{w}" + (f"a{a}" if a else "") + (f"kv{kv}" if kv else "") + (f"g{g}" if g else "")
    bits = bits_of(name)
    assert bits is not None
    assert (bits["weight"], bits["act"], bits["kv"], bits["group"]) == (w, a or 16, kv or 16, g or -1)
    assert bits_of(bits["name"]) == bits, "the shown name means the same"


def test_names_of_bits_reach_the_members() -> None:
    config = compose.composed(["method=quarot", "bits=w4a4kv4g128"])
    assert config["bits"] == {"name": "w4a4kv4g128", "weight": 4, "act": 4, "kv": 4, "group": 128}
    built = build(config["method"], "method")
    assert (built.allocation.bits, built.act.bits, built.kv.bits, built.grid.group) == (4, 4, 4, 128)
    free = compose.composed(["bits=w4a16", "bits.weight=5", "bits.group=96"])["bits"]
    assert (free["weight"], free["group"]) == (5, 96)


@pytest.mark.parametrize("name", ["w5", "a4", "w4a5", "w4kv4a4", "w4g100", "w4g", "W4", "w44", "w4a4kv4g128x", "", "4"])
def test_wrong_names_of_bits(name: str) -> None:
    assert bits_of(name) is None
    assert BITS_PATTERN.fullmatch(name) is None
    with pytest.raises((*HYDRA_MISTAKES, ValueError)):
        compose.composed([f"bits={name}"])


@pytest.mark.parametrize("name", files("model"))
def test_every_model_builds(name: str) -> None:
    source = build(compose.composed([f"model={name}"])["model"], "model")
    assert isinstance(source, ModelSource)
    assert source.outliers == {"kind": "none", "channels": 0, "scale": 1.0, "seed": 0}
    assert source.format == {"embedded": "embedded", "gguf": "gguf"}.get(name, "hf")
    named = name not in ("embedded", "gguf", "hf")
    assert bool(source.path) == named
    assert ("/" not in source.name and source.name != source.path) or not named, "a short name for reports"


@pytest.mark.parametrize(
    "choice",
    [f"{group}={name}" for group in ("calibration", "eval", "tracking") for name in files(group)],
)
def test_every_other_choice_builds(choice: str) -> None:
    config = compose.composed([choice])
    assert config.keys() == QexpConfig.__annotations__.keys() == Setup.__annotations__.keys()
    setup = Setup(**{key: build(config[key], key) for key in config})
    assert setup.resume and setup.seed == 0


def test_outliers_take_one_override() -> None:
    outliers = compose.composed(["model.outliers={kind: scale, channels: 4, scale: 30}"])["model"]["outliers"]
    assert outliers == {"kind": "scale", "channels": 4, "scale": 30, "seed": 0}


def test_a_config_says_what_it_is() -> None:
    silent = [
        path for path in CONF.rglob("*.yaml") if not path.read_text().startswith("#") and path.parent.name != "model"
    ]
    assert silent == []


class TestTheCommand:
    """``qexp-methods``."""

    @staticmethod
    def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            methods.main(arguments)
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    def test_lists_everything(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = self.answer(capsys)
        assert (code, err) == (0, "")
        for group, name in methods.choices():
            assert re.search(rf"^ *{group} +{name} ", out, flags=re.MULTILINE)
        assert re.search(r"^ *method +gptq +calibration +GPTQ.* 2210\.17323", out, flags=re.MULTILINE)
        assert re.search(r"^ *method +rtn +Round to nearest", out, flags=re.MULTILINE)

    def test_shows_one_in_full(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = self.answer(capsys, "gptq")
        assert code == 0
        assert "method=gptq" in out and "method/solver=gptq" in out
        assert "damp_fraction: 0.01         # of mean(diag H)" in out, "with the YAML's comments"
        assert "Source: arXiv:2210.17323" in out, "and the docstring"
        assert "method=gptq" not in self.answer(capsys, "solver/gptq")[1]

    def test_an_unknown_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = self.answer(capsys, "gptk")
        assert (code, out) == (2, "")
        assert "did you mean gptq" in err and err.count("\n") == 1

    def test_check_names_what_is_broken(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong = ["method=gptq", "+method.solver.dampp=1"]
        monkeypatch.setattr(compose, "sweeps", list)
        monkeypatch.setattr(methods, "swaps", lambda: iter([["method=gptq"], wrong]))
        code, out, _ = self.answer(capsys, "--check")
        assert code == 1
        assert "method=gptq +method.solver.dampp=1: method.solver.dampp is no setting of Gptq; known: act_order" in out
        assert "2 combinations; 0 sweeps, 0 jobs; 1 broken" in out
        monkeypatch.setattr(methods, "swaps", lambda: iter([["method=gptq"]]))
        assert self.answer(capsys, "--check")[0] == 0

    def test_check_names_the_file_of_a_sweep_that_is_broken(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        files = {
            "right": "",
            "member": "method: {solver: {damp: 1}}\n",
            "key": "mehtod: {}\n",
            "choice": "hydra: {sweeper: {params: {method: 'gptq,gptk'}}}\n",
        }
        sweeps = tmp_path / "sweeps" / "papers"
        sweeps.mkdir(parents=True)
        for name, text in files.items():
            (sweeps / f"own_{name}.yaml").write_text(
                f"# @package _global_\ndefaults: [{{override /method: gptq}}]\n{text}"
            )
        ours = [f"+sweeps/papers=own_{name}" for name in files]
        monkeypatch.setattr(methods, "swaps", lambda: iter([]))
        monkeypatch.setattr(compose, "sweeps", lambda: ours)
        search = QexpSearchPath.manipulate_search_path

        def with_ours(self: QexpSearchPath, path: ConfigSearchPath) -> None:
            search(self, path)
            path.append("test", f"file://{tmp_path}")

        monkeypatch.setattr(QexpSearchPath, "manipulate_search_path", with_ours)
        code, out, _ = self.answer(capsys, "--check")
        assert code == 1 and "4 sweeps, " in out and "; 3 broken" in out
        told = {line.split(":")[0]: line for line in out.splitlines() if line.startswith("sweeps/papers/")}
        assert "damp is no" in told["sweeps/papers/own_member.yaml"]
        assert "mehtod" in told["sweeps/papers/own_key.yaml"]
        assert "did you mean gptq" in told["sweeps/papers/own_choice.yaml"]
        assert "method=gptk" in told["sweeps/papers/own_choice.yaml"]
