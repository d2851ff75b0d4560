"""A cache of packed codes against fake quantization in the attention door."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_models import rounded
from stage_members import member
from toy_models import distance, logits, tokens
from toy_recipes import recipe
from transformers import DynamicCache

from qexp.core.method import Method
from qexp.core.packed_kv import KvCodec, codec_of
from qexp.engine.packing import PackedModel, pack_model
from qexp.models.packed_cache import PackedKvCache

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "opt")  # grouped queries, QK-norm, soft cap, windows, no rotary
CLOSE = 1e-5


def method_of(kv: str = "per_head", bits: int = 4, rotated: bool = True) -> Method:
    transforms = ("fold_norm", "hadamard") if rotated else ()
    return replace(recipe(*transforms, grid="integer_symmetric", w=4), kv=member("kv", kv, kv=bits))


def packed_of(family: str, method: Method) -> PackedModel:
    return pack_model(
        rounded(family, method, head_dim=8) if family != "opt" else rounded(family, method, num_attention_heads=3),
        method,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotated", [True, False])
@torch.no_grad()
def test_a_prompt_and_its_continuation_are_those_of_fake_quantization(family: str, rotated: bool) -> None:
    packed, ids = packed_of(family, method_of(rotated=rotated)), tokens()
    expected, cache = logits(packed.model, ids), packed.new_cache()
    assert isinstance(cache, PackedKvCache)
    parts = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
    answers = [packed.model(part, past_key_values=cache, use_cache=True).logits for part in parts]
    assert distance(torch.cat(answers, dim=1), expected) < CLOSE
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kv", ["per_head", "per_head_clipped"])
@torch.no_grad()
def test_every_width_generates_the_same_tokens(bits: int, kv: str) -> None:
    packed, ids = packed_of("llama", method_of(kv, bits)), tokens(count=2, length=4)
    how = {"max_new_tokens": 8, "do_sample": False}
    simulated = packed.model.generate(ids, use_cache=False, **how)
    cache = packed.new_cache()
    assert torch.equal(packed.model.generate(ids, past_key_values=cache, **how), simulated)
    values, heads = 2 * 2 * cache.get_seq_length(), 2 * 2  # blocks x (k, v), sequences x heads of 8
    assert cache.nbytes() == values * heads * (8 * bits // 8 + 4)


@torch.no_grad()
def test_beams_crops_and_copies_keep_keys_and_values_together() -> None:
    packed, ids = packed_of("llama", method_of()), tokens(count=2)
    (layer, *_), model = (cache := packed.new_cache()).layers, packed.model
    model(ids, past_key_values=cache)
    before = [part.clone() for codes in layer.stored for part in codes]

    def parts() -> list[torch.Tensor]:
        return [part for codes in layer.stored for part in codes]

    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(now, old.flip(0)) for now, old in zip(parts(), before, strict=True))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2]))
    assert all(torch.equal(now, old[:1]) for now, old in zip(parts(), before, strict=True))
    cache.crop(-4)
    assert cache.get_seq_length() == ids.shape[1] - 4
    again = model(ids[:1, -4:], past_key_values=cache).logits
    assert distance(again, logits(model, ids[:1])[:, -4:]) < CLOSE
    layer.offload()
    layer.prefetch()
    with pytest.raises(ValueError, match="minus the number"):
        layer.crop(3)
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes()) == (0, 0)


@torch.no_grad()
def test_a_failed_forward_leaves_nothing_behind() -> None:
    packed, ids = packed_of("llama", method_of()), tokens()
    expected = logits(packed.model, ids)
    cache = packed.new_cache()
    cache.layers[0].update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    assert torch.equal(logits(packed.model, ids), expected)


@torch.no_grad()
def test_keys_changed_on_the_way_are_refused() -> None:
    packed = packed_of("llama", method_of())
    door, cache = packed.doors[0], packed.new_cache()
    keys, values = cache.layers[0].update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    from qexp.models.attention import attention

    module = packed.model.model.layers[0].self_attn
    assert module.door is door
    with pytest.raises(RuntimeError, match="use another cache"):
        attention(module, torch.randn(1, 4, 3, 8), keys.clone(), values, None)


def test_a_codec_is_believed_only_if_it_computes_the_same() -> None:
    whole = member("kv", "per_head", kv=4, g=-1)
    assert codec_of(whole, 16) == KvCodec(4, False, 1.0, 0)
    assert codec_of(replace(whole, group=8), 16) == KvCodec(4, False, 1.0, 8)
    assert codec_of(replace(whole, symmetric=True), 16) == KvCodec(4, True, 1.0, 0)
    assert codec_of(replace(whole, bits=3), 16) is None and codec_of(member("kv", "none"), 16) is None

    class Sloppy(type(whole)):  # type: ignore[misc]
        def __call__(self, k_BASE: torch.Tensor, v_BASE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().__call__(k_BASE, 1.01 * v_BASE)

    assert codec_of(Sloppy(bits=4, symmetric=False, clip=1.0, group=-1, pre_rope=False), 16) is None


def test_without_kv_bits_the_cache_is_transformers_own(caplog: pytest.LogCaptureFixture) -> None:
    plain = replace(method_of(rotated=False), kv=member("kv", "none"))
    assert type(packed_of("llama", plain).new_cache()) is DynamicCache
    three = packed_of("llama", method_of(bits=3))
    assert type(three.new_cache()) is DynamicCache and "no packed form" in caplog.text
