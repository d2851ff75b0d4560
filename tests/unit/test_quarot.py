"""QuaRot on every family: the stream really turns, and every way to get it wrong is loud (methods/quarot.md 6)."""

from __future__ import annotations

import logging

import pytest
import torch
from stage_members import member
from toy_models import FAMILIES, POST_NORMS, distance, logits, tokens, view_of
from toy_recipes import linear_of, path_of, recipe, transform, transform_named

from qexp.core import rewrite
from qexp.core.compound_maps import PerHead
from qexp.core.errors import UserError
from qexp.core.hadamard import Hadamard, randomized_hadamard
from qexp.core.maps import Dense
from qexp.core.rng import generator
from qexp.core.words import Insert, Site
from qexp.engine.surroundings import SiteSurroundings
from qexp.models.view import ModelView

EXACT = 1e-9
LOUD = 0.01  # relative to the largest logit
every_family = pytest.mark.parametrize("family", FAMILIES)
rotatable = pytest.mark.parametrize("family", [name for name in FAMILIES if name not in POST_NORMS])


def rotated(family: str, seed: int = 0) -> ModelView:
    return transform(view_of(family), recipe("fold_norm", "hadamard"), tokens(), seed)


@rotatable
def test_the_residual_stream_is_rotated_as_a_whole(family):
    folded, turned = transform(view_of(family), recipe("fold_norm"), tokens()), rotated(family)
    R = randomized_hadamard(24, generator(0, "hadamard", "residual")).apply(torch.eye(24).double())
    E, E_R = (view.model.get_input_embeddings().weight for view in (folded, turned))
    torch.testing.assert_close(E_R, E @ R, rtol=0, atol=1e-12)
    torch.testing.assert_close(R.T @ R, torch.eye(24).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(R.abs(), torch.full_like(R, 24**-0.5), rtol=0, atol=1e-10)
    streams = [v.model(tokens(), output_hidden_states=True, use_cache=False).hidden_states for v in (folded, turned)]
    for plain, other in zip(*streams, strict=True):
        assert distance(other, plain @ R) < EXACT, "RMSNorm is equivariant too: the last state is behind the final norm"


@every_family
def test_every_input_of_a_rotated_model_is_rotated(family):
    view = rotated(family)
    online = {role: len(path_of(view, role).maps) for role in ("q", "o", "up", "down")}
    r1_online = int(family in POST_NORMS)
    assert online == {"q": r1_online, "o": 1, "up": r1_online, "down": 1}


@rotatable
def test_a_rotation_without_norm_folding_is_refused(family):
    with pytest.raises(
        UserError, match=r"gain of its own; need fold_norm.*set method/transform=\[fold_norm,hadamard\]"
    ):
        transform(view_of(family), recipe("hadamard"), tokens())


@pytest.mark.parametrize("family", POST_NORMS)
def test_behind_post_norms_r1_goes_online_and_says_so(family, caplog):
    caplog.set_level(logging.INFO)
    view = view_of(family)
    before = logits(view.model)
    transform(view, recipe("hadamard"), tokens())  # online rotations do not ask norms to commute
    assert distance(logits(view.model), before) < EXACT
    told = [record.message for record in caplog.records]
    assert sum("R1 cannot be folded" in line for line in told) == 1
    assert any(
        "attn_in online x2" in line and "mlp_in online x2" in line and "value folded x2" in line for line in told
    )


# Every mistake is loud


def broken(family: str, mistake) -> float:
    """Return how far the logits of a rotated model are from the original's after ``mistake(rotated, original)``."""
    original, view = view_of(family), rotated(family)
    before = logits(original.model)
    assert distance(logits(view.model), before) < EXACT
    with torch.no_grad():
        mistake(view, original)
    return distance(logits(view.model), before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_a_value_bias_left_unrotated_is_loud(family):
    assert broken(family, lambda view, original: linear_of(view, "v").bias.copy_(linear_of(original, "v").bias)) > LOUD


@pytest.mark.parametrize("role", ["down", "o"])
@every_family
def test_an_online_rotation_on_one_side_only_is_loud(family, role):
    assert broken(family, lambda view, _: path_of(view, role).maps.clear()) > LOUD


def test_the_transpose_of_an_online_rotation_is_loud():
    def mistake(view: ModelView, _: ModelView) -> None:
        dense = path_of(view, "down").maps[0].apply(torch.eye(40, dtype=torch.float64))
        assert not torch.allclose(dense, dense.T), "40 = 20 x 2 needs a matrix that is not symmetric"
        path_of(view, "down").maps[:] = [Dense(dense.T.contiguous(), dense)]

    assert broken("llama", mistake) > LOUD


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma"])
def test_keys_rotated_before_their_positions_are_loud(family):
    def mistake(view: ModelView, _: ModelView) -> None:
        turn = PerHead(Hadamard(view.head_size, None), 1)
        for linear in (linear_of(view, role, block) for role in ("q", "k") for block in range(2)):
            linear.weight.copy_(turn.apply(linear.weight.T.contiguous()).T)
            if linear.bias is not None:
                linear.bias.copy_(turn.apply(linear.bias))

    assert broken(family, mistake) > LOUD


@rotatable
def test_a_final_norm_left_unfused_is_refused_and_would_be_loud(family):
    view = view_of(family)
    view.untie()
    whole = transform_named("fold_norm").sites(view)
    for site in whole:
        change = None if site.kind == "head_in" else _fold(view, site)
        if change is not None:
            rewrite.insert(view.model, site, change)
    with pytest.raises(UserError, match=r"in front of model\.(decoder\.final_layer_)?norm"):
        transform(view, recipe("hadamard"), tokens())

    def mistake(rotated_view: ModelView, original: ModelView) -> None:
        gain = original.gain(original.sites("head_in")[0])
        final = rotated_view.model.get_submodule(rotated_view.family.final_norm)
        final.weight.mul_(gain)  # exact in a model of R1 = 1, where the head divides it out
        rotated_view.model.lm_head.weight.div_(gain)
        final.weight.copy_(final.weight.flip(0))

    assert broken(family, mistake) > LOUD


def _fold(view: ModelView, site: Site) -> Insert | None:
    return transform_named("fold_norm").edit(site, SiteSurroundings(view, site, None, None), torch.Generator())


# Seeds


def test_the_seed_decides_the_rotation_and_not_the_function():
    first, again, other = (rotated("llama", seed) for seed in (3, 3, 4))
    states = [view.model.state_dict() for view in (first, again, other)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(states[0]["model.embed_tokens.weight"], states[2]["model.embed_tokens.weight"])
    assert distance(logits(other.model), logits(first.model)) < EXACT
    rounded = [logits(round_weights(view).model) for view in (first, again, other)]
    assert torch.equal(rounded[0], rounded[1])
    assert distance(rounded[2], rounded[0]) > LOUD


def round_weights(view: ModelView) -> ModelView:
    grid = member("grid", "integer_symmetric", w=4, g=-1)
    for layer in view.layers:
        weight = view.linear(layer.name).weight
        params = grid.fit(weight, None)
        weight.copy_(grid.decode(grid.encode(weight, params), params))
    return view


def test_parts_can_be_switched_off():
    view = view_of("llama")
    off = dict.fromkeys(("residual", "heads", "across_heads", "keys", "down"), False)
    for part, kind in [
        ("residual", "residual"),
        ("heads", "value"),
        ("across_heads", "attn_out"),
        ("keys", "query_key"),
    ]:
        sites = transform_named("hadamard", **(off | {part: True})).sites(view)
        assert {site.kind for site in sites} == {kind}
    assert transform_named("hadamard", **off).sites(view) == []
