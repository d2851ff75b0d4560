"""Calibration tokens: the papers' samplers call by call, BOS, limits, cache, identity; text from the model itself."""

import json
import logging
import random
from dataclasses import replace

import pytest
import torch
from tiny_lm import BOS, constant_model, tiny_model, word_tokenizer

from qexp.core.errors import UserError
from qexp.core.rng import generator
from qexp.data import calibration
from qexp.data.calibration import Calibration, crop_documents, crops, draw_plan, packed
from qexp.data.generated import Request, draw, sample, silent

GENERATED = Calibration(source="generated", path=None, samples=5, tokens=12, seed=0, bos=True)


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text(" ".join(f"w{i % 40}" for i in range(300)))
    return file


@pytest.fixture
def local(text_file):
    return Calibration(source="local", path=str(text_file), samples=6, tokens=16, seed=0, bos=True)


def request(**changes):
    return replace(Request(samples=6, tokens=16, seed=0, stream="calibration", bos=True), **changes)


def test_crops_start_where_gptqs_loader_starts():
    rng = random.Random(3)
    starts = [rng.randint(0, 100 - 8 - 1) for _ in range(4)]
    rows = crops(torch.arange(100), 4, 8, random.Random(3))
    assert rows[:, 0].tolist() == starts
    assert torch.equal(rows - rows[:, :1], torch.arange(8).expand(4, 8))


def test_too_short_a_text_is_an_error():
    with pytest.raises(UserError, match="has 8 tokens; need more than 8"):
        crops(torch.arange(8), 1, 8, random.Random(0))


def test_c4_draws_are_the_stored_ones():
    lengths = [3, 30, 12, 50, 7, 12, 100]
    plan = draw_plan(lengths.__getitem__, len(lengths), 12, random.Random(0))
    # made with the loop of GPTQ's loader on random.seed(0); documents 2 and 5 have exactly 12 tokens: taken whole
    assert [next(plan) for _ in range(8)] == [(6, 49), (6, 53), (2, 0), (3, 25), (6, 38), (3, 22), (1, 16), (1, 9)]


def test_c4_draws_give_up_without_a_long_document(monkeypatch):
    monkeypatch.setattr(calibration, "PATIENCE", 50)
    with pytest.raises(UserError, match="no document of 12 tokens"):
        next(draw_plan(lambda index: 11, 4, 12, random.Random(0)))


def test_a_document_of_the_exact_length_is_taken_whole():
    assert next(draw_plan(lambda index: 12, 1, 12, random.Random(0))) == (0, 0)


def test_c4_pieces_carry_the_tokenizers_bos_only_where_the_document_starts():
    tokenizer = word_tokenizer(adds_bos=True)
    documents = ["w1 w2", " ".join(f"w{i}" for i in range(20))]
    rows = crop_documents(documents, tokenizer, 40, 10, random.Random(0))
    whole = torch.tensor(tokenizer(documents[1])["input_ids"])
    starts = [next(i for i in range(len(whole)) if torch.equal(whole[i : i + 10], row)) for row in rows]
    assert min(starts) == 0 and max(starts) > 0
    assert [int(row[0] == BOS) for row in rows] == [int(start == 0) for start in starts]


def test_packed_documents_fill_blocks_end_to_end():
    tokenizer = word_tokenizer(adds_bos=False)
    documents = ["w1 w2 w3", " ".join(["w9"] * 50), "w4 w5", "", "w6 w7 w8"] * 4
    rows = packed(documents, tokenizer, 3, 8, seed=42)
    assert rows.shape == (3, 8)
    assert tokenizer.convert_tokens_to_ids("w9") not in rows  # longer than a block: left out
    with pytest.raises(UserError, match="tokens short"):
        packed(documents, tokenizer, 30, 8, seed=42)


