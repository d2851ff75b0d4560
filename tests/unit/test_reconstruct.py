"""The engine of everything that learns block by block: methods/block_reconstruction.md section 11, tests 1 to 10."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_members import member
from toy_models import FAMILIES, distance, logits, tokens, view_of
from toy_recipes import a_run, recipe, scene_of, short, stream_into

from qexp.core.learned import NO_CLIPS, Clips, Made, Part
from qexp.core.method import Method
from qexp.core.minimise import Knobs
from qexp.core.rng import generator
from qexp.core.words import BlockReport
from qexp.engine import blocks as walk
from qexp.engine.blocks import activate, quantize_blocks
from qexp.engine.candidate import Candidate, quantizers
from qexp.engine.reconstruct import Lesson, Reconstruction, Scene, reconstruct
from qexp.engine.solving import plan_of
from qexp.engine.streams import advance, embed
from qexp.engine.tuning import tune_model
from qexp.engine.wants import trainings
from qexp.models.view import ModelView

IDS = tokens(16)
SOLVERS = ("flexround", "lrq", "signround", "block_ap")
QUICK = {"steps": 24, "epochs": 0, "batch": 2, "measure_every": 4}
RATES = {
    "flexround": {"rate": 1e-2}, "lrq": {"rate": 1e-2}, "signround": {"rate": 2e-2},
    "block_ap": {"rate": 2e-3, "step_rate": 5e-3, "norm_rate": 2e-3},
}  # fmt: skip
LEARNERS = [*SOLVERS, "let", "affine", "kronecker", "clip", "norm_tweaking", "let+clip", "e2e_qp"]


def learner(name: str, **training: Any) -> Method:
    """Return a recipe that learns what ``name`` says, quickly."""
    settings = {**QUICK, **training}
    method = recipe(w=3, act="per_token_asymmetric", a=8)
    method = replace(method, quantize_stream=True)
    for one in name.split("+"):
        if one in SOLVERS:
            method = replace(method, solver=short(member("solver", one), training=settings, **RATES[one]))
        elif one in ("clip", "norm_tweaking", "e2e_qp"):
            tuner = member("tuner", one)[one]
            rate = {"clip": 5e-2, "norm_tweaking": 1e-2, "e2e_qp": 2e-3}[one]
            method = replace(method, tuner={one: short(tuner, training=settings, rate=rate)})
        else:
            method = replace(method, transform={one: short(member("transform", one)[one], training=settings)})
    return method


def quantized(method: Method, folder: Path, **run: Any) -> tuple[ModelView, list[BlockReport]]:
    """Return a toy with loud channels, quantized, and the reports of its blocks."""
    view = view_of("llama", torch.float32)
    for block in view.blocks:
        block.input_layernorm.weight[[3, 11]] *= 8  # type: ignore[union-attr,index,operator]
    given = replace(a_run(folder), **run)
    reports = quantize_blocks(view, IDS, method, given)
    tune_model(view, IDS, method, given)
    activate(view, range(len(view.blocks)), method)
    return view, reports


def knob_of_q(view: ModelView, rate: float = 1e-3) -> tuple[torch.Tensor, Part]:
    """Return a scale of q's weight as the only thing learned of block 0."""
    name = next(layer.name for layer in view.layers if layer.role == "q")
    factor = torch.ones((), dtype=view.model.dtype).requires_grad_()

    def make() -> Made:
        return Made(weights={f"{name}.weight": view.linear(name).weight * factor})

    return factor, Part([Knobs("factor", [factor], rate)], make)


def lesson_of(part: Part, grids: Any = None, **training: Any) -> Lesson:
    """Return a lesson of one part."""
    settings = member("tuner", "clip")["clip"].training
    return Lesson("test", replace(settings, **{**QUICK, **training}), [part], grids=grids or {})


