"""What SmoothQuant's and AWQ's factors must be (methods/smoothquant.md and methods/awq.md, section 6)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from stage_members import member
from torch import Tensor
from toy_models import distance, logits, tokens, view_of
from toy_recipes import recipe, scene_of, stream_into, transform, transform_named

from qexp.core.errors import UserError
from qexp.core.maps import Diagonal, LinearMap
from qexp.core.rewrite import reader_weight
from qexp.core.rng import generator
from qexp.core.words import Site, Stats
from qexp.engine import transforming
from qexp.engine.solving import plan_of
from qexp.engine.transforming import SiteSurroundings, transform_block
from qexp.models.view import ModelView

NORMED = ("attn_in", "mlp_in")


def maxima(view: ModelView, kind: str, block: int = 0) -> tuple[Tensor, Tensor]:
    """Return max|X_j| in front of any online map, and max|W_:j| over all readers without the online maps' share."""
    site = next(s for s in view.sites(kind) if s.block == block)
    kept: list[Tensor] = []
    first = view.linear(site.readers[0])
    handle = first.register_forward_pre_hook(lambda _module, args: kept.append(args[0].flatten(0, -2).abs().amax(0)))
    logits(view.model)
    handle.remove()
    eye = Diagonal(torch.ones(site.size).double())
    weights = [reader_weight(view.linear(name), eye, True) for name in site.readers]
    return kept[0], torch.cat(weights).abs().amax(0)


