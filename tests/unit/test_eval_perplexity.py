"""Windows, perplexity, logits in pieces, divergence: closed forms on a model that is a table (evaluation.md 6)."""

import logging
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_lm import table_model, tiny_model

from qexp.core.errors import UserError
from qexp.data.generated import silent
from qexp.eval import perplexity as module
from qexp.eval.divergence import Teacher, divergence, frozen, score_windows
from qexp.eval.perplexity import Loop, interval, perplexity, reader, windows

CPU = torch.device("cpu")


def loop(batch=2):
    return Loop(batch, CPU, silent)


def score(model, ids, batch=2):
    return score_windows(reader(model, ids[:1]), ids, None, loop(batch), "x").losses


@pytest.fixture
def ids():
    return torch.randint(64, (5, 24), generator=torch.Generator().manual_seed(1))


def test_windows_drop_the_tail():
    assert windows(torch.arange(11), 3, None, "x").tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_every_window_starts_with_bos_and_no_token_is_lost():
    assert windows(torch.arange(1, 8), 3, 0, "x").tolist() == [[0, 1, 2], [0, 3, 4], [0, 5, 6]]


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(UserError, match="text of local has 5 tokens; need one window of 8"):
        windows(torch.arange(5), 8, None, "local")


def test_perplexity_is_the_closed_form_on_three_windows():
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) * 2
    ids = torch.tensor([[0, 1, 2, 3], [4, 4, 4, 4], [7, 0, 5, 6]])
    losses = [-sum(table[a].log_softmax(0)[b].item() for a, b in pairwise(w)) / 3 for w in ids.tolist()]
    found = score(table_model(table), ids)
    assert found == pytest.approx(losses, abs=2e-5)  # the norm's epsilon
    assert perplexity(found) == pytest.approx(math.exp(sum(losses) / 3), rel=2e-5)


def test_perplexity_does_not_depend_on_batch_size_or_pieces(ids, monkeypatch):
    model = tiny_model()
    base = score(model, ids, batch=1)
    assert score(model, ids, batch=5) == pytest.approx(base, rel=1e-6)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 64 * 7)
    assert score(model, ids, batch=1) == pytest.approx(base, rel=1e-6)


def test_losses_are_those_of_transformers(ids):
    model = tiny_model()
    expected = [model(row[None], labels=row[None]).loss.item() for row in ids]
    assert score(model, ids) == pytest.approx(expected, rel=1e-5)


def test_logits_are_made_in_pieces_when_that_is_right(ids):
    split = reader(tiny_model(), ids[:1])
    assert split.run(ids).shape == (5, 24, 16)


def test_a_model_that_scales_its_logits_is_read_whole_with_a_warning(ids, caplog):
    model = tiny_model()
    model.register_forward_hook(lambda _m, _a, out: replace(out, logits=out.logits * 0.5))
    with caplog.at_level(logging.WARNING, "qexp"):
        found = score(model, ids)
    assert "whole logits" in caplog.text
    expected = [torch.nn.functional.cross_entropy(model(r[None]).logits[0, :-1], r[1:]).item() for r in ids]
    assert found == pytest.approx(expected, rel=1e-5)


def test_logit_softcapping_is_applied(ids):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    llama = tiny_model().config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {key: llama[key] for key in keys} | {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5}
    config = Gemma2Config(**sizes, final_logit_softcapping=0.5)
    model = Gemma2ForCausalLM(config).eval()
    split = reader(model, ids[:1])
    assert split.softcap == 0.5 and split.run(ids).shape[-1] == 16
    assert score(model, ids) == pytest.approx([model(r[None], labels=r[None]).loss.item() for r in ids], rel=1e-4)


def teacher_of(model, ids, tmp_path, batch=2):
    from safetensors.torch import save_file

    source = reader(model, ids[:1])
    hidden = torch.cat([source.run(ids[i : i + batch]) for i in range(0, len(ids), batch)]).detach()
    save_file({"hidden": hidden}, tmp_path / "t.safetensors")
    return Teacher(frozen(source), tmp_path / "t.safetensors")


def test_a_model_diverges_from_itself_by_exactly_nothing(ids, tmp_path):
    model = tiny_model()
    teacher = teacher_of(model, ids, tmp_path)
    scores = score_windows(reader(model, ids[:1]), ids, teacher, loop(), "x")
    assert scores.kl == [0.0] * 5
    assert scores.top1 == [1.0] * 5
    assert scores.losses == score(model, ids)  # bit for bit, with and without teacher


def test_divergence_is_the_closed_form(ids, tmp_path):
    float_model, other = tiny_model(), tiny_model(seed=1)
    scores = score_windows(reader(other, ids[:1]), ids, teacher_of(float_model, ids, tmp_path), loop(), "x")
    p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (float_model, other))
    assert scores.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean(-1).tolist(), rel=1e-5)
    assert scores.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean(-1).tolist())


def test_the_teacher_keeps_its_head_when_the_models_changes(ids, tmp_path):
    model = tiny_model()
    teacher = teacher_of(model, ids, tmp_path)
    before = model(ids).logits[:, :-1].detach().double().log_softmax(-1)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    scores = score_windows(reader(model, ids[:1]), ids, teacher, loop(), "x")
    after = model(ids).logits[:, :-1].detach().double().log_softmax(-1)
    assert scores.kl == pytest.approx((before.exp() * (before - after)).sum(-1).mean(-1).tolist(), rel=1e-5)


def test_a_masked_token_does_not_make_divergence_nan():
    p = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert divergence(p, p).item() == 0.0


def test_the_interval_brackets_and_narrows_and_is_seeded():
    few = [3.0 + 0.1 * math.sin(i) for i in range(10)]
    many = few * 20
    (low, high), (low_many, high_many) = interval(few, 0), interval(many, 0)
    assert low < perplexity(few) < high
    assert (high_many - low_many) < (high - low) / 3
    assert interval(few, 0) == [low, high] and interval(few, 1) != [low, high]


def test_the_interval_is_that_of_scipy():
    import numpy
    from scipy.stats import bootstrap

    losses = numpy.random.default_rng(0).normal(3.0, 0.2, 40)
    theirs = bootstrap(
        (losses,), lambda x, axis: numpy.exp(x.mean(axis)), method="percentile", rng=5
    ).confidence_interval
    assert interval(list(losses), 0) == pytest.approx([theirs.low, theirs.high], rel=5e-3)


@pytest.mark.parametrize(("losses", "expected"), [([1e4], math.inf), ([math.inf], math.inf)])
def test_a_broken_model_has_infinite_perplexity(losses, expected):
    assert perplexity(losses) == expected
    assert math.isnan(perplexity([math.nan, 1.0]))
