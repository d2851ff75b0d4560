"""The view of each family: the right layers in the right groups and sites, and the same numbers to begin with."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from toy_models import FAMILIES, POST_NORMS, distance, logits, toy, view_of

from qexp.core.errors import UserError
from qexp.core.linear import InputPath, QuantLinear
from qexp.core.maps import Diagonal
from qexp.models.view import ModelView

every_family = pytest.mark.parametrize("family", FAMILIES)
GATED = [name for name in FAMILIES if name != "opt"]


@pytest.mark.parametrize("family", [*FAMILIES, "unknown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_are_those_of_transformers_bit_for_bit(family, dtype):
    model = toy(family, dtype)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # "sdpa" leaves its soft cap out
    before = logits(model)
    after = logits(ModelView(model).model)
    assert torch.equal(after, before) if family != "gemma2" else distance(after, before) < 1e-6
    linears = [m for m in model.modules() if type(m) in (torch.nn.Linear, QuantLinear)]
    assert {type(m) for m in linears[:-1]} == {QuantLinear} and type(linears[-1]) is torch.nn.Linear, "all but the head"


@every_family
def test_float64_toys_are_the_models_they_stand_for(family):
    assert distance(logits(toy(family)).float(), logits(toy(family, torch.float32))) < 1e-5


@every_family
def test_groups_are_the_layers_that_share_an_input_in_forward_order(family):
    view = view_of(family)
    middle = ("gate", "up") if family in GATED else ("up",)
    for block in range(2):
        groups = view.groups(block)
        kinds = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
        assert [group.site for group in groups] == [f"{block}.{kind}" for kind in kinds]
        assert [tuple(a.role for a in g.layers) for g in groups] == [("q", "k", "v"), ("o",), middle, ("down",)]
        for group in groups:
            assert len({id(view.linear(layer.name).path) for layer in group.layers}) == 1
            assert view.linear(group.layers[0].name).path.readers == len(group.layers)
    assert len({id(view.linear(layer.name).path) for layer in view.layers}) == 8
    assert len(view.layers) == 2 * (5 + len(middle)) and len(view.blocks) == 2


@every_family
def test_layers_have_the_shapes_of_the_config(family):
    view = view_of(family)
    config, d = view.config, view.head_size
    q, kv, hidden = config.num_attention_heads * d, view.kv_heads * d, config.hidden_size
    expected = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    expected |= {"gate": (40, hidden), "up": (40, hidden), "down": (hidden, 40)}
    assert {(layer.role, (layer.outputs, layer.inputs)) for layer in view.layers} == {
        (role, shape) for role, shape in expected.items() if role != "gate" or family in GATED
    }
    assert all(view.linear(layer.name).weight.shape == (layer.outputs, layer.inputs) for layer in view.layers)
    assert d == {"qwen3": 16, "llama_tied": 4, "gemma": 8, "gemma2": 8, "gemma3": 8}.get(family, 6)


@every_family
def test_sites_have_the_widths_their_writers_write_and_their_readers_read(family):
    view = view_of(family)
    sites = view.sites("residual", "head_in", "attn_in", "value", "attn_out", "mlp_in", "mlp_mid", "query_key")
    assert len(sites) == 2 + 2 * 6 and len({site.name for site in sites}) == len(sites)
    for site in sites:
        if site.kind == "query_key":
            assert view.door(site.block) is view.model.get_submodule(site.readers[0]).door
            continue
        heads_of_reader = view.config.num_attention_heads * site.head_size
        widths = {view.model.get_submodule(name).weight.shape[1] for name in site.readers}
        assert widths == {heads_of_reader or site.size}
        for writer in site.writers:
            weight = view.model.get_submodule(writer.name).weight
            assert site.size == (weight.shape[1] if writer.kind == "embedding" else weight.shape[0])


@every_family
def test_sites_admit_what_their_writers_can_absorb(family):
    view = view_of(family)
    admits = {kind: view.sites(kind)[0].admits for kind in ("residual", "attn_in", "value", "attn_out", "mlp_mid")}
    assert ("orthogonal" in admits["residual"]) == (family not in POST_NORMS)
    assert ("center" in admits["residual"]) == (family == "opt")
    assert ("diagonal" in admits["value"]) == (family in ("llama_tied", "opt")), "under grouped queries only per head"
    assert admits["attn_in"] == admits["mlp_mid"] == {"diagonal"} and not admits["attn_out"]


def test_an_unknown_architecture_gets_every_linear_by_itself():
    view = view_of("unknown")
    assert view.family is None and view.prefix == "gpt_neox.layers"
    assert [layer.role for layer in view.layers if layer.block == 0] == [
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ]
    assert all(len(group.layers) == 1 for block in range(2) for group in view.groups(block))
    assert view.door(0) is None
    with pytest.raises(UserError, match="gpt_neox"):
        view.sites("attn_in")


def test_an_unknown_architectures_layers_are_in_the_order_of_a_forward():
    assert [layer.role for layer in view_of("phi3").layers if layer.block == 1] == [
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    ]


def test_tied_embeddings_are_untied_once(caplog):
    caplog.set_level(logging.INFO)
    view = view_of("llama_tied")
    before, head, embedding = logits(view.model), view.model.lm_head, view.model.model.embed_tokens
    assert head.weight is embedding.weight
    view.untie()
    own = head.weight
    view.untie()
    assert head.weight is own is not embedding.weight and not own.requires_grad
    assert own.data_ptr() != embedding.weight.data_ptr()
    assert not view.config.tie_word_embeddings
    assert [record.message for record in caplog.records if "untied" in record.message] == [
        "embedding and output head untied: rewrites reach them separately"
    ]
    assert torch.equal(logits(view.model), before)
    assert view.stored_parameters == sum(p.numel() for p in view.model.parameters()) - own.numel()


# The input path


class Counter:
    """An act that doubles and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * x


