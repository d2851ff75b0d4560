"""Packed layers and models against the simulation they stand for, and what they do with what cannot be packed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from packed_models import RECIPES, rounded
from stage_members import member
from torch import Tensor, nn
from toy_models import distance, logits, tokens
from toy_recipes import linear_of, recipe

from qexp.core.errors import UserError
from qexp.core.hadamard import Hadamard
from qexp.core.linear import InputPath, QuantLinear
from qexp.core.maps import Diagonal
from qexp.core.packed import PackedInput, PackedLinear, quantizer_of
from qexp.core.packed_head import PackedEmbedding, PackedHead
from qexp.core.packed_weight import PackedWeight, integer_weight
from qexp.core.words import Quantized
from qexp.engine.packing import PLAIN, check_packable, is_uniform, pack_head, pack_model
from qexp.eval.speed import memory_bytes

# A layer's input differs in the last bits from the simulation's, so a value near a tie may fall to the other side.
BOUND = {16: 1e-5, 8: 1e-2, 4: 5e-2}
SAME = 2e-6  # one layer, the same input: float32 sums in another order


def layer(bits: int, group: int = -1, grid: str = "integer", columns: int = 48, rows: int = 20) -> QuantLinear:
    """Return a quantized linear with a bias and an input path of its own."""
    rng = torch.Generator().manual_seed(bits)
    plain = nn.Linear(columns, rows).requires_grad_(False)
    plain.weight.copy_(torch.randn(rows, columns, generator=rng) * (1 + torch.arange(rows)[:, None]))
    made = QuantLinear(plain, InputPath(1))
    uniform = member("grid", grid, w=bits, g=group)
    params = uniform.fit(plain.weight, None)
    made.install(uniform, Quantized(uniform.encode(plain.weight, params), params))
    return made


def packed(linears: list[QuantLinear]) -> list[PackedLinear]:
    """Return the layers packed together; the first one's input path is everyone's."""
    weight = PackedWeight([integer_weight(each) for each in linears], [each.bias for each in linears])
    source = PackedInput(linears[0].path, weight, [each.out_features for each in linears])
    return [PackedLinear(source, reader) for reader in range(len(linears))]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_a_packed_model_says_what_the_simulation_says(family: str, name: str) -> None:
    method = RECIPES[name]
    view = rounded(family, method)
    simulated = logits(view.model)
    model = pack_model(view, method)
    assert PLAIN not in model.counts()
    assert not [m for m in model.model.modules() if isinstance(m, QuantLinear)]
    assert distance(logits(model.model), simulated) < BOUND[method.act.bits if method.act.bits in BOUND else 8]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [-1, 8, 24])
@pytest.mark.parametrize("grid", ["integer", "integer_symmetric"])
@pytest.mark.parametrize("act", [None, ("per_token", 8), ("per_token_clipped", 4), ("per_token_asymmetric", 5)])
@torch.no_grad()
def test_one_layer_is_exact(bits: int, group: int, grid: str, act: Any) -> None:
    linear = layer(bits, group, grid)
    if act:
        linear.path.act = member("act", act[0], a=act[1]).freeze({})
    x = inputs(2, 5, 48)
    expected = linear(x)
    assert distance(packed([linear])[0](x), expected) < SAME


@pytest.mark.parametrize("size", [64, 48])
@pytest.mark.parametrize("signs", [True, False])
@torch.no_grad()
def test_the_last_hadamard_is_fused_with_the_quantizer(size: int, signs: bool) -> None:
    linear = layer(4, columns=size)
    drawn = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(1), dtype=torch.int8) * 2 - 1
    linear.path.maps = [Diagonal(torch.linspace(0.5, 2, size)), Hadamard(size, drawn if signs else None)]
    linear.path.act = member("act", "per_token", a=8).freeze({})
    x = inputs(6, size)
    expected = linear(x)
    (made,) = packed([linear])
    assert made.kind == "w4a8+hadamard"
    assert distance(made(x), expected) < 1e-2  # the rotation's last bits may move a value near a tie by a step


@torch.no_grad()
def test_an_unknown_quantizer_is_simulated_in_front_of_integer_weights() -> None:
    linear = layer(4)
    linear.path.act = lambda x: x.round()
    x = 3 * inputs(6, 48)
    expected = linear(x)
    (made,) = packed([linear])
    assert quantizer_of(linear.path.act) is None and made.kind == "w4a16"
    assert distance(made(x), expected) < SAME


@torch.no_grad()
def test_readers_of_one_input_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = [layer(4, rows=8), layer(3, rows=16), layer(2, rows=24)]  # bits may differ: all are int4 to the kernel
    linears[1].bias = None
    x, counted = inputs(4, 48), []
    expected = [each(x) for each in linears]
    products = packed(linears)
    original = PackedWeight.times
    monkeypatch.setattr(PackedWeight, "times", lambda self, given: counted.append(1) or original(self, given))
    for _ in range(2):
        assert [distance(made(x), y) < SAME for made, y in zip(products, expected, strict=True)] == [True] * 3
    assert len(counted) == 2


@torch.no_grad()
def test_no_answer_outlives_its_input() -> None:
    q, k = packed([layer(4, rows=8), layer(4, rows=8)])
    x = inputs(4, 48)
    first = q(x).clone()
    x.mul_(2)
    assert not torch.equal(k(x), first) and distance(q(x), 2 * first - q._shared[0].weight.bias[:8]) < 1e-5
    assert torch.equal(q(x), q(x))
    with torch.inference_mode():
        y = inputs(4, 48)
        assert torch.equal(q(y), q(y.clone())) and torch.equal(k(y), k(y.clone()))


@torch.no_grad()
def test_no_tokens_give_no_answers() -> None:
    (made,) = packed([layer(4, rows=8)])
    assert made(torch.empty(2, 0, 48)).shape == (2, 0, 8)


@torch.no_grad()
def test_casting_the_model_leaves_scales_alone() -> None:
    method = RECIPES["w4a8g8"]
    view = rounded("llama", method)
    expected = logits(view.model)
    model = nn.Module.to(pack_model(view, method).model, torch.bfloat16)
    scales = [buffer for name, buffer in model.named_buffers() if name.endswith("w_s0")]
    assert scales and all(scale.dtype == torch.float32 for scale in scales)
    answer = logits(model)
    assert answer.dtype == torch.bfloat16 and distance(answer.float(), expected) < 0.2


@torch.no_grad()
def test_packed_weights_are_small() -> None:
    big = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    method = recipe(grid="integer_symmetric")
    view = rounded("llama", method, **big)
    linear_bytes = 4 * sum(a.weights for a in view.layers)
    rest = memory_bytes(view.model) - linear_bytes
    model = pack_model(view, method).model
    assert memory_bytes(model) - rest < 0.2 * linear_bytes  # 4 of 32 bits, scales, padding


@torch.no_grad()
def test_what_the_kernels_do_not_take_stays_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    method = RECIPES["w4a8_channel"]
    view = rounded("llama", method, intermediate_size=36)
    expected = logits(view.model)
    with caplog.at_level(logging.WARNING, "qexp"):
        model = pack_model(view, method)
    down = [name for name, kernel in model.kernels.items() if kernel == PLAIN]
    assert down == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert all(name in caplog.text for name in down)
    assert distance(logits(model.model), expected) < BOUND[8]


@torch.no_grad()
def test_layers_of_sixteen_bits_stay_as_they_are() -> None:
    method = RECIPES["w4a16"]
    view = rounded("llama", method)
    linear_of(view, "k").grid = None
    expected = logits(view.model)
    model = pack_model(view, method)
    assert [name for name, kernel in model.kernels.items() if kernel == PLAIN] == ["model.layers.0.self_attn.k_proj"]
    assert distance(logits(model.model), expected) < BOUND[16]


@dataclass(frozen=True)
class Squares:
    """A grid whose levels are not evenly spaced, with the integer grid's parameters."""

    bits: int = 4
    group: int = -1
    dim: int = 1

    def check(self, _layer: object) -> None:
        pass

    def fit(self, weight: Tensor, _: Tensor | None) -> dict[str, Tensor]:
        return {"scale": weight.abs().amax(1, keepdim=True) / 49}

    def encode(self, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
        levels = weight / params["scale"]
        return (levels.sign() * levels.abs().sqrt()).round().add(8).clamp(0, 15).to(torch.uint8)

    def decode(self, codes: Tensor, params: dict[str, Tensor]) -> Tensor:
        steps = codes.float() - 8
        return steps * steps.abs() * params["scale"]


def test_only_uniform_grids_are_packed() -> None:
    assert all(is_uniform(member("grid", name, w=4, g=8)) for name in ("integer", "integer_half_step"))
    squares = replace(recipe(), grid=Squares())
    with pytest.raises(UserError, match=r"Squares.*need an integer grid; set eval\.speed=false"):
        check_packable(squares)
    linear = layer(4)
    linear.grid = Squares()
    assert integer_weight(linear) is None


def test_nothing_to_pack_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    method = replace(recipe(), allocation=member("allocation", "none"))
    view = rounded("llama", method)
    before = logits(view.model)
    with caplog.at_level(logging.WARNING, "qexp"):
        model = pack_model(view, method)
    assert "nothing to pack" in caplog.text
    assert torch.equal(logits(model.model, tokens()), before)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "opt"])
@pytest.mark.parametrize("act_bits", [8, 16])
@torch.no_grad()
def test_the_head_goes_to_eight_bits_when_asked(family: str, act_bits: int) -> None:
    method = RECIPES["w4a16"]
    packed_model = pack_model(rounded(family, method), method)
    model, before = packed_model.model, logits(packed_model.model)
    size, tied = memory_bytes(model), model.lm_head.weight is model.get_input_embeddings().weight
    pack_head(packed_model, act_bits)
    assert memory_bytes(model) < size
    assert isinstance(model.get_output_embeddings(), PackedHead)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) == tied
    assert 1e-5 < distance(logits(model), before) < 0.02
    assert logits(nn.Module.to(model, torch.bfloat16)).dtype == torch.bfloat16


def test_a_scaled_embedding_is_not_packed_with_the_head() -> None:
    method = RECIPES["w4a16"]
    with pytest.raises(UserError, match="8-bit head on Linear and Gemma3TextScaledWordEmbedding; need plain ones"):
        pack_head(pack_model(rounded("gemma3", method), method))
