"""Screen 2: the walk over the decoder blocks. In front of it bits and squared gradients are measured, where asked for.

Two streams of hidden states travel along: behind the blocks that are quantized already, and as the float model has
them, each only where the recipe reads it. A block is quantized in one order for every method: block-scope transforms,
then the layers, group by group in forward order (with ``method.inputs=quantized`` each sees the groups before it
quantized) or learned all together, then tuners. A finished block goes to disk and is never computed again; a resumed
run installs it and replays the forwards, so that it ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from qexp.core.learned import LearnedSolver
from qexp.core.method import Method
from qexp.core.words import FULL_BITS, BlockReport, Stats
from qexp.engine.acting import act_of, calibrate, has_work, is_calibrated
from qexp.engine.capture import observe
from qexp.engine.context import Run
from qexp.engine.fisher import take_fisher
from qexp.engine.learned_record import keep_learned
from qexp.engine.reconstruct import Scene
from qexp.engine.rounding import learn_roundings
from qexp.engine.sensitivity import take_bits
from qexp.engine.shared import float_answers, named
from qexp.engine.solving import Plan, plan_of, solve_group
from qexp.engine.store import Finished, install, pack_block
from qexp.engine.streams import Keep, advance, embed
from qexp.engine.transforming import transform_block
from qexp.engine.tuning import before_rounding, tune_block
from qexp.engine.wants import changes_norms, wants_of
from qexp.models.view import ModelView


@torch.no_grad()
def quantize_blocks(view: ModelView, tokens: Tensor, method: Method, run: Run) -> list[BlockReport]:
    """Quantize all blocks in place with calibration ``tokens`` int64 [N, S]; return one report per block."""
    take_bits(view, tokens, method, run)
    plan, wants = plan_of(view, method, run.seed, run.progress), wants_of(method)
    if not has_work(method, plan.grids):
        return []  # 16 bits everywhere: nothing to walk for
    take_fisher(view, tokens, method, run)
    keep = run.shelf(view, tokens, wants.streams).keep
    stream, kwargs = embed(view, tokens, keep)
    quantized = stream if wants.quantized else []
    floating = named(view, tokens, stream, run.shared, f"{method.transform} {run.seed}") if wants.float else []
    del stream
    reports = []
    for block in run.progress("quantize blocks", range(len(view.blocks))):
        last = block + 1 == len(view.blocks)  # nothing reads what it answers
        truth = float_answers(view, block, floating, kwargs[block], keep) if wants.answers_float(last) else []
        scene = Scene(block, kwargs[block], quantized, floating, truth, [])
        finished = run.store.once(f"{block:05d}", partial(quantize_block, plan, scene, run, keep if wants.t2 else None))
        install(view, block, finished, plan.grids)
        if method.quantize_stream:
            activate(view, [block], method)
            view.replays.clear()  # what they keep was computed before the quantizers were on
        if wants.quantized and not last:
            quantized = advance(view, block, quantized, kwargs[block], keep)
        view.replays.clear()
        floating = truth
        del scene  # and with it the streams that nobody reads any more
        reports.append(finished.report)
    return reports


def quantize_block(plan: Plan, scene: Scene, run: Run, keep: Keep | None = None) -> Finished:
    """Return a block transformed, solved and tuned; the stream that feeds statistics may be empty.

    ``keep`` is where the float block's answers to the quantized stream are kept, if they are a target.
    """
    scene = scene if keep is None else scene.answered(plan.view, keep)
    view, method, began, block, kwargs = plan.view, plan.method, time.perf_counter(), scene.block, scene.kwargs
    groups, report = view.groups(block), BlockReport(index=block, seconds=0.0)
    source = scene.float if method.inputs == "float" else scene.quantized
    stories, seen = transform_block(plan, scene, source), dict[str, Stats]()
    before = before_rounding(plan, block)
    in_turn = bool(source) and method.inputs == "quantized" and not isinstance(method.solver, LearnedSolver)
    known = observe(view, block, groups, source, kwargs) if source and not in_turn else {}
    for group in groups:
        if in_turn:
            known = observe(view, block, [group], source, kwargs)
        seen |= known
        calibrate(view, act_of(method, group), group, known.get(group.site))
        if not isinstance(method.solver, LearnedSolver):
            report.layers += solve_group(plan, group, known.get(group.site))
        if in_turn:
            view.finish(group)
    if isinstance(method.solver, LearnedSolver):
        report.layers, story = learn_roundings(plan, scene, method.solver, known)
        stories |= {"solver": story} if story else {}
    stories |= tune_block(plan, scene, before, seen)
    if changes_norms(method) and is_calibrated(method.act):
        known = observe(view, block, groups, source, kwargs)
        for group in groups:
            calibrate(view, act_of(method, group), group, known[group.site])
    keep_learned(run, report, stories)
    report.seconds = time.perf_counter() - began
    return pack_block(view, block, report)


def activate(view: ModelView, blocks: Iterable[int], method: Method) -> None:
    """Switch the activation and key/value quantizers of blocks on, where the recipe quantizes at all."""
    for block in blocks:
        for group in view.groups(block):
            if method.act.bits < FULL_BITS:
                path = view.linear(group.layers[0].name).path
                path.act = act_of(method, group).freeze(path.ranges)
        door = view.door(block)
        if door is not None and method.kv.bits < FULL_BITS:
            door.kv = method.kv
