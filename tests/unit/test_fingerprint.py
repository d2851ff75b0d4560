"""What a run computes decides its name: everything that changes the answer, and nothing that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import SMALL, tiny

from qexp import compose
from qexp.core.build import build
from qexp.core.errors import UserError
from qexp.engine.context import Run
from qexp.engine.fingerprint import claim, digest, flat
from qexp.launch import Setup, begin
from qexp.ownership import owned


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with compose.hydra():
        yield


def setup(*overrides: str) -> Setup:
    config = compose.composed(overrides)
    return Setup(**{key: build(config[key], key) for key in Setup.__annotations__})


def begun(model: Path, out: Path, *overrides: str) -> Run:
    return begin(setup(*tiny(model, out, *overrides)), None)


class TestDigest:
    def test_order_of_keys_does_not_matter_and_values_do(self) -> None:
        assert digest({"a": 1, "b": {"c": [1, 2]}}) == digest({"b": {"c": [1, 2]}, "a": 1})
        assert digest({"a": 1}) != digest({"a": 2}) != digest({"a": "2"})
        assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})

    def test_flat(self) -> None:
        assert flat({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {"a.b": 1, "a.c.d": [1], "e": None}


class TestClaim:
    def test_the_same_computation_may_come_back(self, tmp_path: Path) -> None:
        claim(tmp_path / "run", {"seed": 0, "method": {"bits": 4}})
        claim(tmp_path / "run", {"method": {"bits": 4}, "seed": 0})
        assert json.loads((tmp_path / "run" / "fingerprint.json").read_text())["seed"] == 0
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["fingerprint.json"]

    def test_another_one_is_refused_and_the_difference_named(self, tmp_path: Path) -> None:
        claim(tmp_path, {"seed": 0, "method": {"bits": 4}, "old": 1})
        with pytest.raises(UserError, match=r"differs in method\.bits, new, old;"):
            claim(tmp_path, {"seed": 0, "method": {"bits": 3}, "new": 1})


class TestOfARun:
    @pytest.mark.parametrize(
        "change",
        [
            "tracking=offline",
            "resume=false",
            "calibration=generated",
            "model.name=another-name",
            "calibration.path=/not/read/when/generated",
            "eval.perplexity=[generated]",
        ],
    )
    def test_what_does_not_change_the_answer(self, change: str, tiny_folder: Path, tmp_path: Path) -> None:
        one, two = begun(tiny_folder, tmp_path), begun(tiny_folder, tmp_path, change)
        assert one.fingerprint == two.fingerprint

    def test_places_do_not_matter(self, tiny_folder: Path, tmp_path: Path) -> None:
        moved = Path(shutil.copytree(tiny_folder, tmp_path / "elsewhere" / "copy"))
        one, two = begun(tiny_folder, tmp_path / "out"), begun(moved, tmp_path / "other" / "out")
        assert one.fingerprint == two.fingerprint
        assert one.model_identity == two.model_identity

    @pytest.mark.parametrize(
        "change",
        [
            "seed=1",
            "method=gptq",
            "method/solver=gptq",
            "method.grid.symmetry=restricted",
            "method.inputs=float",
            "method.inputs=block",
            "method/transform=[fold_norm]",
            "bits=w3a16",
            "bits.act=8",
            "model.dtype=bfloat16",
            "model.outliers={kind:scale,channels:1,scale:3}",
            "calibration.samples=9",
            "calibration.seed=1",
            "eval.limit=5",
            "eval.divergence=false",
            "eval=none",
        ],
    )
    def test_what_changes_the_answer(self, change: str, tiny_folder: Path, tmp_path: Path) -> None:
        assert begun(tiny_folder, tmp_path).fingerprint != begun(tiny_folder, tmp_path, change).fingerprint

    def test_the_order_of_transforms_matters(self, tiny_folder: Path, tmp_path: Path) -> None:
        one = begun(tiny_folder, tmp_path, "method/transform=[smooth,awq]")
        two = begun(tiny_folder, tmp_path, "method/transform=[awq,smooth]")
        assert one.fingerprint != two.fingerprint

    @pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_the_content_of_the_model_matters(self, file: str, tiny_folder: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
        content = bytearray((other / file).read_bytes())
        content[-2] ^= 1
        (other / file).write_bytes(content)
        assert begun(tiny_folder, tmp_path / "out").fingerprint != begun(other, tmp_path / "out").fingerprint

    def test_the_content_of_a_text_matters_and_its_place_does_not(self, tiny_folder: Path, tmp_path: Path) -> None:
        texts = [tmp_path / name for name in ("one.txt", "same.txt", "other.txt")]
        for path, text in zip(texts, ["w1 w2", "w1 w2", "w1 w3"], strict=True):
            path.write_text(text)
        one, same, other = (
            begun(
                tiny_folder, tmp_path / "out", "calibration=local", f"calibration.path={path}", *SMALL[:2]
            ).fingerprint
            for path in texts
        )
        assert one == same != other

    def test_a_members_version_matters(
        self, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qexp.stages.solver.rtn import Rtn

        before = begun(tiny_folder, tmp_path).fingerprint
        monkeypatch.setattr(Rtn, "version", Rtn.version + 1)
        assert begun(tiny_folder, tmp_path).fingerprint != before

    def test_outliers_do_not_change_whose_text_is_sampled(self, tiny_folder: Path, tmp_path: Path) -> None:
        stressed = begun(tiny_folder, tmp_path, "model.outliers={kind:rotate}")
        assert stressed.model_identity == begun(tiny_folder, tmp_path).model_identity

    def test_the_folder_is_named_by_what_it_holds(self, tiny_folder: Path, tmp_path: Path) -> None:
        work = begun(tiny_folder, tmp_path, "method=gptq", "bits=w3a8kv4")
        assert work.name == "gptq-w3a8kv4-tiny-llama"
        assert work.folder == tmp_path / f"{work.name}-{work.fingerprint[:10]}"

    def test_resume_false_empties_the_folder(self, tiny_folder: Path, tmp_path: Path) -> None:
        work = begun(tiny_folder, tmp_path)
        with owned(work, resume=True, busy="skip"):
            (work.folder / "left").write_text("")
        with owned(work, resume=True, busy="skip"):
            assert (work.folder / "left").exists()
        with owned(work, resume=False, busy="skip"):
            assert [path.name for path in work.folder.iterdir()] == ["fingerprint.json"]
