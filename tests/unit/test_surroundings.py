"""The damage oracle: the truth about one candidate, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from toy_models import distance, logits, tokens, view_of
from toy_recipes import recipe, stream_into, transform

from qexp.core import rewrite
from qexp.core.hadamard import Hadamard
from qexp.core.maps import Diagonal
from qexp.core.words import Group, Insert
from qexp.engine.capture import Look, observe
from qexp.engine.solving import Plan, plan_of
from qexp.engine.streams import Kwargs, Stream
from qexp.engine.surroundings import calls, damage_oracle, inspected
from qexp.models.view import ModelView

KINDS = ("attn_in", "attn_out", "mlp_in", "mlp_mid")
every_group = pytest.mark.parametrize("kind", KINDS)


def setting(family: str, *transforms: str, block: int = 1, **keys) -> tuple[Plan, Stream, Kwargs]:
    view = transform(view_of(family), recipe(*transforms), tokens())
    return plan_of(view, recipe(**keys), 0), *stream_into(view, block, tokens())


def group_of(view: ModelView, kind: str, block: int = 1) -> Group:
    return next(group for group in view.groups(block) if group.site == f"{block}.{kind}")


def ones(plan: Plan, group: Group) -> Diagonal:
    return Diagonal(torch.ones(group.layers[0].inputs, dtype=torch.float64))


def oracle(plan: Plan, group: Group, stream: Stream, kwargs: Kwargs, folded: bool = True):
    return damage_oracle(plan, group, folded, lambda: calls(plan.view, group, stream, kwargs))


def state(view: ModelView) -> tuple[dict[str, Tensor], list[object]]:
    weights = {name: value.clone() for name, value in view.model.state_dict().items()}
    paths = [view.linear(layer.name).path for layer in view.layers]
    return weights, [(path.act, path.observer, tuple(path.maps), path._source) for path in paths]


@every_group
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_nothing_is_left_behind(family, kind):
    plan, stream, kwargs = setting(family, "fold_norm", "hadamard", act="per_token", a=4)
    view, group = plan.view, group_of(plan.view, kind)
    before, weights = logits(view.model), {a.name: view.linear(a.name).weight for a in view.layers}
    tensors, paths = state(view)
    damage = oracle(plan, group, stream, kwargs)
    assert damage(Diagonal(torch.linspace(0.5, 2, group.layers[0].inputs).double())) > 0
    with pytest.raises(RuntimeError):
        damage(Diagonal(torch.ones(7)))  # does not fit: a failure leaves nothing either
    after_tensors, after_paths = state(view)
    assert all(torch.equal(tensors[key], after_tensors[key]) for key in tensors) and paths == after_paths
    assert all(view.linear(name).weight is weight for name, weight in weights.items())
    assert not view.model._forward_pre_hooks and not inspected(view, group)._forward_pre_hooks
    assert torch.equal(logits(view.model), before)


@every_group
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_identity_costs_what_plain_rounding_costs(family, kind, rotated):
    plan, stream, kwargs = setting(family, *(("fold_norm", "hadamard") if rotated else ()), w=3, act="per_token", a=6)
    group = group_of(plan.view, kind)
    got = oracle(plan, group, stream, kwargs)(ones(plan, group))
    assert got == pytest.approx(rounding_error(plan, group, stream, kwargs), rel=1e-5)


def rounding_error(plan: Plan, group: Group, stream: Stream, kwargs: Kwargs) -> float:
    """Round a copy of the model, and measure at the inspected module with hooks of our own."""
    view, rounded = plan.view, copy.deepcopy(plan.view)
    grid, outputs = plan.method.grid, []
    for layer in group.layers:
        linear = rounded.linear(layer.name)
        W = linear.weight.float()
        params = grid.fit(W, None)
        linear.weight.copy_(grid.decode(grid.encode(W, params), params))
    rounded.linear(group.layers[0].name).path.act = plan.method.act.freeze({})
    for one in (view, rounded):
        module = inspected(one, group)
        keep = module.register_forward_hook(
            lambda _module, args, given, out: outputs.append(out[0] if isinstance(out, tuple) else out),
            with_kwargs=True,
        )
        one.blocks[group.layers[0].block](stream[0], **kwargs)
        keep.remove()
    return float((outputs[1] - outputs[0]).pow(2).mean())


@pytest.mark.parametrize("kind", ["attn_out", "mlp_mid"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("folded", [True, False])
def test_the_second_moment_of_a_linears_input_tells_the_same(family, kind, folded):
    plan, stream, kwargs = setting(family, "fold_norm", "hadamard", w=3)
    group = group_of(plan.view, kind)
    candidate = Diagonal(torch.linspace(0.7, 1.6, group.layers[0].inputs).double())
    stats = observe(plan.view, 1, [group], stream, kwargs, Look([group.site] if folded else []))[group.site]
    known = damage_oracle(plan, group, folded, pytest.fail, stats)
    assert known(candidate) == pytest.approx(oracle(plan, group, stream, kwargs, folded)(candidate), rel=1e-4)


def test_the_module_behind_the_site_is_looked_at():
    view = view_of("llama")
    block = view.blocks[1]
    expected = {"attn_in": block.self_attn, "attn_out": block.self_attn.o_proj, "mlp_in": block.mlp}
    expected["mlp_mid"] = block.mlp.down_proj
    assert all(inspected(view, group_of(view, kind)) is module for kind, module in expected.items())
    opt = view_of("opt")
    assert inspected(opt, group_of(opt, "mlp_in")) is opt.blocks[1].fc1


def test_without_rounding_any_map_is_free():
    plan, stream, kwargs = setting("llama", w=16)
    for kind in KINDS:
        group = group_of(plan.view, kind)
        size = group.layers[0].inputs
        damage = oracle(plan, group, stream, kwargs)
        assert damage(Diagonal(torch.linspace(0.1, 4, size).double())) < 1e-12
        assert oracle(plan, group, stream, kwargs, folded=False)(Hadamard(size, None)) < 1e-12


def test_what_a_candidate_costs_is_what_inserting_it_costs():
    """The oracle's answer for a folded diagonal equals that of the identity once the diagonal is in the model."""
    plan, stream, kwargs = setting("llama", "fold_norm", "hadamard", w=3)
    view = plan.view
    for kind in ("attn_in", "mlp_in", "mlp_mid"):
        group, site = group_of(view, kind), next(s for s in view.sites(kind) if s.block == 1)
        candidate = Diagonal(torch.linspace(0.3, 3, site.size).double())
        promised = oracle(plan, group, stream, kwargs)(candidate)
        plain = oracle(plan, group, stream, kwargs)(ones(plan, group))
        rewrite.insert(view.model, site, Insert("diagonal", candidate))
        assert oracle(plan, group, stream, kwargs)(ones(plan, group)) == pytest.approx(promised, rel=1e-4)
        assert promised != pytest.approx(plain, rel=1e-2)