def smoothed(view: ModelView, alpha: float, *before: str) -> ModelView:
    return transform(view, recipe(*before, "smooth", smooth={"alpha": alpha}), tokens())


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("kind", NORMED)
def test_half_way_activations_and_weights_meet(family, kind):
    x_max, w_max = maxima(view_of(family), kind)
    x_after, w_after = maxima(smoothed(view_of(family), 0.5), kind)
    torch.testing.assert_close(x_after, (x_max * w_max).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(w_after, x_after, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("kind", NORMED)
def test_at_the_ends_one_side_becomes_even(family, kind):
    x_after, _ = maxima(smoothed(view_of(family), 1.0), kind)
    torch.testing.assert_close(x_after, torch.ones_like(x_after), rtol=1e-5, atol=0)
    _, w_after = maxima(smoothed(view_of(family), 0.0), kind)
    torch.testing.assert_close(w_after, torch.ones_like(w_after), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", NORMED)
def test_statistics_are_those_of_the_site_also_in_front_of_online_maps(kind):
    """Gemma's R1 runs online behind the norm; the diagonal is folded into the norm, so its maxima count."""
    view = smoothed(view_of("gemma3"), 1.0, "fold_norm", "hadamard")
    assert len(view.linear(next(s for s in view.sites(kind)).readers[0]).path.maps) == 1
    x_after, _ = maxima(view, kind)
    torch.testing.assert_close(x_after, torch.ones_like(x_after), rtol=1e-5, atol=0)


def test_more_calibration_never_lowers_a_maximum():
    few, more = view_of("llama"), view_of("llama")
    for view, ids in ((few, tokens(2)), (more, torch.cat([tokens(2), tokens(2, seed=7)]))):
        transform(view, recipe("smooth", smooth={"alpha": 1.0}), ids)
    plain = view_of("llama").blocks[0].input_layernorm.weight
    s_few, s_more = (plain / view.blocks[0].input_layernorm.weight for view in (few, more))
    assert (s_more >= s_few * (1 - 1e-6)).all() and (s_more > s_few * 1.01).any()


@dataclass
class Layer:
    """A site of one linear, as a transform sees it."""

    X_TI: Tensor
    W_OI: Tensor
    bits: int = 3

    @property
    def weights(self) -> list[Tensor]:
        return [self.W_OI]

    @property
    def stats(self) -> Stats:
        X = self.X_TI
        return Stats(len(X), X.T @ X / len(X), X.amin(0), X.amax(0), X.abs().mean(0), X)

    def damage(self, candidate: LinearMap) -> float:
        """Rounding with one scale per 128 columns."""
        grid = member("grid", "integer", w=self.bits, g=min(128, self.W_OI.shape[1]))
        W = candidate.dual(self.W_OI)
        params = grid.fit(W, None)
        rounded = grid.decode(grid.encode(W, params), params)
        return float((candidate.apply(self.X_TI) @ rounded.T - self.X_TI @ self.W_OI.T).pow(2).mean())


SITE = Site("0.mlp_in", "mlp_in", 0, 0, (), (), frozenset({"diagonal"}))


def layer(loud: dict[int, float], size: int = 128, tokens: int = 512) -> Layer:
    rng = generator(0, "layer")
    X_TI, W_OI = torch.randn(tokens, size, generator=rng), torch.randn(96, size, generator=rng) / size**0.5
    for channel, factor in loud.items():
        X_TI[:, channel] *= factor
    return Layer(X_TI, W_OI)


def test_smoothing_wins_ten_decibels_on_loud_channels():
    """1 % of the channels 100 times larger, W8A8 per token, alpha 0.5."""
    one = layer({7: 100.0, 90: 100.0}, size=200)
    act, grid = member("act", "per_token", a=8).freeze({}), member("grid", "integer_symmetric", w=8, g=-1)

    def error(map: LinearMap) -> float:
        W, X = map.dual(one.W_OI), map.apply(one.X_TI)
        params = grid.fit(W, None)
        return float((act(X) @ grid.decode(grid.encode(W, params), params).T - one.X_TI @ one.W_OI.T).pow(2).mean())

    change = transform_named("smooth", alpha=0.5).edit(SITE, one, generator(0))
    assert error(Diagonal(torch.ones(200))) > 10 * error(change.map)


def test_a_silent_channel_is_left_alone():
    one = layer({3: 0.0})
    one.W_OI[:, 5] = 0
    factor = 1 / transform_named("smooth", alpha=0.85).edit(SITE, one, generator(0)).map.a
    assert factor[3] == factor[5] == 1 and factor.isfinite().all() and (factor > 0).all()


def test_alpha_auto_is_the_best_of_its_candidates():
    one = layer({7: 100.0})
    auto = transform_named("smooth", alpha="auto").edit(SITE, one, generator(0))
    fixed = [transform_named("smooth", alpha=0.3 + 0.05 * i).edit(SITE, one, generator(0)) for i in range(14)]
    assert one.damage(auto.map) == min(one.damage(change.map) for change in fixed)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "best"])
def test_an_alpha_that_means_nothing_is_refused(alpha):
    with pytest.raises((UserError, ValueError)):
        transform_named("smooth", alpha=alpha)


# AWQ


def exponent(one: Layer, change) -> float:
    """Return r of s = mean|X|^r, from the ratio of two channels."""
    mean = one.stats.mean_abs_I
    hi, lo = int(mean.argmax()), int(mean.argmin())
    return 0.0 if change is None else float((change.map.a[lo] / change.map.a[hi]).log() / (mean[hi] / mean[lo]).log())


def test_awq_halves_the_error_of_a_loud_channel():
    one = layer(dict.fromkeys(range(0, 128, 64), 50.0))  # 1 of 64
    change = transform_named("awq").edit(SITE, one, generator(0))
    assert one.damage(change.map) <= 0.5 * one.damage(Diagonal(torch.ones(128)))
    assert 0.2 < exponent(one, change) <= 0.95
    r = exponent(one, change)
    assert r * 20 == pytest.approx(round(r * 20), abs=1e-3), "one of the twenty candidates"


def test_awq_leaves_even_channels_nearly_alone():
    one = layer({})
    change = transform_named("awq").edit(SITE, one, generator(0))
    a = torch.ones(1) if change is None else change.map.a
    assert a.max() / a.min() < 1.5


def test_awq_is_neutral_to_the_size_of_the_factors():
    """A power of two times s changes no quantized value: dividing by sqrt(max s min s) only keeps 16 bits in range."""
    one = layer({7: 50.0})
    s = one.stats.mean_abs_I.sqrt()
    assert len({one.damage(Diagonal(2.0**k / s)) for k in (-3, 0, 4)}) == 1
    change = transform_named("awq").edit(SITE, one, generator(0))
    assert change.map.a.max() * change.map.a.min() == pytest.approx(1.0, rel=1e-5)


def test_awq_never_does_worse_than_rounding_and_searches_what_the_paper_searches(monkeypatch):
    losses: list[list[float]] = []

    class Watched(SiteSurroundings):
        def damage(self, candidate):
            loss = super().damage(candidate)
            if torch.equal(candidate.a, torch.ones_like(candidate.a)):
                losses.append([])
            losses[-1].append(loss)
            return loss

    monkeypatch.setattr(transforming, "SiteSurroundings", Watched)
    view = transform(view_of("llama_tied"), recipe("awq", w=3), tokens())
    assert len(losses) == 2 * 4 and {len(tried) for tried in losses} == {20}, "every site, one r = 0 each"
    assert sum(min(tried) < tried[0] for tried in losses) >= 4
    assert distance(logits(view.model), logits(view_of("llama_tied").model)) < 1e-9


def test_awq_skips_values_under_grouped_queries():
    assert {s.kind for s in transform_named("awq").sites(view_of("llama"))} == {"attn_in", "mlp_in", "mlp_mid"}
    assert {s.kind for s in transform_named("awq").sites(view_of("llama_tied"))} == {
        "attn_in",
        "value",
        "mlp_in",
        "mlp_mid",
    }


def test_micro_batches_choose_the_same_factors():
    """The same sequences at once or one by one."""
    whole, split = view_of("llama"), view_of("llama")
    for view in (whole, split):
        stream, kwargs = stream_into(view, 0, tokens())
        stream = [x for batch in stream for x in batch.split(1)] if view is split else stream
        transform_block(plan_of(view, recipe("awq", w=3), 0), scene_of(view, 0, stream, kwargs), stream)
    for ours, theirs in zip(whole.blocks[0].parameters(), split.blocks[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_one_vector_per_site_is_all_that_changes():
    plain = view_of("llama_tied")
    view = transform(copy.deepcopy(plain), recipe("awq", w=3), tokens())
    for was, now in zip(plain.blocks, view.blocks, strict=True):
        q, gate = was.input_layernorm.weight / now.input_layernorm.weight, was.post_attention_layernorm.weight
        gate = gate / now.post_attention_layernorm.weight
        for role in ("q_proj", "k_proj"):
            ours, before = now.self_attn.get_submodule(role).weight, was.self_attn.get_submodule(role).weight
            torch.testing.assert_close(ours, before * q)
        torch.testing.assert_close(now.mlp.gate_proj.weight, was.mlp.gate_proj.weight * gate)
        o = (was.self_attn.v_proj.weight * q / now.self_attn.v_proj.weight)[:, 0]
        down = (was.mlp.up_proj.weight * gate / now.mlp.up_proj.weight)[:, 0]
        torch.testing.assert_close(now.self_attn.v_proj.weight * o[:, None], was.self_attn.v_proj.weight * q)
        torch.testing.assert_close(now.self_attn.o_proj.weight, was.self_attn.o_proj.weight * o)
        torch.testing.assert_close(now.mlp.up_proj.weight * down[:, None], was.mlp.up_proj.weight * gate)
        torch.testing.assert_close(now.mlp.down_proj.weight, was.mlp.down_proj.weight * down)