def test_local_samples_start_with_bos_and_are_reproducible(local, tmp_path):
    model, tokenizer = tiny_model(), word_tokenizer()
    first = local.load(model, tokenizer, tmp_path / "one", "id")
    again = local.load(model, tokenizer, tmp_path / "two", "id")
    other = replace(local, seed=1).load(model, tokenizer, tmp_path / "one", "id")
    assert first.shape == (6, 16) and first.dtype == torch.int64
    assert (first[:, 0] == BOS).all() and not (first[:, 1:] == BOS).any()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_cache_is_read_the_second_time(local, tmp_path):
    model, tokenizer = tiny_model(), word_tokenizer()
    first = local.load(model, tokenizer, tmp_path, "id")
    assert torch.equal(first, local.load(model, None, tmp_path, "id"))
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(AttributeError):  # another model: not in the cache, so the missing tokenizer is missed
        local.load(model, None, tmp_path, "other")


def test_too_many_tokens_for_the_model_are_cut_with_a_warning(local, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "qexp"):
        tokens = replace(local, tokens=2048).load(tiny_model(positions=64), word_tokenizer(), tmp_path, "id")
    assert tokens.shape == (6, 64)
    assert "64 positions" in caplog.text


def test_none_is_empty(tmp_path):
    none = Calibration(source="none", path=None, samples=0, tokens=8, seed=0, bos=False)
    none.check()
    assert none.load(None, None, tmp_path, "id").shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"source": "c5"}, "did you mean c4"), ({"samples": 0}, "at least 1"), ({"tokens": 1}, "at least 2"),
     ({"source": "local", "path": None}, "calibration.path"), ({"source": "ptb"}, "hub script")],
)  # fmt: skip
def test_mistakes_are_told_before_anything_heavy(change, message):
    with pytest.raises(UserError, match=message):
        replace(GENERATED, **change).check()


def test_identity_has_settings_and_content_but_no_path(local, text_file):
    assert str(text_file) not in json.dumps(local.identity())
    seen = {
        json.dumps(replace(local, **c).identity())
        for c in ({}, {"seed": 1}, {"tokens": 8}, {"bos": False}, {"samples": 2})
    }
    assert len(seen) == 5


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    at = [
        draw(logits, torch.tensor([u], dtype=torch.float64)).item()
        for u in (0.0, 0.09, 0.11, 0.31, 0.59, 0.61, 0.9999999)
    ]
    assert at == [0, 0, 1, 2, 2, 3, 3]


def test_a_token_of_no_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert draw(logits, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert draw(logits, torch.tensor([1 - 1e-16], dtype=torch.float64)).item() == 1


def test_frequencies_follow_the_model():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    model = constant_model(probabilities.log())
    tokens = sample(model, request(samples=64, tokens=65), 0, 64, silent)[:, 1:]
    counts = tokens.flatten().bincount(minlength=4) / tokens.numel()
    assert (counts - probabilities).abs().max() < 5 * (0.25 / tokens.numel()) ** 0.5


def test_the_key_value_cache_gives_what_whole_sequences_give():
    model = tiny_model()
    tokens = sample(model, request(), BOS, 6, silent)
    uniforms = torch.rand(6, 16, generator=generator(0, "generated", "calibration"), dtype=torch.float64)
    logits = model(tokens).logits
    assert (tokens[:, 0] == BOS).all()
    for step in range(1, 16):
        assert torch.equal(tokens[:, step], draw(logits[:, step - 1], uniforms[:, step]))


def test_text_depends_on_seed_and_stream_and_on_nothing_else():
    model = tiny_model()
    base = sample(model, request(), BOS, 6, silent)
    torch.manual_seed(99)
    assert torch.equal(base, sample(model, request(), BOS, 4, silent))
    assert not torch.equal(base, sample(model, request(seed=1), BOS, 6, silent))
    assert not torch.equal(base, sample(model, request(stream="evaluation"), BOS, 6, silent))


def test_without_bos_the_first_token_is_drawn():
    first = sample(tiny_model(), request(samples=64, tokens=2), None, 64, silent)[:, 0]
    assert len(first.unique()) > 10


def test_generated_calibration_goes_through_the_cache_and_reports_progress(tmp_path):
    labels = []

    def progress(label, items):
        labels.append(label)
        return items

    first = GENERATED.load(tiny_model(), word_tokenizer(), tmp_path, "id", progress)
    again = GENERATED.load(tiny_model(), word_tokenizer(), tmp_path, "id", progress)
    assert torch.equal(first, again) and first.shape == (5, 12)
    assert len(labels) == 1 and "sampling text" in labels[0]
