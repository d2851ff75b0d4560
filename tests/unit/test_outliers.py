"""Injected outliers: the function stays, the outliers are there, and the right cure takes them away again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy_models import FAMILIES, POST_NORMS, distance, logits, tokens, view_of
from toy_recipes import path_of, recipe, transform

from qexp.core.errors import UserError
from qexp.models.outliers import inject
from qexp.models.view import ModelView

SCALE = {"kind": "scale", "channels": 4, "scale": 30.0, "seed": 0}
ROTATE = {"kind": "rotate", "channels": 0, "scale": 1.0, "seed": 0}
BOTH = {**ROTATE, "channels": 4, "scale": 30.0}
KINDS = {"scale": SCALE, "rotate": ROTATE, "both": BOTH}
ADMITTED = [(f, k) for f in FAMILIES for k in KINDS if k == "scale" or f not in POST_NORMS]
READERS = {"attn_in": "q", "value": "o", "mlp_in": "up", "mlp_mid": "down"}


def stressed(view: ModelView, kind: str) -> ModelView:
    inject(view, KINDS[kind], tokens(8))
    return view


def seen(view: ModelView, role: str, block: int = 1) -> Tensor:
    """Return what the layers of ``role`` read, [T, I] in front of their input path."""
    kept: list[Tensor] = []
    path = path_of(view, role, block)
    path.observer = lambda x: kept.append(x.flatten(0, -2).clone())
    logits(view.model)
    path.observer = None
    return kept[0]


def top_share(x_TI: Tensor, count: int = 4) -> float:
    """Return the share of the energy that the strongest channels hold."""
    energy = x_TI.pow(2).sum(0).sort(descending=True).values
    return float(energy[:count].sum() / energy.sum())


def kurtosis(x_TI: Tensor) -> float:
    """Return the mean kurtosis of a token across its channels; 3 is a Gaussian's."""
    return float((x_TI.pow(4).mean(1) / x_TI.pow(2).mean(1).pow(2)).mean())


@pytest.mark.parametrize(("family", "kind"), ADMITTED)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_function_stays(family, kind, dtype, limit):
    view = view_of(family, dtype)
    before = logits(view.model)
    weights = {name: value.clone() for name, value in view.model.state_dict().items()}
    stressed(view, kind)
    assert distance(logits(view.model), before) < limit
    assert any(
        not torch.equal(value, weights[name]) for name, value in view.model.state_dict().items() if name in weights
    )
    assert not any(view.linear(layer.name).path.maps for layer in view.layers), "outliers are in the weights"