def counting_path(readers: int = 3) -> tuple[InputPath, Counter]:
    path = InputPath(readers)
    path.act = counter = Counter()
    return path, counter


def test_an_input_is_transformed_once_for_all_readers_and_then_forgotten():
    path, counter = counting_path()
    x = torch.randn(2, 4)
    answers = [path(x) for _ in range(3)]
    assert counter.calls == 1 and all(a is answers[0] for a in answers)
    assert path._source is None and path._answer is None
    path(x)
    assert counter.calls == 2


def test_a_model_keeps_no_input_behind_a_forward():
    view = view_of("llama")
    for layer in view.layers:
        view.linear(layer.name).path.act = Counter()
    logits(view.model)
    for layer in view.layers:
        assert view.linear(layer.name).path.act.calls == 1
        assert view.linear(layer.name).path._source is None


def test_a_reader_called_alone_gets_the_right_answer_each_time():
    path, _ = counting_path()
    x, y = torch.ones(2, 4), torch.full((2, 4), 3.0)
    assert torch.equal(path(x), 2 * x) and torch.equal(path(y), 2 * y) and torch.equal(path(x), 2 * x)
    path.maps.append(Diagonal(torch.full((4,), 5.0)))
    assert torch.equal(path(x), 10 * x), "the answer from before the map was inserted"
    path.act = None
    assert torch.equal(path(x), 5 * x)


def test_an_input_changed_in_place_is_transformed_again():
    path, _ = counting_path()
    x = torch.ones(2, 4)
    path(x)
    x.mul_(7)
    assert torch.equal(path(x), torch.full((2, 4), 14.0))


def test_an_input_under_inference_mode_has_no_version_and_is_right_all_the_same():
    path, _ = counting_path()
    with torch.inference_mode():
        x = torch.ones(2, 4)
        assert torch.equal(path(x), 2 * x)
        x.mul_(7)
        assert torch.equal(path(x), torch.full((2, 4), 14.0))


def test_a_copied_model_has_paths_of_its_own():
    view = view_of("llama")
    first = view.groups(0)[0].layers
    twin = copy.deepcopy(view)
    paths = [twin.linear(layer.name).path for layer in first]
    assert len({id(path) for path in paths}) == 1 and paths[0] is not view.linear(first[0].name).path
    before = logits(view.model)
    paths[0].maps.append(Diagonal(torch.full((24,), 3.0)))
    assert torch.equal(logits(view.model), before) and distance(logits(twin.model), before) > 0.01
    assert twin.door(0) is not view.door(0)
