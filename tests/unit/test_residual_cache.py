"""KIVI's cache of packed codes and exact recent tokens, against the simulated forward and against a cache of floats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from packed_models import rounded
from stage_members import member
from torch import Tensor
from toy_models import distance, logits, tokens
from toy_recipes import recipe
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qexp import compose
from qexp.core.build import build
from qexp.core.cache import cache_folder
from qexp.core.errors import UserError
from qexp.core.method import Method
from qexp.core.packed_kv import codec_of
from qexp.core.packed_residual import ResidualCodec, residual_codec_of
from qexp.core.stages import Kv
from qexp.engine.blocks import activate
from qexp.engine.packing import PackedModel, pack_model
from qexp.models.attention import Door
from qexp.models.packed_cache import PackedKvCache
from qexp.models.residual_cache import ResidualKvLayer
from qexp.models.view import ModelView

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "opt")  # grouped queries, QK-norm, soft cap, windows, no rotary
CLOSE = 1e-5
R = 8


def method_of(bits: int = 4, rotated: bool = False, **keys: Any) -> Method:
    transforms = ("fold_norm", "hadamard") if rotated else ()
    kv = replace(member("kv", "kivi", kv=bits), **{"group": 8, "residual_tokens": R, **keys})
    return replace(recipe(*transforms, grid="integer_symmetric", w=4), kv=kv)


def packed_of(family: str, method: Method) -> PackedModel:
    keys = {"num_attention_heads": 3} if family == "opt" else {"head_dim": 8}
    return pack_model(rounded(family, method, **keys), method)


def layer_of(bits: int = 4, residual: int = R) -> ResidualKvLayer:
    return ResidualKvLayer(ResidualCodec(bits, 8, residual), Door())


def drawn(length: int, seed: int, heads: int = 2, size: int = 16) -> Tensor:
    return torch.randn(2, heads, length, size, generator=torch.Generator().manual_seed(seed))


class FloatLayer(DynamicLayer):
    """The reference: every key and value as a float, those of the past quantized each time they are read."""

    def __init__(self, kv: Any) -> None:
        super().__init__()
        self.kv = kv

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        past = self.get_seq_length()
        k, v = super().update(key_states, value_states)
        k_hat, v_hat = self.kv(k, v)
        j = torch.arange(k.shape[2])[:, None]
        R = self.kv.residual_tokens
        return torch.where(j < past // R * R, k_hat, k), torch.where(j < past - R, v_hat, v)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotated", [True, False])
@torch.no_grad()
def test_token_by_token_it_is_the_simulated_forward(family: str, rotated: bool) -> None:
    packed, ids = packed_of(family, method_of(rotated=rotated)), tokens(2, 3 * R + 3)
    expected, cache = logits(packed.model, ids), packed.new_cache()
    assert isinstance(cache, PackedKvCache) and isinstance(cache.layers[0], ResidualKvLayer)
    answers = [packed.model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(1, dim=1)]
    assert distance(torch.cat(answers, dim=1), expected) < CLOSE
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@torch.no_grad()
def test_generation_is_that_of_a_cache_of_floats(family: str, bits: int) -> None:
    method = method_of(bits)
    packed, ids = packed_of(family, method), tokens(2, 2 * R + 3)
    how = {"max_new_tokens": 2 * R, "min_new_tokens": 2 * R, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    ours = packed.model.generate(ids, past_key_values=packed.new_cache(), **how)
    for door in packed.doors:
        door.kv = None
    floats = DynamicCache()
    floats.layers, floats.layer_class_to_replicate = [FloatLayer(method.kv) for _ in packed.doors], None
    expected = packed.model.generate(ids, past_key_values=floats, **how)
    assert torch.equal(ours.sequences, expected.sequences)
    assert distance(torch.stack(ours.logits), torch.stack(expected.logits)) < CLOSE
    exact = packed.model.generate(ids, **how)
    assert distance(torch.stack(ours.logits[1:]), torch.stack(exact.logits[1:])) > 1e-4


@torch.no_grad()
def test_padding_on_the_left_is_refused() -> None:
    packed, ids = packed_of("llama", method_of()), tokens(2, 8)
    ids[0, :2] = 2
    with pytest.raises(UserError, match="padded on the left"):
        packed.model.generate(
            ids, attention_mask=(ids != 2).long(), past_key_values=packed.new_cache(), max_new_tokens=2
        )


@torch.no_grad()
def test_a_prompt_is_attended_to_exactly() -> None:
    packed, ids = packed_of("llama", method_of(2)), tokens(2, 3 * R + 3)
    got = packed.model(ids, past_key_values=packed.new_cache(), use_cache=True).logits
    for door in packed.doors:
        door.kv = None
    assert torch.equal(got, logits(packed.model, ids))


@pytest.mark.parametrize("prompt", [1, 5, R, 2 * R + 3])
def test_what_is_exact_after_each_token_and_what_is_quantized_never_changes(prompt: int) -> None:
    layer, kv = layer_of(), method_of().kv
    k, v, before = drawn(40, 0), drawn(40, 1), []
    steps = [prompt, *[1] * (40 - prompt)]
    for T in torch.tensor(steps).cumsum(0).tolist():
        start = layer.get_seq_length()
        layer.update(k[:, :, start:T], v[:, :, start:T])
        keys, values = layer.recent
        assert (keys.shape[2], values.shape[2], layer.get_seq_length()) == (T % R, min(T, R), T)
        assert torch.equal(keys, k[:, :, T - T % R : T]) and torch.equal(values, v[:, :, max(0, T - R) : T])
        parts = [part for codes in layer.coded if codes is not None for part in codes]
        assert all(torch.equal(now[:, :, : old.shape[2]], old) for now, old in zip(parts, before, strict=False))
        before = [part.clone() for part in parts] if len(parts) == 6 else []
    k_hat, v_hat = kv(k, v)
    assert torch.equal(layer.codec.decode_keys(layer.coded[0], k.dtype), k_hat)
    assert torch.equal(layer.codec.decode_values(layer.coded[1], v.dtype), v_hat[:, :, :-R])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_codes_two_halves_a_group_and_the_exact_rest(bits: int) -> None:
    layer, T = layer_of(bits), 3 * R + 5
    layer.update(drawn(T, 0), drawn(T, 1))
    sequences, exact, coded = 2 * 2, T % R + R, 2 * T - T % R - R
    assert layer.nbytes() == sequences * 16 * (exact * 4 + coded * (bits + 32 / 8) / 8)
    assert sum(part.untyped_storage().nbytes() for part in layer.tensors()) == layer.nbytes(), "no views of a prompt"


def test_beams_and_copies_keep_keys_and_values_together() -> None:
    layer, T = layer_of(), 2 * R + 3
    layer.update(drawn(T, 0), drawn(T, 1))
    before = [part.clone() for part in layer.tensors()]
    layer.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(now, old.flip(0)) for now, old in zip(layer.tensors(), before, strict=True))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([2]))
    assert all(torch.equal(now, old[:1]) for now, old in zip(layer.tensors(), before, strict=True))
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes(), layer.tensors()) == (0, 0, [])


@torch.no_grad()
def test_beam_search_runs_and_is_that_of_a_cache_of_floats() -> None:
    method = method_of(4)
    packed, ids = packed_of("llama", method), tokens(2, R + 3)
    how = {"max_new_tokens": 2 * R, "num_beams": 3, "do_sample": False}
    ours = packed.model.generate(ids, past_key_values=packed.new_cache(), **how)
    for door in packed.doors:
        door.kv = None
    floats = DynamicCache()
    floats.layers, floats.layer_class_to_replicate = [FloatLayer(method.kv) for _ in packed.doors], None
    assert torch.equal(ours, packed.model.generate(ids, past_key_values=floats, **how))


def test_crop_takes_back_only_what_is_not_quantized() -> None:
    layer, k, v = layer_of(), drawn(2 * R, 0), drawn(2 * R, 1)
    layer.update(k[:, :, : R - 1], v[:, :, : R - 1])
    layer.crop(-3)
    layer.crop(0)
    assert layer.get_seq_length() == R - 4 and torch.equal(layer.recent[0], k[:, :, : R - 4])
    with pytest.raises(ValueError, match="minus the number"):
        layer.crop(3)
    layer.update(k[:, :, R - 4 :], v[:, :, R - 4 :])
    with pytest.raises(ValueError, match="quantized tokens, which cannot be undone"):
        layer.crop(-1)
    assert not layer.is_croppable


def test_a_codec_is_believed_only_if_it_computes_the_same() -> None:
    kv = member("kv", "kivi", kv=4)
    assert residual_codec_of(kv, 64) == ResidualCodec(4, 32, 128) and codec_of(kv, 64) is None
    assert residual_codec_of(replace(kv, simulate="all"), 64) == ResidualCodec(4, 32, 128)
    assert residual_codec_of(replace(kv, bits=3), 64) is None
    assert residual_codec_of(replace(kv, group=4), 64) is None
    assert residual_codec_of(kv, 48) is None
    assert residual_codec_of(member("kv", "per_head", kv=4), 64) is None

    class Sloppy(type(kv)):  # type: ignore[misc]
        def __call__(self, k_BASE: Tensor, v_BASE: Tensor) -> tuple[Tensor, Tensor]:
            return super().__call__(k_BASE, 1.01 * v_BASE)

    assert residual_codec_of(Sloppy(bits=4, group=8, residual_tokens=8, simulate="all"), 64) is None


def test_without_a_packed_form_the_cache_is_transformers_own(caplog: pytest.LogCaptureFixture) -> None:
    three = packed_of("llama", method_of(bits=3))
    assert type(three.new_cache()) is DynamicCache and "no packed form" in caplog.text


def packed_embedded(kv: Kv) -> PackedModel:
    """Return the embedded model with float weights and a packed cache."""
    method = replace(recipe(w=16), kv=kv, allocation=member("allocation", "none"))
    with compose.hydra():
        source = build(compose.composed(["model=embedded"])["model"], "model")
    view = ModelView(source.load("cpu", cache_folder())[0])
    activate(view, range(len(view.blocks)), method)
    return pack_model(view, method)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
@torch.no_grad()
def test_the_embedded_model_generates_what_a_cache_of_floats_does(bits: int) -> None:
    kv = replace(member("kv", "kivi", kv=bits), residual_tokens=32)
    packed = packed_embedded(kv)
    ids = torch.randint(3, packed.model.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 70, "min_new_tokens": 70, "do_sample": False}
    ours = packed.model.generate(ids, past_key_values=packed.new_cache(), **how)
    for door in packed.doors:
        door.kv = None
    floats = DynamicCache()
    floats.layers, floats.layer_class_to_replicate = [FloatLayer(kv) for _ in packed.doors], None
    assert torch.equal(ours, packed.model.generate(ids, past_key_values=floats, **how))


@pytest.mark.slow
@torch.no_grad()
def test_four_bits_at_2048_tokens_of_the_embedded_model() -> None:
    """The same tokens as fake quantization without a cache, in less than a third of the bytes of float16."""
    packed = packed_embedded(member("kv", "per_head", kv=4))
    ids = torch.randint(3, packed.model.config.vocab_size, (1, 2024), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    cache = packed.new_cache()
    ours = packed.model.generate(ids, past_key_values=cache, **how)
    assert torch.equal(ours, packed.model.generate(ids, use_cache=False, **how))
    config, stored = packed.model.config, cache.get_seq_length()
    assert stored == 2047  # the last token was chosen, not read
    float16 = config.num_hidden_layers * 2 * stored * config.num_key_value_heads * config.head_dim * 2
    assert cache.nbytes() <= 0.32 * float16


def bytes_ratio(kv: str, bits: int, context: int) -> float:
    """Return the bytes of a cache over those of 16-bit keys and values, on the shape of the embedded model."""
    from qexp.engine.packing import _codec

    method = replace(recipe(), kv=member("kv", kv, kv=bits))
    codec = _codec(method, 32)
    packed = PackedModel(None, {}, codec, [Door()])  # type: ignore[arg-type]
    cache = packed.new_cache()
    k, v = (torch.randn(1, 2, context, 32).half() for _ in range(2))
    cache.update(k, v, 0)
    return cache.nbytes() / (k.nbytes + v.nbytes)


@pytest.mark.parametrize(
    ("kv", "bits", "expected"),
    [("kivi", 2, 0.2129), ("kivi", 4, 0.3340), ("per_head", 4, 0.3125), ("per_head", 2, 0.1875)],
)
def test_bytes_at_2048_tokens_in_heads_of_32(kv: str, bits: int, expected: float) -> None:
    assert bytes_ratio(kv, bits, 2048) == pytest.approx(expected, abs=1e-4)