# 1: streams, and the identity


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_streams_are_the_hidden_states_and_no_step_changes_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = view_of(family)
    before = logits(view.model)
    entering: list[torch.Tensor] = []
    handles = []

    def take(_: Any, args: Any, given: Any) -> None:
        entering.append(args[0] if args else given["hidden_states"])

    for block in view.blocks:
        handles.append(block.register_forward_pre_hook(take, with_kwargs=True))
    view.model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    seen: list[Scene] = []
    real = walk.quantize_block
    monkeypatch.setattr(walk, "quantize_block", lambda *given: (seen.append(given[1]), real(*given))[1])
    method = replace(
        recipe("let", w=16, let={"training": {"steps": 0, "epochs": 0, "floor": "none"}}), kv=member("kv", "none")
    )
    quantize_blocks(view, IDS, method, a_run(tmp_path))
    for scene, state in zip(seen, entering, strict=True):
        assert distance(torch.cat(scene.float), state) < 1e-12
        assert distance(torch.cat(scene.quantized), state) < 1e-9
    assert distance(logits(view.model), before) < 1e-9


# 2 and 10: targets, with each block's own arguments


@pytest.mark.parametrize("family", FAMILIES)
def test_without_quantizers_the_second_target_is_met_and_the_first_only_on_equal_streams(family: str) -> None:
    view = view_of(family)
    plan = plan_of(view, recipe(w=16), 0)
    stream, kwargs = embed(view, IDS[:6])
    for block in range(len(view.blocks)):
        noisy = [x + 0.1 * torch.randn(x.shape, generator=generator(0), dtype=x.dtype) for x in stream]
        for quantized_stream, equal in ((stream, True), (noisy, False)):
            scene = scene_of(view, block, quantized_stream, kwargs[block], stream)
            for t1, t2, zero in ((0.0, 1.0, True), (1.0, 0.0, equal)):
                lesson = lesson_of(Part([], Made), t1=t1, t2=t2, micro=3)
                found = Reconstruction(plan, scene, lesson).measure()
                assert (found < 1e-20) == zero, (block, t1, equal)
        stream = advance(view, block, stream, kwargs[block])


def test_the_student_may_read_either_stream_or_a_mix() -> None:
    view = view_of("llama")
    plan, (stream, kwargs) = plan_of(view, recipe(w=16), 0), stream_into(view, 0, IDS)
    noisy = [x + torch.randn(x.shape, generator=generator(1), dtype=x.dtype) for x in stream]
    scene = scene_of(view, 0, noisy, kwargs, stream)
    loss = {}
    for student in ("q", "fp", "mix"):
        descent = Reconstruction(plan, scene, lesson_of(knob_of_q(view)[1], student=student, t1=1.0, t2=0.0))
        loss[student] = descent.step(range(16))
    assert loss["fp"] < 1e-20 < loss["mix"] < loss["q"]


# 3: what trains is what is kept


@pytest.mark.parametrize("name", [*SOLVERS, "let+clip", "affine+clip", "kronecker"])
@pytest.mark.parametrize("grid", ["integer", "integer_symmetric"])
def test_the_block_that_trains_is_the_block_that_is_kept(name: str, grid: str, tmp_path: Path) -> None:
    view, method = view_of("llama", torch.float32), replace(learner(name), grid=member("grid", grid, w=3, g=8))
    plan, (stream, kwargs) = plan_of(view, method, 0), stream_into(view, 0, IDS)
    scene = scene_of(view, 0, stream, kwargs)
    kept = walk.quantize_block(plan, scene, a_run(tmp_path))
    told = next(iter(kept.report.learned.values()))
    training = next(iter(trainings(method).values()))
    lesson = Lesson("again", replace(training, held_out=training.held_out), [])
    now = Reconstruction(plan, scene, lesson).measure()
    last = told["best"] if training.select == "best" else told["last"]
    assert now == pytest.approx(min(last, told["plain"]) if training.floor == "rtn" else last, rel=2e-5)
    other = view_of("llama", torch.float32)
    walk.install(other, 0, kept, plan.grids)
    for layer in (layer for layer in view.layers if layer.block == 0):
        ours, theirs = view.linear(layer.name), other.linear(layer.name)
        assert ours.codes is not None and theirs.codes is not None and torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.weight, theirs.weight)
    assert Reconstruction(replace(plan, view=other), scene, lesson).measure() == now


