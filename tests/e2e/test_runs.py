"""Whole runs through the command: what they leave, what they do not do twice, and sweeps with a failing job."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from test_tracking import read_back
from tiny_runs import assert_same_blocks, blocks_below, command, record_below, tiny

from qexp.models.load import EMBEDDED


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that the runs of this session share, and no other."""
    monkeypatch.setenv("QEXP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def done(*overrides: str) -> None:
    outcome = command(*overrides)
    assert outcome.code == 0, outcome.err


def folders(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("*/record.json"))


@pytest.mark.parametrize(
    "recipe",
    [
        "method=rtn bits=w4a16g32",
        "method=gptq bits=w3a8kv4",
        "method=awq bits=w3a16g32",
        "method=smoothquant bits=w8a8",
        "method=quarot bits=w4a4kv4",
        "method=quarot method/solver=rtn bits=w4a4",
        "method=gptq method/transform=[fold_norm,hadamard] bits=w4a4",
        "method=awq method/solver=gptq bits=w3a16",
        "method=rtn calibration=none bits=w4a4",
        "method=spinquant bits=w4a4kv4 method.transform.learned_rotation.steps=2",
        pytest.param(
            "method=spinquant_no_had bits=w4a8 method.transform.learned_rotation.steps=2", marks=pytest.mark.slow
        ),
        "method=flatquant bits=w4a4kv4 method.transform.kronecker.training.steps=4",
        pytest.param("method=duquant bits=w4a4kv4 method.transform.duquant.block=8", marks=pytest.mark.slow),
        "method=quik bits=w4a4",
        "method=quip bits=w2a16",
        pytest.param("method=quip_sharp bits=w2a16", marks=pytest.mark.slow),
        pytest.param("method=crossquant bits=w8a8", marks=pytest.mark.slow),
        pytest.param("method=gptq method/act=per_tensor bits=w4a8", marks=pytest.mark.slow),
        "method=rtn model.outliers={kind:rotate} bits=w4a4",
        pytest.param("method=rtn model.outliers={kind:scale,channels:2,scale:30} bits=w4a4", marks=pytest.mark.slow),
    ],
)
def test_a_run_leaves_a_record(recipe: str, tiny_folder: Path, tmp_path: Path) -> None:
    outcome = command(*tiny(tiny_folder, tmp_path, *recipe.split(" ")))
    assert outcome.code == 0, outcome.err
    record = record_below(tmp_path)
    assert record["status"] == "completed" and record["warnings"] == []
    metrics = record["metrics"]
    assert {"perplexity/generated", "fp/perplexity/generated", "divergence/kl/generated", "size/bytes"} <= set(metrics)
    assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))
    assert metrics["divergence/kl/generated"] > 0
    assert metrics["size/bytes"] < metrics["fp/size/bytes"]
    assert [block["index"] for block in record["blocks"]] == [0, 1, 2]
    assert all(len(block["layers"]) == 7 for block in record["blocks"])
    assert record["config"]["bits"]["name"] in record["name"] and record["name"].endswith("tiny-llama")
    assert "completed" in outcome.out and str(folders(tmp_path)[0]) in outcome.out, "the table, and where the record is"


def test_fp16_is_the_baseline_exactly(tiny_folder: Path, tmp_path: Path) -> None:
    done(*tiny(tiny_folder, tmp_path, "method=fp16", "bits=w4a4kv4", "calibration=none", "eval.tasks=[]"))
    metrics = record_below(tmp_path)["metrics"]
    floats = {key.removeprefix("fp/"): value for key, value in metrics.items() if key.startswith("fp/")}
    assert floats.keys() >= {"perplexity/generated", "perplexity/generated/ci95", "size/bytes"}
    assert {key: metrics[key] for key in floats} == floats
    assert metrics["divergence/kl/generated"] == 0 and metrics["divergence/top1/generated"] == 1
    assert metrics["size/bits_per_weight"] == 16


def test_the_same_run_gives_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["method=quarot", "bits=w4a4kv4"]
    done(*tiny(tiny_folder, tmp_path / "one", *words))
    done(*tiny(tiny_folder, tmp_path / "two", *words))
    assert record_below(tmp_path / "one")["metrics"] == record_below(tmp_path / "two")["metrics"]
    assert_same_blocks(tmp_path / "one", tmp_path / "two")
    done(*tiny(tiny_folder, tmp_path / "three", *words, "seed=1"))
    one, three = (blocks_below(tmp_path / name)["00000.safetensors"][0] for name in ("one", "three"))
    assert any((one[key] != three[key]).any() for key in one if key.endswith(".codes")), "another rotation"


