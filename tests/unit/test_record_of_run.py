"""The record of a real run keeps the contract (design.md section 3): keys, units, figures that can be recomputed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import blocks_below, command, record_below, tiny
from transformers import AutoModelForCausalLM

from qexp.report import record as records

KEYS = {
    "schema", "status", "fingerprint", "name", "config", "warnings", "environment", "metrics", "window_losses", "cost",
    "blocks", "diagnostics", "published",
}  # fmt: skip
METRIC = re.compile(
    r"(fp/)?perplexity/\w+(/ci95)?|(fp/)?accuracy/\w+(/stderr|/norm)?|divergence/(kl|top1)/\w+"
    r"|(fp/)?size/(bits_per_weight|bytes|kv_bytes_per_token)|(fp/)?speed/\w+"
)
RECIPE = ("method=quarot", "bits=w3a8kv4", "eval.tasks=[qexp_grammar]")


@pytest.fixture(scope="module")
def out(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QEXP_CACHE", str(folder.parent / "cache"))
        outcome = command(*tiny(tiny_folder, folder, *RECIPE, "calibration.tokens=1000", "calibration.samples=4"))
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def record(out: Path) -> dict[str, Any]:
    return record_below(out)


def test_it_has_the_keys_of_the_contract(record: dict[str, Any]) -> None:
    assert record.keys() == KEYS
    assert (record["schema"], record["status"]) == (1, "completed")
    records.validate(record)
    assert re.fullmatch(r"[0-9a-f]{64}", record["fingerprint"])


def test_its_folder_holds_nothing_else(out: Path, record: dict[str, Any]) -> None:
    (folder,) = (path for path in out.iterdir() if path.is_dir() and not path.name.startswith("."))
    assert folder.name == f"{record['name']}-{record['fingerprint'][:10]}"
    assert {path.name for path in folder.iterdir()} == {"record.json", "fingerprint.json", "blocks"}


def test_metrics_are_flat_and_named(record: dict[str, Any]) -> None:
    metrics = record["metrics"]
    assert [key for key in metrics if not METRIC.fullmatch(key)] == []
    wanted = {"perplexity/generated", "perplexity/generated/ci95", "fp/perplexity/generated", "divergence/kl/generated",
              "divergence/top1/generated", "accuracy/qexp_grammar", "fp/accuracy/qexp_grammar",
              "accuracy/qexp_grammar/stderr", "size/bits_per_weight", "size/bytes", "fp/size/bytes",
              "size/kv_bytes_per_token"}  # fmt: skip
    assert wanted <= metrics.keys()
    low, high = metrics["perplexity/generated/ci95"]
    assert low <= metrics["perplexity/generated"] <= high
    assert 0 <= metrics["divergence/top1/generated"] <= 1


def test_perplexity_is_that_of_the_window_losses(record: dict[str, Any]) -> None:
    for prefix in ("", "fp/"):
        losses = record["window_losses"][f"{prefix}generated"]
        assert len(losses) == 4
        assert record["metrics"][f"{prefix}perplexity/generated"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-9)


def test_the_float_size_is_that_of_the_model(record: dict[str, Any], tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert record["metrics"]["fp/size/bytes"] == 2 * sum(p.numel() for p in model.parameters())


def test_bits_are_counted_with_their_scales(record: dict[str, Any]) -> None:
    """Symmetric rows of I weights: 3 bits each and one float16 scale."""
    layers = [layer for block in record["blocks"] for layer in block["layers"]]
    for layer in layers:
        inputs = 96 if layer["name"].endswith("down_proj") else 32
        assert layer["bits"] == pytest.approx(3 + 16 / inputs)
    weights = {"q": 32 * 32, "k": 16 * 32, "v": 16 * 32, "o": 32 * 32, "gate": 96 * 32, "up": 96 * 32, "down": 96 * 32}
    size = [weights[layer["name"].rsplit(".", 1)[-1].removesuffix("_proj")] for layer in layers]
    average = sum(n * layer["bits"] for n, layer in zip(size, layers, strict=True)) / sum(size)
    assert record["metrics"]["size/bits_per_weight"] == pytest.approx(average, rel=1e-12)


def test_keys_and_values_take_four_bits(record: dict[str, Any]) -> None:
    """3 blocks x (k, v) x 2 heads x 8 elements at 4 bits; scale and zero point per head on top."""
    elements = 3 * 2 * 2 * 8
    assert elements * 4 / 8 < record["metrics"]["size/kv_bytes_per_token"] < elements * 2


def test_blocks_say_what_the_files_hold(record: dict[str, Any], out: Path) -> None:
    stored = [facts["report"] for _, facts in blocks_below(out).values()]
    assert [{k: v for k, v in block.items() if k != "seconds"} for block in record["blocks"]] == stored
    for index, block in enumerate(record["blocks"]):
        assert block["index"] == index and block["seconds"] > 0
        assert [layer["name"].rsplit(".", 1)[-1] for layer in block["layers"]] == [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ]  # fmt: skip
        assert all(0 < layer["error"] < 1 and layer["sqnr_db"] > 3 for layer in block["layers"])


def test_the_config_is_resolved_and_repeats_the_run(record: dict[str, Any]) -> None:
    assert "${" not in json.dumps(record["config"]) and "???" not in json.dumps(record["config"])
    assert record["config"]["method"]["name"] == "quarot"
    assert record["config"]["bits"] == {"name": "w3a8kv4", "weight": 3, "act": 8, "kv": 4, "group": -1}
    assert record["config"]["method"]["grid"]["bits"] == 3


def test_a_silent_fallback_is_a_warning(record: dict[str, Any]) -> None:
    (warning,) = record["warnings"]
    assert warning == "calibration.tokens=1000 is more than the model's 64 positions; using 64"


def test_the_environment_and_the_cost(record: dict[str, Any]) -> None:
    assert {"python", "platform", "processor", "threads", "gpu", "commit", "command", "versions"} <= record[
        "environment"
    ].keys()
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert {"quantize_seconds", "evaluate_seconds", "peak_rss_bytes"} <= record["cost"].keys()
    assert 2**26 < record["cost"]["peak_rss_bytes"] < 2**40
    assert 0 < record["cost"]["quantize_seconds"] < 600


def test_activations_before_and_after_the_rotation(record: dict[str, Any]) -> None:
    shown = record["diagnostics"]["activations"]
    assert [entry["layer"].split(".")[2] for entry in shown] == ["0", "1", "1"]
    for entry in shown:
        assert len(entry["before"]) == len(entry["after"]) == 63, "tokens of one sequence, without the first"
        assert {len(row) for row in entry["before"]} <= {32, 64}
        assert entry["kurtosis_before"] > 1 and entry["kurtosis_after"] > 1
        assert entry["before"] != entry["after"]


def test_every_input_before_and_after(record: dict[str, Any]) -> None:
    inputs = record["diagnostics"]["inputs"]
    assert len(inputs) == 3 * 4
    for entry in inputs:
        for when in ("before", "after"):
            figures = entry[when]
            assert figures["kurtosis"] > 1 and figures["peak"] >= 1
            assert 15 < figures["sqnr_db"] < 60, "8 bits"
        assert entry["before"] != entry["after"]