# 4: gradients by way of leaves


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_gradients_through_leaves_are_plain_gradients(micro: int) -> None:
    view = view_of("llama")
    plan = plan_of(view, recipe(w=3, act="per_token", a=4), 0)  # or no map would make a difference
    stream, kwargs = stream_into(view, 0, IDS)
    transform = member("transform", "kronecker")["kronecker"]
    sites = [site for site in transform.sites(view) if site.block == 0 and site.kind != "mlp_mid"]
    places = [site for site in sites if site.kind in ("value", "attn_out")]
    maps = {site.name: transform._start(site, None, generator(0)) for site in places}
    factor, part = knob_of_q(view)
    leaves = [t.requires_grad_() for parts in maps.values() for t in parts.values()]
    from qexp.stages.transform.kronecker import _insert

    def make() -> Made:
        inserts = {site.name: _insert(site, maps[site.name]) for site in sites if site.name in maps}
        return Made(inserts) | part.make()

    both = Part([Knobs("maps", leaves, 0.1), *part.knobs], make)
    lesson = replace(lesson_of(both, plan.grids, micro=micro, t2=0.0), sites=sites)
    scene = scene_of(view, 0, [x * 1.1 for x in stream], kwargs, stream)
    descent = Reconstruction(plan, scene, lesson)
    descent.step([0, 1, 2, 3])
    got = [t.grad.clone() for t in (*leaves, factor)]  # type: ignore[union-attr]
    for t in (*leaves, factor):
        t.grad = None
    candidate = Candidate(view, sites)
    with torch.enable_grad(), quantizers(view, plan.method, [0]):
        made = make()
        weights = candidate.weights(made, 0, plan.grids)
        answer = candidate.answer(made, 0, weights, torch.cat(scene.quantized)[:4], kwargs)
        ((answer - torch.cat(scene.answers_float)[:4]).pow(2).mean() / descent.scale).backward()
    for mine, t in zip(got, (*leaves, factor), strict=True):
        assert t.grad is not None and distance(mine, t.grad) < 1e-10


