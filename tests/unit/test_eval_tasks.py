"""Zero-shot tasks: chance and ties, minimal pairs from local files, lm-eval YAMLs, messages. No hub, no task index."""

import json

import pytest
import torch
from tiny_lm import constant_model, table_model, word_tokenizer

from qexp.core import hub
from qexp.core.errors import UserError
from qexp.eval import tasks
from qexp.eval.tasks import GRAMMAR, Plan, accuracies, summarise

SIZE = 64


def plan(names, path=None, limit=None):
    return Plan(tasks=tuple(names), path=None if path is None else str(path), limit=limit, batch=4)


def uniform():
    return constant_model(torch.zeros(SIZE))


@pytest.fixture
def pair_file(tmp_path):
    """Ten pairs; in the good one, w1 follows w0."""
    rows = [{"sentence_good": f"w0 w1 w{5 + i}", "sentence_bad": f"w0 w2 w{5 + i}"} for i in range(10)]
    (tmp_path / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "my_pairs.jsonl"


@pytest.fixture
def yaml_folder(tmp_path):
    """An lm-eval task of three choices whose answer is the third, of equal lengths in characters."""
    data = tmp_path / "docs.json"
    data.write_text("".join(json.dumps({"choices": ["w1", "w2", "w3"], "label": 2}) + "\n" for _ in range(6)))
    config = {
        "task": "three", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "w0", "doc_to_target": "label", "doc_to_choice": "choices",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }  # fmt: skip
    (tmp_path / "three.yaml").write_text(json.dumps(config))
    return tmp_path


def test_ties_go_to_the_first_choice_so_uniform_logits_give_chance(pair_file):
    found = accuracies(uniform(), word_tokenizer(), plan(["my_pairs"], pair_file))
    assert found["accuracy/my_pairs"] == 0.5


def test_a_model_of_nans_gives_chance_too(pair_file):
    found = accuracies(constant_model(torch.full((SIZE,), torch.nan)), word_tokenizer(), plan(["my_pairs"], pair_file))
    assert found["accuracy/my_pairs"] == 0.5


@pytest.mark.parametrize(("word", "expected"), [("w1", 1.0), ("w2", 0.0)])
def test_the_better_sentence_wins(pair_file, word, expected):
    tokenizer, table = word_tokenizer(), torch.zeros(SIZE, SIZE)
    table[tokenizer.convert_tokens_to_ids("w0"), tokenizer.convert_tokens_to_ids(word)] = 3.0
    found = accuracies(table_model(table), tokenizer, plan(["my_pairs"], pair_file.parent))
    assert found == {"accuracy/my_pairs": expected, "accuracy/my_pairs/stderr": 0.0}


def test_grammar_runs_to_the_limit_and_leaves_tokenizer_and_random_state_alone():
    model, tokenizer, state = uniform(), word_tokenizer(), torch.get_rng_state()
    found = accuracies(model, tokenizer, plan([GRAMMAR], limit=8))
    assert found[f"accuracy/{GRAMMAR}"] == 0.5
    assert found[f"accuracy/{GRAMMAR}/stderr"] == pytest.approx((0.25 / 7) ** 0.5)
    assert tokenizer.pad_token is None
    assert torch.equal(state, torch.get_rng_state())


def test_acc_norm_is_acc_when_choices_have_one_length(yaml_folder):
    assert accuracies(uniform(), word_tokenizer(), plan(["three"], yaml_folder)) == {
        "accuracy/three": 0.0, "accuracy/three/norm": 0.0, "accuracy/three/stderr": 0.0,
    }  # fmt: skip
    logits = torch.zeros(SIZE)
    logits[word_tokenizer().convert_tokens_to_ids("w3")] = 1.0
    found = accuracies(constant_model(logits), word_tokenizer(), plan(["three"], yaml_folder))
    assert found["accuracy/three"] == found["accuracy/three/norm"] == 1.0


def test_results_are_named_as_the_record_names_them():
    results = {"a": {"acc,none": 0.6, "acc_norm,none": 0.7}, "b": {"exact_match,none": 1.0}}
    found = summarise(results, {"a": {"effective": 25}, "b": {"effective": 3}})
    assert found == {"accuracy/a": 0.6, "accuracy/a/norm": 0.7, "accuracy/a/stderr": pytest.approx(0.1)}


class Manager:
    all_tasks = ("hellaswag", "piqa")


def test_an_unknown_task_gets_the_nearest_names(monkeypatch):
    monkeypatch.setattr(tasks, "hub_manager", Manager)
    with pytest.raises(UserError, match=r"'helaswag'; need an lm-eval task, hellaswag"):
        plan(["helaswag"]).check()


def test_a_hub_task_without_the_hub_fails_at_once(monkeypatch):
    monkeypatch.setattr(tasks, "hub_manager", Manager)
    monkeypatch.setattr(hub, "hub_answers", lambda endpoint: False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(
        UserError, match=r"task 'piqa'.* the hub, which does not answer.*eval\.tasks=\[<of qexp_grammar>\]"
    ):
        plan([GRAMMAR, "piqa"]).check()


def test_local_tasks_ask_for_no_hub_and_no_index(monkeypatch, pair_file):
    monkeypatch.setattr(tasks, "hub_manager", None)
    plan([GRAMMAR, "my_pairs"], pair_file).check()
    plan([], None).check()


def test_a_wrong_path_and_a_path_without_names_are_mistakes(tmp_path, pair_file):
    with pytest.raises(UserError, match="does not exist"):
        plan([GRAMMAR], tmp_path / "nowhere").check()
    with pytest.raises(UserError, match="need names: my_pairs, qexp_grammar"):
        plan([], pair_file).check()


def test_pairs_without_the_two_sentences_are_a_mistake(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"sentence_good": "w0"}\n')
    with pytest.raises(UserError, match="need sentence_good and sentence_bad"):
        accuracies(uniform(), word_tokenizer(), plan(["bad"], tmp_path))


def test_identity_follows_names_limit_and_content(pair_file):
    seen = [plan(["my_pairs"], pair_file).identity(), plan(["my_pairs"], pair_file, limit=3).identity()]
    pair_file.write_text(pair_file.read_text()[:60].split("\n")[0])
    seen.append(plan(["my_pairs"], pair_file).identity())
    assert len({json.dumps(identity) for identity in seen}) == 3
    assert str(pair_file.parent) not in json.dumps(seen)
