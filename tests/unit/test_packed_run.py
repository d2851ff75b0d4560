"""Finished runs on packed integers: loaded from their folder, timed, put into the record, or refused in one line."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import RECIPES, rounded
from tiny_runs import command, record_below, save_tiny, tiny
from toy_models import tokens, toy
from transformers import DynamicCache

from qexp import bench
from qexp.core.build import build
from qexp.core.cache import cache_folder
from qexp.core.errors import UserError
from qexp.engine.packing import pack_model
from qexp.eval.divergence import score_windows
from qexp.eval.perplexity import Loop, perplexity, reader
from qexp.eval.speed import Contender, Workload, added_bytes, measure, workload
from qexp.finished import load
from qexp.models.load import EMBEDDED

RECIPE = ("method=quarot", "bits=w4a4kv4")
FIGURES = {"prefill_tokens_per_s", "decode_tokens_per_s", "first_token_seconds", "weight_bytes", "peak_bytes"}


def silent(_: str, items: Any) -> Any:
    return items


@pytest.fixture(scope="module")
def out(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one timed run."""
    folder = tmp_path_factory.mktemp("timed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEXP_CACHE", str(cache_folder()))  # of the kernels: built once for all tests
        outcome = command(*tiny(tiny_folder, folder, *RECIPE, "eval.speed=true"))
    assert outcome.code == 0, outcome.err
    assert "packed: w4a4" in outcome.err
    return folder


@pytest.fixture
def run_folder(out: Path) -> Path:
    return next(out.glob("*/record.json")).parent


def test_the_record_has_the_speeds_of_both_models(out: Path) -> None:
    record = record_below(out)
    speeds = {key: value for key, value in record["metrics"].items() if "speed/" in key}
    assert speeds.keys() == {f"{who}speed/{key}" for who in ("", "fp/") for key in FIGURES} | {
        "speed/prompt_tokens", "speed/decoded_tokens",
    }  # fmt: skip
    assert all(value > 0 for value in speeds.values())
    assert speeds["speed/prompt_tokens"] + speeds["speed/decoded_tokens"] == 64  # the model's positions
    assert speeds["speed/weight_bytes"] < speeds["fp/speed/weight_bytes"]
    assert {"compiled", "reason", "isa"} <= record["environment"]["kernels"].keys()


def test_a_timed_run_is_another_run_with_the_same_numbers(out: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert command(*tiny(tiny_folder, tmp_path, *RECIPE)).code == 0
    timed, plain = record_below(out), record_below(tmp_path)
    assert timed["fingerprint"] != plain["fingerprint"]
    assert {k: v for k, v in timed["metrics"].items() if "speed/" not in k} == plain["metrics"]


@torch.no_grad()
def test_a_finished_run_comes_back_as_it_was(out: Path, run_folder: Path) -> None:
    run, record = load(run_folder), record_below(out)
    evaluation = build(record["config"]["eval"], "eval")
    float_model, tokenizer = run.source.load("cpu", cache_folder())
    windows = evaluation.sets(float_model, tokenizer, run_folder.parent, "id")["generated"]

    def losses() -> list[float]:
        source, loop = reader(run.view.model, windows[:1]), Loop(4, torch.device("cpu"), silent)
        return score_windows(source, windows, None, loop, "generated").losses

    assert losses() == pytest.approx(record["window_losses"]["generated"], rel=1e-6)
    packed = pack_model(run.view, run.method)
    assert losses() == pytest.approx(record["window_losses"]["generated"], rel=0.02)  # some ties fall otherwise
    assert packed.codec is not None and set(packed.counts()) == {"w4a4", "w4a4+hadamard"}


def changed(run_folder: Path, tmp_path: Path, **record: Any) -> Path:
    """Return a copy of a run with other entries in its record."""
    folder = tmp_path / "copy"
    shutil.copytree(run_folder, folder)
    file = folder / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | record))
    return folder


def test_a_run_that_is_not_whole_is_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        load(tmp_path)
    with pytest.raises(UserError, match="failed"):
        load(changed(run_folder, tmp_path / "a", status="failed", error="KeyError: x"))
    folder = changed(run_folder, tmp_path / "b")
    next((folder / "blocks").iterdir()).unlink()
    with pytest.raises(UserError, match="blocks is not complete"):
        load(folder)