def test_memory_that_ends_halves_the_micro_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    view = view_of("llama")
    plan, (stream, kwargs) = plan_of(view, recipe(w=16), 0), stream_into(view, 0, IDS)
    factor, part = knob_of_q(view)
    descent = Reconstruction(
        plan, scene_of(view, 0, [x * 1.1 for x in stream], kwargs, stream), lesson_of(part, t2=0.0)
    )
    whole = descent.step(range(8))
    gradient, factor.grad = factor.grad, None
    real = Candidate.answer

    def small(self: Candidate, made: Made, block: int, weights: Any, x: torch.Tensor, given: Any) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(self, made, block, weights, x, given)

    monkeypatch.setattr(Candidate, "answer", small)
    assert descent.step(range(8)) == pytest.approx(whole, rel=1e-12)
    assert gradient is not None and factor.grad is not None and distance(factor.grad, gradient) < 1e-12
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory with 8 sequences at once: 4 from now on", "out of memory with 4 sequences at once: 2 from now on"
    ]  # fmt: skip
    monkeypatch.setattr(Candidate, "answer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        descent.step(range(8))


# 5: never worse than the start


@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_kept_is_never_worse_than_the_start(name: str, tmp_path: Path) -> None:
    _, reports = quantized(learner(name, select="best", held_out=0.25), tmp_path)
    if name == "e2e_qp":
        return  # of the whole model: test_tuner
    for report in reports:
        (facts,) = report.learned.values()
        assert facts["best"] <= facts["start"] and not facts["degraded"]
    assert any(facts["best"] < 0.98 * facts["start"] for r in reports for facts in r.learned.values()), "it learns"


def test_plain_rounding_is_a_candidate(tmp_path: Path) -> None:
    """Maps that start far off and never move lose against no maps at all."""
    method = learner("kronecker", select="best", floor="rtn", steps=1)
    method = replace(method, transform={"kronecker": replace(method.transform["kronecker"], rate=0.0, clip_rate=0.0)})  # type: ignore[type-var]
    method = replace(method, grid=member("grid", "integer", w=8, g=-1))
    view, reports = quantized(method, tmp_path)
    facts = reports[0].learned["kronecker"]
    online = any(view.linear(layer.name).path.maps for layer in view.layers if layer.block == 0)
    assert online == (facts["best"] <= facts["plain"])
    worse = learner("kronecker", select="last", floor="none", steps=1)
    assert any(quantized(worse, tmp_path / "b")[0].linear(layer.name).path.maps for layer in view.layers)


# 8: numbers that are not finite


@pytest.mark.parametrize("bad", ["once", "always"])
def test_a_loss_that_is_no_number_is_survived(
    bad: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    view = view_of("llama")
    plan, (stream, kwargs) = plan_of(view, recipe(w=16), 0), stream_into(view, 0, IDS)
    factor, part = knob_of_q(view, rate=1e-2)
    scene = scene_of(view, 0, [x * 1.1 for x in stream], kwargs, stream)
    steps, real = [0], Reconstruction.step

    def step(self: Reconstruction, chosen: Sequence[int]) -> float:
        steps[0] += 1
        found = real(self, chosen)
        return float("nan") if bad == "always" or steps[0] == 7 else found

    monkeypatch.setattr(Reconstruction, "step", step)
    story = reconstruct(plan, scene, lesson_of(part, t2=0.0))
    assert bool(factor.isfinite()) and story.outcome.best <= story.outcome.start
    assert (story.outcome.retries, story.outcome.degraded) == ((1, False) if bad == "once" else (3, True))
    assert ("diverged at every rate" in caplog.text) == (bad == "always")
    if bad == "once":
        assert story.outcome.best < story.outcome.start, "it went on at half the rate"


@pytest.mark.parametrize("name", ["clip", "let", "flexround", "block_ap"])
def test_a_rate_of_ten_ends_in_the_best_state_marked_degraded(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = learner(name, steps=40)
    if name == "clip":
        method = replace(method, tuner={"clip": replace(method.tuner["clip"], rate=1000.0)})  # type: ignore[type-var]
    elif name == "let":
        method = replace(method, transform={"let": replace(method.transform["let"], rate=10.0)})  # type: ignore[type-var]
    else:
        rates = {"rate": 10.0} if name == "flexround" else {"rate": 10.0, "step_rate": 10.0}
        method = replace(method, solver=replace(method.solver, **rates))  # type: ignore[type-var]
    view, reports = quantized(method, tmp_path)
    facts = [f for report in reports for f in report.learned.values()]
    assert any(f["degraded"] for f in facts) and "diverged at every rate tried" in caplog.text
    assert all(f["best"] <= f["start"] for f in facts)
    assert bool(logits(view.model, IDS).isfinite().all())


# 9: places, and seeds


@pytest.mark.parametrize(
    "name", ["norm_tweaking", *(pytest.param(name, marks=pytest.mark.slow) for name in ("let+clip", "block_ap"))]
)
def test_seeds_decide_and_places_of_streams_do_not(name: str, tmp_path: Path) -> None:
    method = learner(name, t2=1.0, student="mix")
    views = {
        place: quantized(method, tmp_path / place, streams=place)[0] for place in ("host", "device", "disk", "auto")
    }
    first = views["host"].model.state_dict()
    for view in views.values():
        assert all(torch.equal(value, first[key]) for key, value in view.model.state_dict().items())
    again, _ = quantized(method, tmp_path / "seed", seed=1)
    assert any(not torch.equal(value, first[key]) for key, value in again.model.state_dict().items())
    assert list(tmp_path.glob("disk/tmp*")) == [], "streams on disk have no names"


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams of several micro-batches, the last one smaller."""
    from qexp.engine import streams

    monkeypatch.setattr(streams, "MICRO_TOKENS", 5 * IDS.shape[1])
    yield


def test_clips_and_parts_add_up() -> None:
    one, two = Made(clips=Clips({"a": torch.ones(())}, {})), Made(weights={"w": torch.zeros(2)})
    both = one | two
    assert both.clips.acts.keys() == {"a"} and both.weights.keys() == {"w"} and (Made() | Made()).clips == NO_CLIPS
