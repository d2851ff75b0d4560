"""What every transform owes: the function stays, on every family, alone and stacked, whatever the calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from stage_members import assert_well_kept, names
from toy_models import FAMILIES, distance, logits, tokens, view_of
from toy_recipes import recipe, transform, transform_named

from qexp.core.errors import UserError
from qexp.core.learned import Learner, Trained
from qexp.core.stages import Transform
from qexp.models.view import ModelView

MEMBERS = names("transform")
NEEDS_BEFORE = {"hadamard": ("fold_norm",), "learned_rotation": ("fold_norm",)}  # norms must commute with what comes
SHORT = {
    "learned_rotation": {"steps": 2, "batch": 2},
    "kronecker": {"training": {"steps": 3, "batch": 2}},
    "let": {"training": {"steps": 3, "floor": "none"}},
    "affine": {"training": {"steps": 3, "floor": "none"}},
}  # learning takes long
STACKS = (
    ("fold_norm", "hadamard", "smooth"),
    ("fold_norm", "hadamard", "awq"),  # a folded diagonal in front of an online rotation
    ("smooth", "awq"),
)
EXACT = 1e-9

every_member = pytest.mark.parametrize("name", MEMBERS)
every_family = pytest.mark.parametrize("family", FAMILIES)
FAST = ("llama", "qwen3", "gemma3", "opt")
some_families_fast = pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)


def snapshot(view: ModelView) -> tuple[dict[str, torch.Tensor], dict[str, list[object]]]:
    """Return every parameter, and every online map by layer, those of queries and keys by block."""
    weights = {name: value.clone() for name, value in view.model.state_dict().items()}
    maps: dict[str, list[object]] = {layer.name: list(view.linear(layer.name).path.maps) for layer in view.layers}
    doors = [(block, view.door(block)) for block in range(len(view.blocks))]
    return weights, maps | {f"door {block}": [door.rotation] for block, door in doors if door is not None}


def assert_kept(family: str, *transforms: str) -> None:
    """Assert that the recipe changes the model, and neither its logits nor the shapes of its parameters."""
    view = view_of(family)
    before, (weights, maps) = logits(view.model), snapshot(view)
    transform(view, recipe(*transforms, w=3, **SHORT), tokens())
    after, after_maps = snapshot(view)
    assert distance(logits(view.model), before) < EXACT
    assert distance(logits(view.model, tokens(2, seed=9)), logits(view_of(family).model, tokens(2, seed=9))) < EXACT
    changed = any(not torch.equal(weights[key], after[key]) for key in weights) or maps != after_maps
    # Behind post-norms folding would serve no rotation, and expose channels that the gains keep small.
    idle = transforms == ("dense_sparse",) or (transforms == ("fold_norm",) and view.family.post_norms)
    assert changed != idle, "the exact weights are where they were; all others rewrite something"
    assert all(after[key].shape == weights[key].shape for key in weights)
    # A norm's bias has to go somewhere; only OPT's head has no bias yet.
    assert after.keys() - weights.keys() <= ({"lm_head.bias"} if family == "opt" else set())


def test_all_members_and_families_are_seen():
    assert len(MEMBERS) >= 4 and len(FAMILIES) == 10
    assert {"fold_norm", "hadamard", "smooth", "awq"} <= set(MEMBERS)


@every_member
def test_it_is_a_transform_and_well_kept(name):
    built = transform_named(name)
    assert isinstance(built, Transform)
    assert built.scope in ("model", "block")
    assert_well_kept("transform", name, built)


@every_member
@some_families_fast
def test_logits_and_shapes_stay(name, family):
    assert_kept(family, *NEEDS_BEFORE.get(name, ()), name)


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
@every_family
def test_logits_and_shapes_stay_under_several(stack, family):
    assert_kept(family, *stack)


@every_member
def test_it_runs_where_the_grid_keeps_all_bits(name):
    view = view_of("llama")
    before = logits(view.model)
    transform(view, recipe(*NEEDS_BEFORE.get(name, ()), name, w=16, **SHORT), tokens())
    assert distance(logits(view.model), before) < EXACT


@every_member
def test_same_seed_same_weights_and_the_order_of_the_calibration_does_not_matter(name):
    method, ids = recipe(*NEEDS_BEFORE.get(name, ()), name, w=3, **SHORT), tokens(6)
    first, _ = snapshot(transform(view_of("qwen3"), method, ids, seed=5))
    again, _ = snapshot(transform(view_of("qwen3"), method, ids, seed=5))
    assert all(torch.equal(first[key], again[key]) for key in first)
    if isinstance(transform_named(name), Learner | Trained):
        return  # takes its batches in order
    turned, _ = snapshot(transform(view_of("qwen3"), method, ids.flip(0), seed=5))
    assert all(distance(turned[key], first[key]) < 1e-4 for key in first)


@every_member
def test_looking_for_sites_changes_nothing(name):
    view = view_of("llama")
    before, maps = snapshot(view)
    sites = transform_named(name).sites(view)
    after, after_maps = snapshot(view)
    assert sites == transform_named(name).sites(view) and sites
    assert all(torch.equal(before[key], after[key]) for key in before) and maps == after_maps


@every_member
def test_an_architecture_without_sites_is_refused(name):
    view = view_of("unknown")
    weights = copy.deepcopy(view.model.state_dict())
    with pytest.raises(UserError, match=r"transform on gpt_neox.*set method/transform=\[\]"):
        transform(view, recipe(*NEEDS_BEFORE.get(name, ()), name), tokens())
    assert all(torch.equal(value, weights[key]) for key, value in view.model.state_dict().items())
