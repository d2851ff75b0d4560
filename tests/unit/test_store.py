"""Finished blocks on disk: whole or not there, and enough of them to make the same model again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from stage_members import member
from test_engine import IDS
from toy_models import FAMILIES, logits, view_of
from toy_recipes import a_run, recipe

from qexp.core.errors import UserError
from qexp.core.method import Method
from qexp.core.words import BlockReport, LayerReport
from qexp.engine import store as stores
from qexp.engine.blocks import quantize_blocks
from qexp.engine.solving import plan_of
from qexp.engine.store import Finished, Store, install, pack_block
from qexp.engine.transforming import transform_model
from qexp.models.view import ModelView

REPORT = BlockReport(
    index=3, seconds=1.5, layers=[LayerReport("q", 3.25, 0.125, 18.5), LayerReport("k", 4.0, None, None)]
)


def finished(value: float = 1.0) -> Finished:
    return Finished({"a": torch.full((3,), value)}, {"quantized": {}, "paths": {}, "report": asdict(REPORT)})


def never() -> Finished:
    raise AssertionError("made twice")


class TestOnce:
    def test_makes_once_and_reads_back(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "blocks", [])
        made = store.once("00003", finished)
        read = Store(tmp_path / "blocks", []).once("00003", never)
        assert torch.equal(read.tensors["a"], made.tensors["a"])
        assert read.facts == made.facts
        assert read.report == made.report == REPORT

    def test_keys_are_apart(self, tmp_path: Path) -> None:
        store = Store(tmp_path, [])
        store.once("00000", lambda: finished(1.0))
        store.once("00001", lambda: finished(2.0))
        assert float(store.once("00000", never).tensors["a"][0]) == 1.0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "00001.safetensors"]

    def test_warnings_come_back_with_the_block(self, tmp_path: Path) -> None:
        """A resumed run must tell what the killed one told."""
        first: list[str] = ["before"]

        def warns() -> Finished:
            first.append("this block was difficult")
            return finished()

        Store(tmp_path, first).once("00000", warns)
        again: list[str] = []
        Store(tmp_path, again).once("00000", never)
        assert again == ["this block was difficult"]

    def test_a_failing_write_leaves_no_block(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(tensors: object, path: Path, metadata: object) -> None:
            path.write_bytes(b"half a bl")
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(stores, "save_file", full)
            with pytest.raises(OSError, match="no space"):
                Store(tmp_path, []).once("00000", finished)
        assert list(tmp_path.glob("*.safetensors")) == []
        (tmp_path / "00000.12345.part").write_bytes(b"of another process that was killed")
        Store(tmp_path, []).once("00000", finished)
        assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]

    def test_a_block_appears_by_a_rename_and_in_no_other_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(self: Path, target: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path, []).once("00000", finished)
        assert list(tmp_path.glob("*.safetensors")) == []

    @pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "no facts"])
    def test_a_damaged_file_is_told_in_one_line(self, damage: str, tmp_path: Path) -> None:
        store = Store(tmp_path, [])
        store.once("00000", finished)
        path = tmp_path / "00000.safetensors"
        whole = path.read_bytes()
        wrong = {
            "cut": whole[:-4],
            "empty": b"",
            "garbage": b"x" * 200,
            "no facts": whole.replace(b'"facts"', b'"fucts"'),
        }
        path.write_bytes(wrong[damage])
        with pytest.raises(UserError, match=r"corrupt.*resume=false") as error:
            store.once("00000", never)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    def test_the_file_needs_no_pickle_and_its_facts_are_json(self, tmp_path: Path) -> None:
        Store(tmp_path, []).once("00000", finished)
        with safe_open(tmp_path / "00000.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        assert facts["report"]["layers"][0]["error"] == 0.125


RECIPES = {
    "rtn": recipe(w=3),
    "gptq": replace(recipe(w=3), solver=member("solver", "gptq")),
    "folded": recipe("fold_norm", w=4),
    "online": recipe("fold_norm", "hadamard", w=4),
    "scaled": recipe("smooth", w=4),
}


def quantized(family: str, method: Method, folder: Path) -> ModelView:
    view = view_of(family, torch.float32)
    transform_model(view, method, 0)
    quantize_blocks(view, IDS, method, a_run(folder))
    return view


class TestAWholeBlock:
    @pytest.mark.parametrize("name", RECIPES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_fresh_model_becomes_the_same(self, family: str, name: str, tmp_path: Path) -> None:
        """Codes, parameters, online maps, added biases: what the files hold is the model, bit for bit."""
        method = RECIPES[name]
        view = quantized(family, method, tmp_path)
        fresh = view_of(family, torch.float32)
        transform_model(fresh, method, 0)
        grids = plan_of(fresh, method, 0).grids
        store = Store(tmp_path / "blocks", [])
        for block in range(2):
            install(fresh, block, store.once(f"{block:05d}", never), grids)
        assert torch.equal(logits(fresh.model, IDS), logits(view.model, IDS))

    def test_installing_twice_changes_nothing(self, tmp_path: Path) -> None:
        view = quantized("qwen3", RECIPES["online"], tmp_path)
        before = logits(view.model, IDS)
        grids = plan_of(view, RECIPES["online"], 0).grids
        install(view, 0, Store(tmp_path / "blocks", []).once("00000", never), grids)
        assert torch.equal(logits(view.model, IDS), before)

    def test_online_maps_come_from_the_file(self, tmp_path: Path) -> None:
        """A fresh model that was not transformed gets them too: the file alone says what runs before a layer."""
        view, fresh = quantized("qwen3", RECIPES["online"], tmp_path), view_of("qwen3", torch.float32)
        install(
            fresh, 0, Store(tmp_path / "blocks", []).once("00000", never), plan_of(fresh, RECIPES["online"], 0).grids
        )
        x = torch.randn(5, 40)
        for group in view.groups(0):
            ours, theirs = (v.linear(group.layers[0].name).path.maps for v in (fresh, view))
            assert [step.state()[0] for step in ours] == [step.state()[0] for step in theirs]
        down = view.groups(0)[-1].layers[0].name
        assert not torch.equal(view.linear(down).path(x), x)
        assert torch.equal(fresh.linear(down).path(x), view.linear(down).path(x))

    def test_codes_are_packed(self, tmp_path: Path) -> None:
        """Three-bit codes take three bits on disk, not eight."""
        view = quantized("llama", RECIPES["gptq"], tmp_path)
        packed = pack_block(view, 0, REPORT)
        for group in view.groups(0):
            for layer in group.layers:
                tensor = packed.tensors[f"linear.{layer.name}.codes"]
                assert tensor.numel() * tensor.element_size() * 8 <= layer.outputs * (layer.inputs * 3 + 32)

    def test_nothing_of_a_quantized_weight_is_stored_in_full(self, tmp_path: Path) -> None:
        view = quantized("llama", RECIPES["rtn"], tmp_path)
        plain = [name for name in pack_block(view, 0, REPORT).tensors if name.startswith("plain.")]
        assert plain and not [name for name in plain if name.removeprefix("plain.").removesuffix(".weight") in
                              {layer.name for layer in view.layers}]  # fmt: skip
