"""Screen 2: the walk over the decoder blocks.

One stream of hidden states enters each block: behind the blocks that are quantized already, or as the float model
computes it (``method.inputs=float``). A block is quantized in one order for every method: block-scope transforms, then
layer group by layer group in forward order (with ``method.inputs=quantized`` each sees the groups before it quantized).
A finished block goes to disk and is never computed again; a resumed run installs it and replays the forwards, so that
it ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from qexp.core.stages import Method
from qexp.core.words import FULL_BITS, BlockReport
from qexp.engine.acting import act_of, calibrate, has_work
from qexp.engine.capture import observe
from qexp.engine.context import Run
from qexp.engine.solving import Plan, plan_of, solve_group
from qexp.engine.store import Finished, install, pack_block
from qexp.engine.streams import Kwargs, Stream, advance, embed
from qexp.engine.transforming import transform_block
from qexp.models.view import ModelView


@torch.no_grad()
def quantize_blocks(view: ModelView, tokens: Tensor, method: Method, run: Run) -> list[BlockReport]:
    """Quantize all blocks in place with calibration ``tokens`` int64 [N, S]; return one report per block."""
    plan = plan_of(view, method, run.seed, run.progress)
    if not has_work(method, plan.grids):
        return []  # 16 bits everywhere: nothing to walk for
    stream, kwargs = embed(view, tokens)
    reports = []
    for block in run.progress("quantize blocks", range(len(view.blocks))):
        last = block + 1 == len(view.blocks)  # nothing reads what it answers
        following = advance(view, block, stream, kwargs[block]) if method.inputs == "float" and not last else None

        def make(block: int = block, stream: Stream = stream) -> Finished:
            return quantize_block(plan, block, stream, kwargs[block])

        finished = run.store.once(f"{block:05d}", make)
        install(view, block, finished, plan.grids)
        if method.quantize_stream:
            activate(view, [block], method)
            view.replays.clear()  # what they keep was computed before the quantizers were on
        if not last:
            stream = advance(view, block, stream, kwargs[block]) if following is None else following
        view.replays.clear()
        reports.append(finished.report)
    return reports


def quantize_block(plan: Plan, block: int, source: Stream, kwargs: Kwargs) -> Finished:
    """Return a block transformed and solved; ``source`` (may be empty) feeds the statistics."""
    view, method, began = plan.view, plan.method, time.perf_counter()
    groups = view.groups(block)
    report = BlockReport(index=block, seconds=0.0, losses=transform_block(plan, block, source, kwargs))
    in_turn = bool(source) and method.inputs == "quantized"
    known = observe(view, block, groups, source, kwargs) if source and not in_turn else {}
    for group in groups:
        if in_turn:
            known = observe(view, block, [group], source, kwargs)
        calibrate(view, act_of(method, group), group, known.get(group.site))
        report.layers += solve_group(plan, group, known.get(group.site))
        if in_turn:
            view.finish(group)
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
