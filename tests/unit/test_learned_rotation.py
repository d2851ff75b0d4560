"""SpinQuant's learned rotations: the objective, what is learned, and what is kept of it (methods/spinquant.md 6)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stage_members import member
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy_models import distance, logits, tokens, view_of
from toy_recipes import recipe, transform_named

from qexp.core import rewrite
from qexp.core.compound_maps import PerHead
from qexp.core.errors import UserError
from qexp.core.maps import LinearMap, Orthogonal
from qexp.core.method import Method
from qexp.core.words import Insert
from qexp.engine.candidate import quantizers
from qexp.engine.checks import check_model
from qexp.engine.context import quiet
from qexp.engine.solving import plan_of
from qexp.engine.store import Store
from qexp.engine.transforming import transform_model
from qexp.engine.whole_model import Learning, ModelObjective
from qexp.models.view import ModelView
from qexp.stages.transform.learned_rotation import LearnedRotation

IDS = tokens(6)


def method(act_bits: int = 16, **keys: object) -> Method:
    made = recipe("fold_norm", "learned_rotation", act="per_token_asymmetric", a=act_bits, learned_rotation=keys)
    return replace(made, kv=member("kv", "per_head", kv=act_bits))


def folded(family: str) -> ModelView:
    view = view_of(family)
    transform_model(view, recipe("fold_norm"), 0)
    return view


def learning(folder: Path) -> Learning:
    return Learning(IDS, Store(folder, []), quiet)


def rotations(view: ModelView, learner: LearnedRotation) -> tuple[dict[str, Tensor], dict[str, Insert]]:
    """Return random orthogonal leaves by site, and the inserts that they make."""
    rng, leaves, inserts = torch.Generator().manual_seed(3), {}, {}
    for site in learner.sites(view):
        size = site.head_size if site.kind == "value" else site.size
        q, _ = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))
        leaves[site.name] = q.requires_grad_()
        inserts[site.name] = learner._insert(site, leaves[site.name])
    return leaves, inserts


def loss_of(view: ModelView, ids: Tensor) -> float:
    found = logits(view.model, ids)
    return float(cross_entropy(found[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()))


def objective(view: ModelView, made: Method) -> ModelObjective:
    return ModelObjective(plan_of(view, made, 0), made.transform["learned_rotation"].sites(view), IDS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
class TestObjective:
    def test_without_quantizers_no_rotation_changes_the_loss_and_none_is_better(self, family: str) -> None:
        view, made = folded(family), method()
        leaves, maps = rotations(view, made.transform["learned_rotation"])
        assert objective(view, made)(maps, [0, 1, 2], False) == pytest.approx(loss_of(view, IDS[:3]), rel=1e-6)
        for R in leaves.values():
            assert R.grad is not None
            tangent = R.detach().T @ R.grad - R.grad.T @ R.detach()
            assert float(tangent.norm()) < 1e-4 * max(1.0, float(R.grad.norm()))

    def test_with_quantizers_it_is_the_loss_of_the_rotated_model(self, family: str) -> None:
        view, made = folded(family), method(4)
        leaves, maps = rotations(view, made.transform["learned_rotation"])
        told = objective(view, made)(maps, [0, 1, 2], False)
        other = folded(family)
        other.untie()
        for site in made.transform["learned_rotation"].sites(other):
            insert = maps[site.name]
            with torch.no_grad():
                rewrite.insert(other.model, site, Insert(insert.kind, _frozen(insert.map)))
        with quantizers(other, made, range(2)):
            assert told == pytest.approx(loss_of(other, IDS[:3]), rel=2e-3)  # a tie may fall to the other side
        tangents = [R.detach().T @ R.grad - R.grad.T @ R.detach() for R in leaves.values() if R.grad is not None]
        assert all(float(tangent.norm()) > 1e-6 for tangent in tangents) and len(tangents) == len(leaves)

    def test_nothing_is_left_behind(self, family: str) -> None:
        view, made = folded(family), method(4)
        before, weights = logits(view.model), {n: p.clone() for n, p in view.model.named_parameters()}
        objective(view, made)(rotations(view, made.transform["learned_rotation"])[1], [0], True)
        assert torch.equal(logits(view.model), before)
        assert all(torch.equal(weights[n], p) and p.grad is None for n, p in view.model.named_parameters())


def _frozen(map: LinearMap) -> LinearMap:
    if isinstance(map, PerHead):
        return PerHead(_frozen(map.inner), map.heads)
    assert isinstance(map, Orthogonal)
    return Orthogonal(map.a.detach())


class TestLearning:
    def test_the_loss_falls_and_rotations_stay_orthogonal(self) -> None:
        view, made = folded("llama"), method(3, steps=40, batch=6)
        learner = made.transform["learned_rotation"]
        assert isinstance(learner, LearnedRotation)
        inserts, losses = learner.learn(learner.sites(view), {}, objective(view, made), torch.Generator(), iter)
        assert sum(losses[-10:]) < sum(losses[:10])
        for insert in inserts.values():
            size = insert.map.size
            A = insert.map.apply(torch.eye(size, dtype=torch.float64))
            assert float((A.T @ A - torch.eye(size)).abs().max()) < 1e-10

    def test_it_is_learned_once_and_can_be_taken_elsewhere(self, tmp_path: Path) -> None:
        made = method(4, steps=3, batch=2)
        first, again, elsewhere = view_of("llama"), view_of("llama"), view_of("llama")
        told = transform_model(first, made, 0, learning(tmp_path / "a"))
        assert transform_model(again, made, 0, replace(learning(tmp_path / "a"), tokens=None)) == told
        taken = method(4, load=str(tmp_path / "a" / "learned-learned_rotation.safetensors"))
        assert transform_model(elsewhere, taken, 7, learning(tmp_path / "b")) == told
        assert len(told["learned_rotation"]) == 3
        for other in (again, elsewhere):
            pairs = zip(first.model.parameters(), other.model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert distance(logits(first.model), logits(view_of("llama").model)) < 1e-9

    def test_a_file_of_another_model_is_refused(self, tmp_path: Path) -> None:
        transform_model(view_of("llama"), method(4, steps=1), 0, learning(tmp_path))
        taken = method(4, load=str(tmp_path / "learned-learned_rotation.safetensors"))
        with pytest.raises(UserError, match="maps of other sites"):
            transform_model(view_of("qwen3"), taken, 0, learning(tmp_path / "b"))

    def test_no_had_adds_nothing_online(self, tmp_path: Path) -> None:
        view = view_of("llama")
        transform_model(view, method(4, steps=1), 0, learning(tmp_path))
        assert all(not view.linear(layer.name).path.maps for layer in view.layers)
        assert all(door is None or door.rotation is None for door in map(view.door, range(len(view.blocks))))


def test_post_norms_leave_the_residual_stream_alone() -> None:
    learner = transform_named("learned_rotation")
    assert {site.kind for site in learner.sites(view_of("gemma3"))} == {"value"}


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_a_missing_or_corrupt_file_is_told_before_the_run(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "learned.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"does not exist" if content is None else r"is corrupt"):
        check_model(view_of("llama"), method(4, load=str(file)))
