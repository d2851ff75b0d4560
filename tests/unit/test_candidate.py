"""A block run as it would be under candidate inserts is the block that rewrite makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stage_members import member
from toy_models import FAMILIES, distance, tokens, view_of
from toy_recipes import linear_of, recipe, stream_into, transform, transform_named

from qexp.core import rewrite
from qexp.core.errors import UserError
from qexp.core.method import Method
from qexp.core.rng import generator
from qexp.core.words import Insert
from qexp.engine.acting import calibrate
from qexp.engine.candidate import Candidate, quantizers
from qexp.engine.capture import observe
from qexp.engine.checks import check_method, check_model
from qexp.engine.solving import plan_of
from qexp.engine.surroundings import SiteSurroundings
from qexp.engine.whole_model import ModelObjective
from qexp.models.view import ModelView

BEFORE = {"plain": (), "rotated": ("fold_norm", "hadamard"), "turned": ("incoherence",)}


def inserts_of(view: ModelView) -> dict[str, Insert]:
    """Return random maps at every site of block 0 that kronecker learns."""
    learner = transform_named("kronecker", scale=False)
    rng = generator(0)
    sites = [site for site in learner.sites(view) if site.block == 0]
    return {site.name: learner.edit(site, SiteSurroundings(view, site, None, None), rng) for site in sites}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_rewrite_makes(family: str, before: str) -> None:
    def made() -> ModelView:
        return transform(view_of(family), recipe(*BEFORE[before]), tokens(2))

    method = replace(recipe(), kv=member("kv", "per_head", kv=8))  # so that queries and keys are turned
    view, other = made(), made()
    inserts = inserts_of(view)
    sites = [site for site in transform_named("kronecker").sites(view) if site.block == 0]
    stream, kwargs = stream_into(view, 0, tokens(2))
    with quantizers(view, method, [0]), quantizers(other, method, [0]), torch.no_grad():
        told = Candidate(view, sites).block(inserts, 0, stream[0], kwargs, {})
        for site in sites:
            rewrite.insert(other.model, site, inserts[site.name])
        answer = other.blocks[0](stream[0], **kwargs)
        assert distance(told, answer[0] if isinstance(answer, tuple) else answer) < 1e-9
        again = view.blocks[0](stream[0], **kwargs)
    untouched = made()
    with quantizers(untouched, method, [0]), torch.no_grad():
        expected = untouched.blocks[0](stream[0], **kwargs)
    first = [a[0] if isinstance(a, tuple) else a for a in (again, expected)]
    assert torch.equal(*first), "nothing may be left behind"


def test_the_objective_caps_logits_where_the_model_does() -> None:
    view, ids = view_of("gemma2"), tokens(2)
    learner = transform_named("learned_rotation", residual=False)
    objective = ModelObjective(plan_of(view, recipe(), 0), learner.sites(view), ids)
    starts = {site.name: learner.edit(site, SiteSurroundings(view, site, None, None), generator(0)) for site in
              learner.sites(view)}  # fmt: skip
    for insert in starts.values():
        insert.map.inner.a.requires_grad_()  # type: ignore[attr-defined]
    logits = view.model(ids, use_cache=False).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert objective(starts, [0, 1], False) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("folded", [True, False])
def test_weights_around_a_site_are_those_that_the_insert_meets(folded: bool) -> None:
    view = view_of("llama")
    plain = linear_of(view, "down").weight.clone()
    transform(view, recipe("hadamard_online"), tokens(2))
    site = next(site for site in view.sites("mlp_mid") if site.block == 0)
    (weight,) = SiteSurroundings(view, site, None, None, folded).weights
    assert distance(weight, plain if folded else linear_of(view, "down").weight) < 1e-6
    assert distance(plain, linear_of(view, "down").weight) > 0.1


def test_ranges_are_those_of_the_channels_that_are_quantized() -> None:
    method = recipe("outlier_columns", act="per_tensor", a=8)
    view = view_of("llama")
    stream, kwargs = stream_into(view, 0, tokens(4))
    view.blocks[0].input_layernorm.weight[3] = 1e4  # type: ignore[union-attr,index,operator]
    transform(view, method, tokens(4))
    group = view.groups(0)[0]
    stats = observe(view, 0, [group], stream, kwargs)[group.site]
    calibrate(view, method.act, group, stats)
    path = linear_of(view, "q").path
    quantized = stats.absmax_I[: -path.kept].max()
    assert float(path.ranges["scale"]) == pytest.approx(float(quantized) / 127, rel=1e-5)
    assert float(stats.absmax_I.max()) > 100 * float(quantized)


def checked(method: Method) -> None:
    check_method(method, calibrated=True)
    check_model(view_of("llama"), method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (recipe("outlier_columns", "duquant"), r"set method/transform=\[duquant,outlier_columns\]"),
        (replace(recipe("outlier_columns"), grid=member("grid", "integer", g=24)), "24 does not divide in_features=16"),
        (recipe("outlier_columns", act="per_group", a=4), r"act\.group=32 does not divide an input of 16"),
        (recipe("incoherence", "incoherence_hadamard"), "two transforms that turn the outputs"),
        (recipe("outlier_columns", outlier_columns={"multiple": 64}), r"multiple=64 on a site of 24"),
    ],
    ids=["behind kept", "weight groups", "act groups", "outputs twice", "multiple"],
)
def test_mistakes_are_told_before_the_run(method: Method, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(method)


@pytest.mark.parametrize("name", ["smooth", "awq", "column_scale", "duquant", "outlier_columns"])
@pytest.mark.parametrize("place", ["foo", "query_key", "residual"])
def test_places_that_mean_nothing_are_refused(name: str, place: str) -> None:
    with pytest.raises(UserError, match=rf"transform\.{name}\.places='{place}' is unknown"):
        transform_named(name, places=[place])
