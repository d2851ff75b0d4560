"""Rewrites keep the function: norms folded, and single maps inserted at every kind of site."""

from __future__ import annotations

import pytest
import torch
from toy_models import FAMILIES, distance, logits, tokens, view_of
from toy_recipes import linear_of, path_of, recipe, transform

from qexp.core import rewrite
from qexp.core.compound_maps import PerHead
from qexp.core.errors import UserError
from qexp.core.maps import Dense, Diagonal
from qexp.core.norms import ScaledRmsNorm, gain_of
from qexp.core.words import Insert

EXACT = 1e-9
every_family = pytest.mark.parametrize("family", FAMILIES)
# Behind post-norms (Gemma 2/3) norms are not folded; gemma keeps the 1 + w gain in the list.
every_folding_family = pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not f.startswith(("gemma2", "gemma3"))]
)


@every_folding_family
def test_norms_are_plain_divisions_once_folded(family):
    view = transform(view_of(family), recipe("fold_norm"), tokens())
    for site in view.sites("head_in", "attn_in", "mlp_in"):
        torch.testing.assert_close(view.gain(site), torch.ones(24, dtype=torch.float64), rtol=0, atol=1e-12)
        bias = view.bias(site)
        assert bias is None or bias.abs().max() < 1e-12
    assert any(isinstance(module, ScaledRmsNorm) for module in view.model.modules()) == (family == "opt")


def test_a_layer_norm_loses_its_mean_to_everything_that_writes_the_stream():
    view = transform(view_of("opt"), recipe("fold_norm"), tokens())
    streams = view.model(tokens(), output_hidden_states=True, use_cache=False).hidden_states[:-1]
    assert len(streams) == 2 and all(x.mean(-1).abs().max() < 1e-12 for x in streams)
    untouched = view_of("opt").model(tokens(), output_hidden_states=True, use_cache=False).hidden_states
    assert untouched[0].mean(-1).abs().max() > 0.1


def test_embeddings_of_rms_norm_models_are_not_centred():
    view = transform(view_of("llama"), recipe("fold_norm"), tokens())
    assert torch.equal(view.model.model.embed_tokens.weight, view_of("llama").model.model.embed_tokens.weight)


# Single inserts


@pytest.mark.parametrize("kind", ["attn_in", "mlp_in", "mlp_mid", "value"])
@every_family
def test_a_diagonal_at_any_site_keeps_the_function(family, kind):
    view = view_of(family)
    before = logits(view.model)
    for site in view.sites(kind):
        if kind == "value" and "diagonal" not in site.admits:
            inner = torch.linspace(0.5, 3, site.head_size, dtype=torch.float64)
            change = Insert("per_head", PerHead(Diagonal(inner), site.size // site.head_size))
        else:
            change = Insert("diagonal", Diagonal(torch.linspace(0.5, 3, site.size, dtype=torch.float64)))
        assert rewrite.insert(view.model, site, change), "folded"
    assert distance(logits(view.model), before) < EXACT


@pytest.mark.parametrize("kind", ["attn_in", "attn_out", "mlp_in", "mlp_mid"])
@every_family
def test_a_dense_map_that_no_writer_absorbs_runs_online(family, kind):
    view = view_of(family)
    before = logits(view.model)
    for site in view.sites(kind):
        width = view.linear(site.readers[0]).in_features
        a = (
            torch.eye(width).double()
            + 0.1 * torch.randn(width, width, generator=torch.Generator().manual_seed(1)).double()
        )
        assert not rewrite.insert(view.model, site, Insert("dense", Dense(a, torch.linalg.inv(a))))
        assert len(view.linear(site.readers[0]).path.maps) == 1
    assert distance(logits(view.model), before) < EXACT


def test_a_folded_diagonal_acts_in_front_of_the_online_maps():
    view, plain = transform(view_of("llama"), recipe("fold_norm", "hadamard"), tokens()), view_of("llama")
    site, factor = view.sites("mlp_mid")[0], torch.linspace(0.5, 3, 40, dtype=torch.float64)
    up = linear_of(view, "up").weight.clone()
    weight = rewrite.reader_weight(linear_of(view, "down"), Diagonal(factor), True)
    rewrite.insert(view.model, site, Insert("diagonal", Diagonal(factor)))
    torch.testing.assert_close(linear_of(view, "up").weight, factor[:, None] * up)
    torch.testing.assert_close(linear_of(view, "down").weight, weight)
    assert len(path_of(view, "down").maps) == 1
    assert distance(logits(view.model), logits(plain.model)) < EXACT


def test_a_shift_needs_a_writer_with_a_bias():
    view = view_of("llama")
    site, eye = view.sites("attn_out")[0], torch.eye(24).double()
    with pytest.raises(UserError, match=r"a shift at 0\.attn_out, which has no writers"):
        rewrite.insert(view.model, site, Insert("dense", Dense(eye, eye), shift=torch.ones(24)))


def test_a_shift_moves_from_the_norm_into_the_readers():
    view = view_of("opt")
    before = logits(view.model)
    for site in view.sites("attn_in", "mlp_in"):
        change = Insert("diagonal", Diagonal(torch.full((24,), 2.0).double()), shift=torch.linspace(-1, 1, 24).double())
        old = view.bias(site).clone()
        rewrite.insert(view.model, site, change)
        torch.testing.assert_close(view.bias(site), 2 * (old + change.shift))
    assert distance(logits(view.model), before) < EXACT


def test_gemmas_offset_gain_is_what_is_scaled():
    view = view_of("gemma3")
    site = view.sites("attn_in")[0]
    norm = view.model.get_submodule(site.writers[0].name)
    w = norm.weight.clone()
    rewrite.insert(view.model, site, Insert("diagonal", Diagonal(torch.full((24,), 0.5).double())))
    torch.testing.assert_close(norm.weight, (1 + w) / 2 - 1)
    torch.testing.assert_close(gain_of(norm, "offset_norm"), (1 + w) / 2)


@every_folding_family
def test_a_channel_of_gain_zero_folds_to_readers_that_ignore_it(family):
    """Gemma 3 270M has such channels: 1 / 0 must reach no weight."""
    view = view_of(family)
    for site in view.sites("head_in", "attn_in", "mlp_in"):
        gain = view.model.get_submodule(site.writers[0].name).weight
        gain[3] = -1.0 if family.startswith("gemma") else 0.0
    before = logits(view.model)
    transform(view, recipe("fold_norm"), tokens())
    assert all(torch.isfinite(p).all() for p in view.model.parameters())
    assert distance(logits(view.model), before) < EXACT
    assert linear_of(view, "q").weight[:, 3].abs().max() == 0