def test_a_channel_fifty_times_larger_is_scaled_and_even_ones_are_not():
    """methods/awq.md 6.5: 3 bits, one scale per row; the loud channel is 1 of the 24 that gate and up read."""
    chosen = {}
    for loud in (1.0, 50.0):
        view = view_of("llama")
        norm = view.blocks[0].post_attention_layernorm
        norm.weight.fill_(1.0)
        norm.weight[5] = loud
        plain = copy.deepcopy(view)
        transform(view, recipe("awq", w=3, awq={"places": ["mlp_in"]}), tokens())
        chosen[loud] = float((plain.blocks[0].post_attention_layernorm.weight / norm.weight)[5])
        assert distance(logits(view.model), logits(plain.model)) < 1e-9
        plan, group = plan_of(plain, recipe(w=3), 0), group_of(plain, "mlp_in", 0)
        before = oracle(plan, group, *stream_into(plain, 0, tokens()))(ones(plan, group))
        after_plan = plan_of(view, recipe(w=3), 0)
        after = oracle(after_plan, group, *stream_into(view, 0, tokens()))(ones(after_plan, group))
        assert after <= before * (0.5 if loud > 1 else 1.0) * (1 + 1e-6)
    assert chosen[50.0] > 3 and chosen[1.0] < 2