def test_all_pairs_are_seen():
    assert len(ADMITTED) == 3 * len(FAMILIES) - 2 * len(POST_NORMS) == 26


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", READERS)
def test_scaled_channels_are_as_much_larger(family, kind):
    plain, view = view_of(family), stressed(view_of(family), "scale")
    ratio = seen(view, READERS[kind]).abs().amax(0) / seen(plain, READERS[kind]).abs().amax(0)
    factor = torch.where(ratio > 15, 30.0, 1.0).double()
    alive = seen(plain, READERS[kind]).abs().amax(0) > 0  # behind a ReLU a channel may be silent
    torch.testing.assert_close(ratio[alive], factor[alive], rtol=1e-9, atol=0)
    scaled = int((factor[alive] > 1).sum())
    if kind != "value":
        assert scaled == 4 if alive.all() else scaled <= 4
    else:  # the same places in every head
        d, heads = view.head_size, view.config.num_attention_heads
        kv_width = view.kv_heads * d
        assert scaled == heads * max(1, 4 * d // kv_width)
        assert len({tuple(row.tolist()) for row in factor.view(heads, d)}) == 1


def test_blocks_have_their_own_channels_and_the_seed_decides():
    first, again = (stressed(view_of("llama"), "scale") for _ in range(2))
    other = view_of("llama")
    inject(other, {**SCALE, "seed": 1}, None)
    gains = [[v.gain(s) for s in v.sites("attn_in", "mlp_in")] for v in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(gains[0], gains[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(gains[0], gains[2], strict=True))
    assert len({tuple((gain.abs() > 10).tolist()) for gain in gains[0]}) > 1


def anisotropic(dtype: torch.dtype = torch.float64) -> ModelView:
    """A model whose stream lies near few directions, none of them an axis: what training makes and a draw does not."""
    view = view_of("llama", dtype)
    rng = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=rng, dtype=torch.float64)).Q
    spread = torch.logspace(1, -1.5, 24, dtype=torch.float64)
    for name, parameter in view.model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.copy_(basis @ (spread[:, None] * (basis.T @ parameter.double())) * 0.3)
    E = view.model.model.embed_tokens.weight
    E.copy_(torch.randn(E.shape, generator=rng, dtype=torch.float64) * spread @ basis.T)
    return view


@pytest.mark.parametrize("role", ["q", "up"])
def test_rotation_gathers_the_energy_in_the_first_channels(role):
    plain = transform(anisotropic(), recipe("fold_norm"), tokens())
    view = stressed(anisotropic(), "rotate")
    before, after = seen(plain, role), seen(view, role)
    assert distance(logits(view.model), logits(plain.model)) < 1e-9
    assert top_share(before) < 0.55 and top_share(after) > 0.8
    energy = after.pow(2).sum(0)
    assert energy[:4].sum() > 0.95 * energy.sort(descending=True).values[:4].sum()  # the axes serve all blocks
    assert after.pow(2).sum() == pytest.approx(float(before.pow(2).sum())), "turned, not scaled"
    assert kurtosis(after) > 1.3 * kurtosis(before)


def test_gathered_channels_are_scaled_too():
    rotated, both = (stressed(anisotropic(), kind) for kind in ("rotate", "both"))
    for role in ("q", "up"):
        ratio = seen(both, role).abs().amax(0) / seen(rotated, role).abs().amax(0)
        torch.testing.assert_close(ratio, torch.tensor([30.0] * 4 + [1.0] * 20).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hadamard_rotation_takes_the_outliers_away(kind):
    """methods/quarot.md 6.5: the kurtosis of every linear's input falls."""
    view = stressed(anisotropic(), kind)
    roles = ("q", "o", "up", "down") if kind == "scale" else ("q", "up")
    before = {role: kurtosis(seen(view, role)) for role in roles}
    transform(view, recipe("fold_norm", "hadamard"), tokens())
    assert all(kurtosis(seen(view, role)) < 0.8 * before[role] for role in roles)


@pytest.mark.parametrize("kind", ["scale", "both"])
def test_smoothing_takes_scaled_channels_away(kind):
    view = stressed(anisotropic(), kind)
    before = {role: kurtosis(seen(view, role)) for role in ("q", "up")}
    transform(view, recipe("smooth"), tokens())
    assert all(kurtosis(seen(view, role)) < 0.5 * before[role] for role in before)


@pytest.mark.parametrize("family", POST_NORMS)
@pytest.mark.parametrize("kind", ["rotate", "both"])
def test_rotation_behind_post_norms_is_refused_untouched(family, kind):
    view = view_of(family)
    before = logits(view.model)
    with pytest.raises(UserError, match=r"kind=rotate on a gemma\d.*set model\.outliers="):
        stressed(view, kind)
    assert torch.equal(logits(view.model), before)


@pytest.mark.parametrize(
    ("outliers", "told"),
    [
        ({"channels": -1}, "channels=-1"),
        ({"scale": 0.0}, "scale=0"),
        ({"channels": 0}, "scales no channel"),
        ({"channels": 25}, "exceeds the 24 channels"),
        ({**ROTATE, "channels": 25}, "exceeds the 24 channels"),
    ],
)
def test_settings_that_mean_nothing_are_refused(outliers, told):
    with pytest.raises(UserError, match=told):
        inject(view_of("llama"), {**SCALE, **outliers}, tokens())


def test_an_architecture_without_sites_is_refused():
    with pytest.raises(UserError, match="gpt_neox"):
        stressed(view_of("unknown"), "scale")


def test_none_does_nothing():
    view = view_of("llama_tied")
    before = logits(view.model)
    inject(view, {**SCALE, "kind": "none"}, None)
    assert torch.equal(logits(view.model), before) and view.config.tie_word_embeddings
