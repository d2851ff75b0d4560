"""FlatQuant's learned maps, scales and clips: what is learned lowers the block's error, and reaches the quantizers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from stage_members import member
from toy_models import tokens, view_of
from toy_recipes import recipe, scene_of, stream_into, transform_named

from qexp.core.learned import Made
from qexp.core.method import Method
from qexp.core.ranges import Clipped
from qexp.core.rng import generator
from qexp.engine.capture import observe
from qexp.engine.reconstruct import Lesson, Reconstruction, Story, reconstruct
from qexp.engine.solving import plan_of, solve_group
from qexp.engine.surroundings import SiteSurroundings
from qexp.engine.transforming import transform_block

IDS = tokens(16)


def method(grid: str = "integer_symmetric", w: int = 4, **settings: object) -> Method:
    made = recipe("kronecker", grid=grid, act="per_token", w=w, a=4, kronecker=settings)
    return replace(made, kv=member("kv", "per_head", kv=4))


@cache
def learned(rate: float = 5e-3, clip_rate: float = 5e-2, steps: int = 32) -> tuple[Reconstruction, Made, Story]:
    """Return block 0 of a toy with loud channels, the start of its maps, and what was learned."""
    view = view_of("llama", torch.float32)
    learner = transform_named("kronecker", rate=rate, clip_rate=clip_rate, training={"steps": steps})
    for norm in (view.blocks[0].input_layernorm, view.blocks[0].post_attention_layernorm):
        norm.weight[[3, 11]] *= 30  # type: ignore[union-attr,index]
    stream, kwargs = stream_into(view, 0, IDS)
    sites = [site for site in learner.sites(view) if site.block == 0]
    groups = view.groups(0)
    stats = observe(view, 0, groups, stream, kwargs)
    behind = {name: g.site for g in groups for name in (layer.name for layer in g.layers)}
    around = {s.name: SiteSurroundings(view, s, stats.get(behind.get(s.readers[0], "")), None) for s in sites}
    plan, scene = plan_of(view, method(), 0), scene_of(view, 0, stream, kwargs)
    part = learner.part(sites, around, generator(0))
    lesson = Lesson("kronecker", learner.training, [part], sites, plan.grids)
    with torch.no_grad():
        start = part.make()
    return Reconstruction(plan, scene, lesson), start, reconstruct(plan, scene, lesson)


def test_what_is_learned_beats_its_start_and_doing_nothing() -> None:
    descent, _, story = learned()
    assert story.outcome.last == pytest.approx(descent.measure())
    assert story.outcome.last < 0.8 * story.outcome.start and story.outcome.last < 0.5 * story.plain
    assert sum(story.outcome.losses[-4:]) < sum(story.outcome.losses[:4])


def test_clips_make_it_better_still() -> None:
    without = learned(clip_rate=0.0)[2]
    assert not without.made.clips.acts and not without.made.clips.weights
    assert learned()[2].outcome.last < without.outcome.last


def test_at_rate_zero_it_is_its_random_start() -> None:
    _, start, story = learned(rate=0.0, clip_rate=0.0, steps=4)
    for name, insert in story.made.inserts.items():
        x = torch.eye(start.inserts[name].map.size, dtype=torch.float64)
        assert torch.equal(insert.map.apply(x), start.inserts[name].map.apply(x))


@pytest.mark.parametrize("grid", ["integer_symmetric", "integer"])
@pytest.mark.parametrize("group", [-1, 8])
def test_a_clipped_grid_fits_the_clamped_weight(grid: str, group: int) -> None:
    W = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plain = member("grid", grid, w=4, g=group)
    for ratios in (torch.ones(5, 1, 2), torch.tensor([0.5, 0.75]).expand(5, 1, 2)):
        clipped, slices = Clipped(plain, ratios), W.detach().unflatten(1, (-1, 24 if group == -1 else group))
        low, high = slices.amin(-1, keepdim=True).clamp(max=0), slices.amax(-1, keepdim=True).clamp(min=0)
        clamped = slices.clamp(low * ratios[0, 0, 0], high * ratios[0, 0, 1]).flatten(1)
        got, want = clipped.fit(W.detach(), None), plain.fit(clamped, None)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert (clipped.bits, clipped.group, clipped.dim) == (4, group, 1)
    assert torch.equal(clipped.decode(clipped.encode(clamped, got), got), plain.decode(plain.encode(clamped, got), got))


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_the_solver_takes_learned_ranges(solver: str) -> None:
    view, made = (
        view_of("llama", torch.float32),
        replace(method(w=3, training={"steps": 4}), solver=member("solver", solver)),
    )
    plan, (stream, kwargs) = plan_of(view, made, 0), stream_into(view, 0, IDS)
    transform_block(plan, scene_of(view, 0, stream, kwargs), stream)
    stats = observe(view, 0, view.groups(0), stream, kwargs)
    for group in view.groups(0):
        ratios = {layer.name: view.linear(layer.name).clips for layer in group.layers}
        before = {name: view.linear(name).weight.clone() for name in ratios}
        assert all(
            r is not None and r.shape == (len(before[name]), 1, 2) and (r < 1).all() for name, r in ratios.items()
        )
        solve_group(plan, group, stats[group.site])
        for name, r in ratios.items():
            want = Clipped(plan.grids[name], r).fit(before[name], None)["scale"]
            assert torch.equal(view.linear(name).params["scale"], want)
            assert not torch.equal(want, plan.grids[name].fit(before[name], None)["scale"])


def test_activation_clips_reach_the_input_path() -> None:
    view, made = view_of("llama", torch.float32), method(training={"steps": 4})
    plan, (stream, kwargs) = plan_of(view, made, 0), stream_into(view, 0, IDS)
    transform_block(plan, scene_of(view, 0, stream, kwargs), stream)
    for group in view.groups(0):
        assert 0.5 < float(view.linear(group.layers[0].name).path.ranges["clip"]) < 1
