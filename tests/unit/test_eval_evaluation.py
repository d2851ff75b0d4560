"""The evaluation as a whole: sets by protocol, the float baseline and its cache, keys of the record, mistakes."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_lm import BOS, tiny_model, word_tokenizer

from qexp.core.errors import UserError
from qexp.data.calibration import Calibration
from qexp.eval import baseline as baseline_module
from qexp.eval import evaluation as module
from qexp.eval.baseline import fingerprint
from qexp.eval.evaluation import Evaluation

CONF = Path(__file__).parents[2] / "conf"


def from_yaml(**changes):
    """Build the default evaluation from its YAML, as Hydra does."""
    settings = yaml.safe_load((CONF / "eval" / "default.yaml").read_text())
    assert settings.pop("_target_") == "qexp.eval.evaluation.Evaluation"
    return Evaluation(**{**settings, "limit": 3, "window_tokens": 16, **changes})


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text(" ".join(f"w{i * i % 50}" for i in range(200)))
    return file


@pytest.fixture
def local(words):
    return from_yaml(perplexity=["local"], local={"path": str(words), "bos": "every_window"})


def run(evaluation, model, quantized, folder):
    tokenizer = word_tokenizer()
    sets = evaluation.sets(model, tokenizer, folder, "id")
    found = evaluation.baseline(model, tokenizer, sets, folder)
    return evaluation.run(quantized, tokenizer, sets, found)


def rounded(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_((weight * 8).round() / 8)
    return other


def test_a_model_that_is_not_quantized_has_the_float_models_numbers(local, tmp_path):
    model = tiny_model()
    metrics = run(local, model, copy.deepcopy(model), tmp_path).metrics
    assert metrics["perplexity/local"] == metrics["fp/perplexity/local"]
    assert metrics["divergence/kl/local"] == 0.0 and metrics["divergence/top1/local"] == 1.0


def test_metrics_have_the_records_keys_and_the_window_losses_pair(local, tmp_path):
    model = tiny_model()
    results = run(replace(local, perplexity=["local", "generated"]), model, rounded(model), tmp_path)
    expected = {f"{prefix}perplexity/{name}{suffix}" for name in ("local", "generated")
                for prefix in ("", "fp/") for suffix in ("", "/ci95")}  # fmt: skip
    expected |= {f"divergence/{kind}/{name}" for name in ("local", "generated") for kind in ("kl", "top1")}
    assert results.metrics.keys() == expected
    assert {name: len(losses) for name, losses in results.window_losses.items()} == dict.fromkeys(
        ["local", "fp/local", "generated", "fp/generated"], 3
    )
    assert results.metrics["divergence/kl/generated"] > 0
    low, high = results.metrics["perplexity/local/ci95"]
    assert low < results.metrics["perplexity/local"] < high
    json.dumps(results.metrics)


def test_quantizing_in_place_after_the_baseline_does_not_move_the_teacher(local, tmp_path):
    model, tokenizer = tiny_model(), word_tokenizer()
    sets = local.sets(model, tokenizer, tmp_path, "id")
    beside = run(local, model, rounded(model), tmp_path / "other")
    found = local.baseline(model, tokenizer, sets, tmp_path)
    model.load_state_dict(rounded(model).state_dict())
    assert local.run(model, tokenizer, sets, found).metrics == beside.metrics


def test_without_divergence_there_is_none_and_no_hidden_state_on_disk(local, tmp_path):
    from safetensors import safe_open

    model = tiny_model()
    metrics = run(replace(local, divergence=False), model, rounded(model), tmp_path).metrics
    assert not [key for key in metrics if key.startswith("divergence")]
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        assert list(tensors.keys()) == ["losses"]


def test_the_baseline_is_computed_once_per_model_and_windows(local, tmp_path, monkeypatch):
    counts = []
    real = baseline_module._score
    monkeypatch.setattr(baseline_module, "_score", lambda *a: counts.append(1) or real(*a))
    model = tiny_model()
    first, again = (run(local, model, rounded(model), tmp_path).metrics for _ in range(2))
    assert first == again and len(counts) == 1
    run(local, tiny_model(seed=5), rounded(model), tmp_path)  # the same folder, another model
    run(replace(local, limit=2), model, rounded(model), tmp_path)
    assert len(counts) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_the_fingerprint_sees_a_weight_and_not_the_place():
    one, same, other = tiny_model(), tiny_model(), tiny_model()
    same.config._name_or_path = "/somewhere/else"
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(one.half()) != fingerprint(same)


def test_float_accuracies_are_cached_and_reported(tmp_path, monkeypatch):
    answers = iter([{"accuracy/t": 0.75}, {"accuracy/t": 0.5}, {"accuracy/t": 0.25}])
    monkeypatch.setattr(module, "accuracies", lambda *a: next(answers))
    evaluation, model = from_yaml(perplexity=[], tasks=["qexp_grammar"]), tiny_model()
    assert run(evaluation, model, model, tmp_path).metrics == {"accuracy/t": 0.5, "fp/accuracy/t": 0.75}
    assert run(evaluation, model, model, tmp_path).metrics == {"accuracy/t": 0.25, "fp/accuracy/t": 0.75}


def test_nothing_to_measure_measures_nothing(tmp_path):
    none = from_yaml(perplexity=[], tasks=[])
    none.check()
    assert run(none, tiny_model(), tiny_model(), tmp_path).metrics == {}


def test_bos_policies_differ_where_they_say(words):
    tokenizer, made = word_tokenizer(adds_bos=True), {}
    for bos in ("once", "every_window", "none"):
        evaluation = from_yaml(perplexity=["local"], local={"path": str(words), "bos": bos})
        made[bos] = evaluation.sets(tiny_model(), tokenizer, words.parent, "id")["local"]
    bos_at = {bos: (rows == BOS).nonzero().tolist() for bos, rows in made.items()}
    assert bos_at == {"once": [[0, 0]], "every_window": [[0, 0], [1, 0], [2, 0]], "none": []}
    assert made["once"][0, 1:].tolist() == made["none"][0, :-1].tolist() == made["every_window"][0, 1:].tolist()


def test_the_two_c4_protocols_follow_the_papers_and_differ(tmp_path):
    documents = [" ".join(f"w{(i * 7 + j) % 50}" for j in range(10 + i)) for i in range(30)]
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    (tmp_path / "c4-validation.jsonl").write_text(lines)
    tokenizer, made = word_tokenizer(), {}
    for variant in ("new", "legacy"):
        settings = {"path": str(tmp_path), "bos": "once", "variant": variant}
        evaluation = from_yaml(perplexity=["c4"], c4=settings, limit=None)
        made[variant] = evaluation.sets(tiny_model(), tokenizer, tmp_path, "id")["c4"]
    joined = tokenizer(" ".join(documents))["input_ids"]
    assert made["new"].flatten().tolist() == joined[: len(joined) // 16 * 16]
    assert made["legacy"].shape == (256, 16)
    tokens = {tuple(tokenizer(d)["input_ids"][s : s + 16]) for d in documents for s in range(len(d.split()) - 15)}
    assert all(tuple(row) in tokens for row in made["legacy"].tolist())


def test_ptb_new_is_test_by_spaces_and_legacy_is_validation(tmp_path):
    (tmp_path / "ptb.test.txt").write_text("w1 w2\n" * 20)
    (tmp_path / "ptb.valid.txt").write_text("w3 w4\n" * 20)
    firsts = {}
    for variant in ("new", "legacy"):
        settings = {"path": str(tmp_path), "bos": "once", "variant": variant}
        made = from_yaml(perplexity=["ptb"], ptb=settings).sets(tiny_model(), word_tokenizer(), tmp_path, "id")
        firsts[variant] = word_tokenizer().decode(made["ptb"][0, :2])
    assert firsts == {"new": "w1 w2", "legacy": "w3 w4"}


def test_generated_evaluation_text_is_not_the_calibration_text(tmp_path):
    model, tokenizer = tiny_model(), word_tokenizer()
    ours = from_yaml(seed=0).sets(model, tokenizer, tmp_path, "id")["generated"]
    calibration = Calibration(source="generated", path=None, samples=3, tokens=16, seed=0, bos=True)
    theirs = calibration.load(model, tokenizer, tmp_path, "id")
    assert ours.shape == theirs.shape and not torch.equal(ours, theirs)


def test_windows_are_as_long_as_the_model_allows_unless_told(local, tmp_path):
    long = replace(local, window_tokens=None, limit=1)
    assert long.sets(tiny_model(positions=32), word_tokenizer(), tmp_path, "id")["local"].shape == (1, 32)
    with pytest.raises(
        UserError, match=r"exceeds the model's 32 positions; need at most 32; set eval\.window_tokens=32"
    ):
        replace(local, window_tokens=64).sets(tiny_model(positions=32), word_tokenizer(), tmp_path, "id")


def test_a_broken_model_is_warned_about(local, tmp_path, caplog):
    model = tiny_model()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    with caplog.at_level(logging.WARNING, "qexp"):
        run(local, model, broken, tmp_path)
    assert "perplexity/local is nan" in caplog.text
    assert "whole logits" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [({"perplexity": "wikitext2"}, r"eval.perplexity=\[wikitext2\]"),
     ({"perplexity": ["wikitext"]}, "did you mean wikitext2"), ({"perplexity": ["local"]}, "eval.local.path"),
     ({"limit": 0}, "at least 1"), ({"window_tokens": 1}, "at least 2"), ({"tasks": "piqa"}, r"eval.tasks=\[piqa\]"),
     ({"perplexity": ["c4"], "c4": {"path": None, "bos": "twice"}}, "bos='twice' is unknown")],
)  # fmt: skip
def test_mistakes_are_told_before_anything_heavy(change, message):
    with pytest.raises(UserError, match=message):
        from_yaml(**change).check()


def test_identity_has_content_and_conventions_but_no_path(local, words):
    assert str(words) not in json.dumps(local.identity())
    other_bos = replace(local, local={"path": str(words), "bos": "none"})
    changed = [other_bos, replace(local, seed=1), replace(local, limit=2), replace(local, divergence=False)]
    changed.append(replace(local, speed=True))
    assert len({json.dumps(e.identity(), sort_keys=True) for e in [local, *changed]}) == 6
    before = local.identity()
    words.write_text("w1 " * 100)
    assert local.identity() != before


@pytest.mark.parametrize("file", sorted((CONF / "calibration").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_calibration_file_builds_what_it_is_named_after(file):
    settings = yaml.safe_load(file.read_text())
    assert settings.pop("_target_") == "qexp.data.calibration.Calibration"
    assert Calibration(**settings).source == file.stem