def test_a_model_that_has_changed_is_refused(run_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    record = json.loads((run_folder / "record.json").read_text())
    record["config"]["model"]["path"] = str(save_tiny(tmp_path / "other", hidden_size=16))
    with pytest.raises(UserError, match="has changed since"):
        load(changed(run_folder, tmp_path, config=record["config"]))


@pytest.mark.parametrize("key", ["engine", "versions of members", "cuda"])
def test_a_run_of_another_version_or_machine_is_refused(key: str, run_folder: Path, tmp_path: Path) -> None:
    folder = changed(run_folder, tmp_path)
    parts = json.loads((folder / "fingerprint.json").read_text())
    if key == "engine":
        parts["engine"] -= 1
    elif key == "cuda":
        parts["device"] = "cuda"
    else:
        parts["method"]["versions"]["solver"] = "0"
    (folder / "fingerprint.json").write_text(json.dumps(parts))
    if key == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=key):
        load(folder)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["model"], "need the folder of a finished run"), (["model", "nowhere"], "nowhere is not the folder of a run"),
     (["kernels", "somewhere"], "kernels are measured by themselves"),
     (["kernels", "--quick", "--json", "nowhere/x.json"], "is no folder")],
)  # fmt: skip
def test_mistakes_of_the_benchmark_are_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == ""
    assert shown.err.startswith("qexp-bench: ") and told in shown.err and shown.err.count("\n") == 1


def test_the_float_recipe_is_not_benchmarked_as_packed(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert command(*tiny(tiny_folder, tmp_path, "method=fp16", "eval.speed=true")).code == 0
    folder = next(tmp_path.glob("*/record.json")).parent
    with pytest.raises(SystemExit):
        bench.main(["model", str(folder)])
    assert "has nothing to pack" in capsys.readouterr().err


@torch.no_grad()
def test_times_are_those_of_every_token() -> None:
    method = RECIPES["w4a8g8"]
    packed, plain = pack_model(rounded("gemma3", method), method), toy("gemma3", torch.float32)
    pair = {
        "a": Contender(packed.model, packed.new_cache),
        "b": Contender(plain, lambda: DynamicCache(config=plain.config)),
    }
    found = measure(pair, Workload(tokens(count=1), decode_tokens=3, rounds=2), silent)
    assert found.keys() == {"a", "b"} and all(each.keys() == FIGURES for each in found.values())
    assert found["b"]["prefill_tokens_per_s"] == pytest.approx(12 / found["b"]["first_token_seconds"])


def test_the_workload_fits_the_model() -> None:
    assert workload(toy("llama")).prompt.shape == (1, 48)  # of 64 positions, 16 for what follows
    assert workload(toy("llama", max_position_embeddings=4096)).prompt.shape == (1, 512)


def test_memory_in_use_is_seen() -> None:
    class Hungry:
        base_model = staticmethod(lambda **_: pytest.fail("not reached"))

    held = []

    def generate(*_: Any) -> None:
        held.append(torch.ones(16 << 20))
        time.sleep(0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qexp.eval.speed.generate", generate)
        assert added_bytes(Contender(Hungry(), dict), Workload(tokens(count=1))) > 60 << 20


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [("method=gptq", "bits=w4a8g64"), ("method=quarot", "bits=w4a4")])
@torch.no_grad()
def test_packed_perplexity_is_the_simulated_one(recipe: tuple[str, ...], tmp_path: Path) -> None:
    """Within 0.5 % on the embedded model, as the issue asks; a flipped tie costs far less."""
    assert EMBEDDED.is_dir()
    settings = ("calibration.samples=16", "eval.limit=8", "tracking=none", f"output_dir={tmp_path}")
    assert command(*recipe, *settings).code == 0
    record = record_below(tmp_path)
    run = load(next(tmp_path.glob("*/record.json")).parent)
    evaluation = build(record["config"]["eval"], "eval")
    float_model, tokenizer = run.source.load("cpu", cache_folder())
    windows = evaluation.sets(float_model, tokenizer, cache_folder(), "packed test")["generated"]
    packed = pack_model(run.view, run.method)
    loop = Loop(4, torch.device("cpu"), silent)
    scores = score_windows(reader(packed.model, windows[:1]), windows, None, loop, "generated")
    simulated = record["metrics"]["perplexity/generated"]
    assert perplexity(scores.losses) == pytest.approx(simulated, rel=5e-3)