def test_a_completed_run_is_not_repeated(tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny(tiny_folder, tmp_path, "method=rtn")
    done(*words)
    (record,) = tmp_path.glob("*/record.json")
    (block, *_) = sorted(tmp_path.glob("*/blocks/*"))
    before, text = (record.stat().st_mtime_ns, block.stat().st_mtime_ns), record.read_text()
    again = command(*words)
    assert again.code == 0 and "nothing to do" in again.err
    assert "completed" in again.out, "the table is shown all the same"
    assert (record.stat().st_mtime_ns, block.stat().st_mtime_ns) == before
    done(*words, "resume=false")
    assert record.stat().st_mtime_ns > before[0] and block.stat().st_mtime_ns > before[1]
    assert json.loads(record.read_text())["metrics"] == json.loads(text)["metrics"]


@pytest.mark.parametrize("change", ["bits=w3a16", "seed=1", "calibration.seed=1", "method.grid.symmetry=restricted"])
def test_another_config_gets_another_folder(change: str, tiny_folder: Path, tmp_path: Path) -> None:
    done(*tiny(tiny_folder, tmp_path, "method=rtn", "eval=none"))
    done(*tiny(tiny_folder, tmp_path, "method=rtn", "eval=none", change))
    first, second = folders(tmp_path)
    assert first != second


def test_a_corrupt_block_is_a_users_matter(tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny(tiny_folder, tmp_path, "method=rtn")
    done(*words)
    next(tmp_path.glob("*/record.json")).unlink()
    block = sorted(tmp_path.glob("*/blocks/*"))[1]
    whole = block.read_bytes()
    block.write_bytes(whole[:-100])
    outcome = command(*words)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"qexp: {block} is corrupt")
    assert "resume=false" in outcome.err
    block.unlink()
    done(*words)
    assert len(blocks_below(tmp_path)) == 3


def test_a_failure_leaves_a_failed_record(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qexp.eval.evaluation import Evaluation

    def breaks(self: Any, *given: Any) -> None:
        logging.getLogger("qexp.eval").warning("something odd")
        raise RuntimeError("the disk is on fire")

    words = tiny(tiny_folder, tmp_path, "method=rtn")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "run", breaks)
        with pytest.raises(RuntimeError, match="on fire"):
            command(*words)
    record = record_below(tmp_path)
    assert record["status"] == "failed" and record["error"] == "RuntimeError: the disk is on fire"
    assert record["warnings"] == ["something odd"]
    done(*words)
    record = record_below(tmp_path)
    assert record["status"] == "completed" and "error" not in record


def test_a_sweep_goes_on_past_a_failed_job(tiny_folder: Path, tmp_path: Path) -> None:
    """gptq cannot do without calibration, a group of 64 does not divide 32; the others complete, and exit code is 1."""
    words = tiny(tiny_folder, tmp_path, "calibration=none", "calibration.samples=8")
    outcome = command("-m", *words, "method=fp16,gptq,rtn", "bits=w4a16,w4a16g64")
    assert outcome.code == 1
    assert [record["status"] for record in map(_read, folders(tmp_path))] == ["completed"] * 3
    failed = [line for line in outcome.err.splitlines() if line.startswith("failed  ")]
    assert len(failed) == 3
    assert sum("method=gptq" in line and "calibration=none" in line for line in failed) == 2
    assert sum("method=rtn" in line and "does not divide" in line for line in failed) == 1
    assert "fp16" in outcome.out and "rtn" in outcome.out and "gptq" not in outcome.out, "the table of what completed"
    assert "Traceback" not in outcome.err


def test_a_sweep_that_finished_costs_nothing_the_second_time(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["-m", *tiny(tiny_folder, tmp_path, "method=rtn,gptq")]
    done(*words)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/record.json")}
    again = command(*words)
    assert again.code == 0 and again.err.count("nothing to do") == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/record.json")} == before
    assert again.out.count("gptq") >= 1 and again.out.count("rtn") >= 1


def test_wandb_has_the_record(tiny_folder: Path, tmp_path: Path) -> None:
    """Summary equals record; the group is the sweep, the tags are method, bits and model."""
    done("-m", *tiny(tiny_folder, tmp_path, "method=rtn,quarot", "bits=w4a4kv4"), "tracking=offline")
    runs = {
        back["run"].display_name: back for back in map(read_back, sorted((tmp_path / "wandb").glob("offline-run-*")))
    }
    records = {record["name"]: record for record in map(_read, folders(tmp_path))}
    assert len(runs) == len(records) == 2
    groups = set()
    for name, record in records.items():
        back = next(back for shown, back in runs.items() if shown.startswith(name))
        assert {key: value for key, value in back["summary"].items() if key in record["metrics"]} == record["metrics"]
        assert {"w4a4kv4", record["config"]["method"]["name"]} <= set(back["run"].tags)
        assert back["config"]["cfg"] == record["config"]
        groups.add(back["run"].run_group)
    assert len(groups) == 1 and groups != {""}


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(), reason="the embedded weights are not in this checkout"
)
class TestEmbedded:
    """Orderings on the embedded model: every one is a claim of a paper."""

    @staticmethod
    def gaps(out: Path, *overrides: str) -> dict[str, float]:
        done("-m", *overrides, "tracking=none", f"output_dir={out}", "calibration.samples=16", "eval.limit=20")
        found = {}
        for record in map(_read, folders(out)):
            metrics, method = record["metrics"], record["config"]["method"]
            solver = method["solver"]["_target_"].rsplit(".", 1)[-1].lower()
            found[f"{method['name']}+{solver}"] = math.log(
                metrics["perplexity/generated"] / metrics["fp/perplexity/generated"]
            )
        return found

    def test_gptq_beats_rounding(self, tmp_path: Path) -> None:
        gaps = self.gaps(tmp_path, "method=rtn,gptq", "bits=w3a16")
        assert 0 < gaps["gptq+gptq"] <= 0.8 * gaps["rtn+rtn"]

    def test_rotations_undo_outliers_and_ablations_are_ordered(self, tmp_path: Path) -> None:
        stress = ("model.outliers={kind: rotate}", "bits=w4a4")
        gaps = self.gaps(tmp_path, "method=rtn,quarot", *stress)
        gaps |= self.gaps(tmp_path, "method=quarot", "method/solver=rtn", *stress)
        assert gaps["quarot+gptq"] <= 0.5 * gaps["rtn+rtn"]
        assert gaps["quarot+gptq"] < gaps["quarot+rtn"] < gaps["rtn+rtn"]

    def test_fp16_is_the_baseline_exactly(self, tmp_path: Path) -> None:
        assert self.gaps(tmp_path, "method=fp16") == {"fp16+rtn": 0.0}
