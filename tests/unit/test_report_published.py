"""A published number stands beside a run of the same setting and beside no other."""

from __future__ import annotations

from typing import Any

import pytest
import report_records as examples

from qexp import compose
from qexp.report import published


def setting(method: str = "gptq", model: str = "llama2_7b", bits: str = "w4a16") -> dict[str, Any]:
    config = examples.config(method, bits, model)
    config["eval"]["perplexity"] = ["wikitext2", "generated"]
    return config


def values(config: dict[str, Any]) -> list[float]:
    return [entry["value"] for entry in published.match(config)]


def test_the_same_setting_is_found_with_its_source_and_its_float_value() -> None:
    entry, of_another_paper = published.match(setting())
    assert of_another_paper["value"] == 6.24
    assert entry["value"] == 5.83 and entry["source"] == "2308.13137 Table 1"
    assert entry["metric"] == "perplexity/wikitext2" and entry["fp_value"] == 5.47
    assert "OmniQuant authors" in entry["note"]


def test_every_paper_that_printed_the_setting_is_named() -> None:
    assert values(setting("rtn", "llama-1-7b")) == [6.43, 6.29]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits.weight", 5),
        ("bits.act", 8),
        ("bits.group", 32),
        ("model.name", "llama2_7b_chat"),
        ("model.outliers", {"kind": "scale"}),
        ("eval.window_tokens", 1024),
        ("eval.perplexity", ["c4"]),
        ("eval.wikitext2", {"bos": "every_window"}),
        ("method.solver", {"_target_": "qexp.stages.solver.rtn.Rtn"}),
        ("method.transform", {"hadamard": {"_target_": "qexp.stages.transform.hadamard.Hadamard"}}),
        ("method.tuner", {"clip": {"_target_": "qexp.stages.tuner.clip.Clip"}}),
    ],
)
def test_a_setting_that_differs_in_one_thing_matches_nothing(key: str, value: Any) -> None:
    config = setting()
    group, name = key.split(".")
    config[group][name] = value
    assert values(config) == []


def test_swapping_the_solver_of_quarot_finds_the_row_of_that_solver() -> None:
    config = setting("quarot", bits="w4a4kv4")
    assert values(config) == [6.1]
    config["method"]["solver"] = {"_target_": "qexp.stages.solver.rtn.Rtn"}
    assert values(config) == [8.37, 8.56]  # the paper's, and FlatQuant's authors'


@pytest.mark.parametrize(
    ("name", "path"),
    [("hf", "meta-llama/Llama-2-7b-hf"), ("hf", "/data/models/llama-2-7b"), ("LLaMA-2-7B", None)],
)
def test_a_model_is_known_by_its_name_or_its_path(name: str, path: str | None) -> None:
    config = setting(model=name)
    config["model"]["path"] = path
    assert values(config) == [5.83, 6.24]


def test_c4_counts_only_with_its_variant() -> None:
    config = setting("fp16")
    config["eval"] |= {"perplexity": ["c4"], "c4": {"variant": "new"}}
    (entry,) = published.match(config)
    assert (entry["value"], entry["metric"]) == (7.26, "perplexity/c4")
    config["eval"]["c4"] = {"variant": "legacy"}
    assert values(config) == [6.97]


def test_a_partial_evaluation_says_so() -> None:
    config = setting()
    config["eval"]["limit"] = 8
    assert "8 windows only" in published.match(config)[0]["note"]


def test_fractional_bits_of_papers_match_their_nominal_ones() -> None:
    config = setting("squeezellm")
    config["bits"]["weight"] = 3
    assert values(config) == [6.18]


def test_a_published_codebook_matches_no_other() -> None:
    config = setting("aqlm")
    config["bits"]["weight"] = 2
    config["eval"]["window_tokens"] = 4096
    config["method"] |= {
        "tuner": {"codebook": {"_target_": "qexp.stages.tuner.codebook.Codebook"}},
        "grid": {"_target_": "qexp.stages.grid.additive.Additive", "dim": 8, "codebook_bits": 16},
    }
    assert values(config) == [6.29]
    config["method"]["grid"]["codebook_bits"] = 15
    assert values(config) == [6.64, 6.59]  # two versions of the paper
    config["method"]["grid"]["codebook_bits"] = 8
    assert values(config) == []


def test_groups_of_weights_alone_are_not_those_of_quarot_128g() -> None:
    config = setting("quarot")
    config["bits"] = {"name": "w4a4kv4g128", "weight": 4, "act": 4, "kv": 4, "group": 128}
    assert values(config) == []
    config["method"]["act"] = {"_target_": "qexp.stages.act.per_group.PerGroup", "group": 128}
    assert values(config) == [5.93]


def test_the_embedded_model_has_no_published_number() -> None:
    assert values(setting(model="embedded")) == []


def test_every_row_names_a_known_method_and_its_source() -> None:
    table = published._table()
    assert len(table["rows"]) >= 280
    for row in table["rows"]:
        assert row["method"] in table["methods"], row
        assert len(row["bits"]) == 4 and row["source"] and row["value"] > 1, row


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=gptq", "bits=w4a16"], 5.83),
        (["method=rtn", "bits=w4a16"], 6.11),
        (["method=awq", "bits=w4a16g128"], 5.6),
        (["method=quarot", "bits=w4a4kv4"], 6.1),
        (["method=quarot", "method/solver=rtn", "bits=w4a4kv4"], 8.37),
        (["method=smoothquant", "bits=w8a8kv8"], 5.515),
        (["method=fp16"], 5.47),
        (["method=omniquant_wa", "bits=w4a4kv4"], 14.26),
        (["method=flatquant", "bits=w4a4kv4"], 5.79),
    ],
)
def test_the_recipes_as_shipped_find_their_numbers(overrides: list[str], expected: float) -> None:
    with compose.hydra():
        made = compose.composed([*overrides, "model=llama2_7b", "eval.perplexity=[wikitext2]"])
        stressed = compose.composed([*overrides, "model=llama2_7b", "model.outliers={kind: rotate}", "eval=full"])
    assert expected in values(made)
    assert values(stressed) == []
