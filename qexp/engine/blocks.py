"""Screen 2: the walk over the decoder blocks.

Two streams enter each block: y as the float model computes it, x behind the blocks that are already quantized.
A block is quantized in one order for every method: statistics, block-scope transforms, then layer group by layer group
in forward order (each group sees the groups before it quantized). A finished block goes to disk and is never computed
again; a resumed run installs it and replays the forwards, so that it ends with the same bits.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from qexp.core.rng import generator
from qexp.core.stages import Method
from qexp.core.words import FULL_BITS, BlockReport
from qexp.engine.capture import observe
from qexp.engine.context import Run
from qexp.engine.solving import Grids, grids_of, solve_group
from qexp.engine.store import Finished, install, pack_block
from qexp.engine.streams import Kwargs, Stream, advance, embed
from qexp.engine.transforming import transform_block
from qexp.models.view import ModelView


@torch.no_grad()
def quantize_blocks(view: ModelView, tokens: Tensor, method: Method, run: Run) -> list[BlockReport]:
    """Quantize all blocks in place with calibration ``tokens`` int64 [N, S]; return one report per block."""
    grids = grids_of(view, method)
    x, kwargs = embed(view, tokens)
    y, reports = x, []
    for block in run.progress("quantize blocks", range(len(view.blocks))):
        float_out = advance(view, block, y, kwargs[block]) if method.inputs == "float" else y
        source = y if method.inputs == "float" else x

        def make(block: int = block, source: Stream = source) -> Finished:
            return quantize_block(view, block, source, kwargs[block], method, grids, run.seed)

        finished = run.store.once(f"{block:05d}", make)
        install(view, block, finished, grids)
        if method.quantize_stream:
            activate(view, block, method)
        x, y = advance(view, block, x, kwargs[block]), float_out
        reports.append(finished.report)
    for block in range(len(view.blocks)):
        activate(view, block, method)
    return reports


def quantize_block(
    view: ModelView, block: int, source: Stream, kwargs: Kwargs, method: Method, grids: Grids, seed: int
) -> Finished:
    """Return block ``block`` transformed and solved; ``source`` feeds the statistics."""
    began, groups = time.perf_counter(), view.groups(block)
    transform_block(view, block, source, kwargs, method, grids, seed)
    report = BlockReport(index=block, seconds=0.0)
    known = observe(view, block, groups, source, kwargs) if source and method.inputs == "float" else {}
    for group in groups:
        stats = known.get(group.site) or (observe(view, block, [group], source, kwargs)[group.site] if source else None)
        report.layers += solve_group(view, group, stats, method, grids, generator(seed, group.site))
    report.seconds = time.perf_counter() - began
    return pack_block(view, block, report, {name: grid.bits for name, grid in grids.items()})


def activate(view: ModelView, block: int, method: Method) -> None:
    """Switch the activation and key/value quantizers of a block on, where the recipe quantizes at all."""
    for group in view.groups(block):
        if method.act.bits < FULL_BITS:
            view.linear(group.layers[0].name).path.act = method.act.freeze(None)
    door = view.door(block)
    if door is not None and method.kv.bits < FULL_BITS:
        door.kv = method.kv
