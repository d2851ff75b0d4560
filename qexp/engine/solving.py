"""Solve the layers of one input group: equal grids are stacked along rows and solved at once.

Rows do not interact in any solver, so stacking q, k and v gives the identical codes with one factorisation and a third
of the column loop, where each row has its own grid. One range for the whole tensor (group 0) is not stacked; the second
scale of NVFP4 is that of the stack, as serving stacks share it among fused layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from qexp.core.linear import QuantLinear
from qexp.core.measures import Measured, Measures
from qexp.core.method import Method
from qexp.core.ranges import sensed, within
from qexp.core.rng import generator
from qexp.core.stages import Grid, Solver
from qexp.core.words import FULL_BITS, Group, Layer, LayerReport, Quantized, Stats
from qexp.engine.context import MicroBatches, Progress, quiet
from qexp.kernels.gram import add_gram
from qexp.models.view import ModelView

Grids = dict[str, Grid]
KEPT_DAMPING = 0.01  # of the mean of diag H, as GPTQ damps


@dataclass(frozen=True)
class Plan:
    """What stays the same from block to block; ``grids`` has the layers that are quantized."""

    view: ModelView
    method: Method
    grids: Grids
    seed: int
    progress: Progress
    micro: MicroBatches = field(default_factory=MicroBatches)


def plan_of(view: ModelView, method: Method, seed: int, progress: Progress = quiet) -> Plan:
    """Return the plan with the grid of every layer at the bits its allocation gives; 16 bits mean no grid."""
    bits = view.allocation["bits"] if view.allocation else plain_bits(view, method)
    quantized = [layer for layer in view.layers if bits[layer.name] < FULL_BITS]
    grids = {a.name: method.grid.for_layer(a, bits[a.name]) for a in quantized}
    return Plan(view, method, grids, seed, progress)


def plain_bits(view: ModelView, method: Method) -> dict[str, int]:
    """Return bits by layer of an allocation that measures nothing; of one that does, before it has, the recipe's."""
    if isinstance(method.allocation, Measured):
        return {layer.name: method.grid.bits for layer in view.layers}
    return method.allocation.assign(view.layers, cast("Measures", None))


@torch.no_grad()
def solve_group(plan: Plan, group: Group, stats: Stats | None) -> list[LayerReport]:
    """Quantize the layers of ``group`` in place and report on each."""
    reports = []
    layers = [layer for layer in group.layers if layer.name in plan.grids]
    for grid, members in groupby(layers, key=lambda layer: plan.grids[layer.name]):
        part = list(members)
        for stack in [part] if grid.group != 0 else [[layer] for layer in part]:
            reports += _solve_stack(plan, stack, grid, stats)
    return reports


def _solve_stack(plan: Plan, stack: list[Layer], grid: Grid, stats: Stats | None) -> list[LayerReport]:
    linears = [plan.view.linear(layer.name) for layer in stack]
    kept = linears[0].path.kept  # their columns take up errors: the solver's helper wants them, too
    W_OI, rng = torch.cat([linear.dense() for linear in linears]).float(), generator(plan.seed, stack[0].name)
    cut = fitted_grid(plan, [layer.name for layer in stack])
    if kept:
        solved = solve_beside(plan.method.solver, W_OI, kept, stats, cut, rng)
    else:
        solved = plan.method.solver.solve(W_OI, stats, cut, rng)
    reports, row = [], 0
    for layer, linear in zip(stack, linears, strict=True):
        rows = slice(row, row + layer.outputs)
        row += layer.outputs
        params = {name: value[rows] for name, value in solved.params.items()}
        own = Quantized(solved.codes[rows], params, None if solved.kept is None else solved.kept[rows])
        reports.append(installed(layer, linear, own, grid, stats))
    return reports


def fitted_grid(plan: Plan, names: list[str]) -> Grid:
    """Return the grid of layers that are solved together, with what it is fitted by: learned ranges, gradients."""
    grid, linears = plan.grids[names[0]], [plan.view.linear(name) for name in names]
    ratios = [linear.clips for linear in linears if linear.clips is not None]  # of all that share an input, or of none
    if "fisher" in grid.needs:
        grid = sensed(grid, torch.cat([plan.view.linear(name).left(plan.view.fisher_of(name)) for name in names]))
    return within(grid, torch.cat(ratios)) if ratios else grid


def installed(layer: Layer, linear: QuantLinear, own: Quantized, grid: Grid, stats: Stats | None) -> LayerReport:
    """Put the codes into the layer and report on them."""
    W = linear.weight.float().clone()
    linear.install(grid, own)
    linear.clips = None  # they have served
    D = linear.weight.float() - W
    error = None if stats is None else quadratic(D, stats.H_II) / max(quadratic(W, stats.H_II), 1e-30)
    sqnr = 10 * torch.log10(W.pow(2).sum() / D.pow(2).sum().clamp(min=1e-30))
    return LayerReport(layer.name, linear.cost(), error, float(sqnr))


def solve_beside(
    solver: Solver, W_OI: Tensor, kept: int, stats: Stats | None, grid: Grid, rng: torch.Generator
) -> Quantized:
    """Quantize all but the last ``kept`` columns K, which then take up the errors E of the others.

    The best answer of K is W_K + E H_QK H_KK⁻¹, and with it the others feel the Hessian H_QQ - H_QK H_KK⁻¹ H_KQ: what a
    sweep that reaches K last would see of it, for any solver. Source: arXiv:2310.09259 section 3; methods/quik.md.
    """
    W_OQ, W_OK = W_OI[:, :-kept], W_OI[:, -kept:]
    if stats is None:
        solved = solver.solve(W_OQ, None, grid, rng)
        return Quantized(solved.codes, solved.params, W_OK)
    H = stats.H_II.double()
    H_KK = H[-kept:, -kept:] + KEPT_DAMPING * H.diagonal().mean() * torch.eye(kept, dtype=H.dtype, device=H.device)
    answer_QK = torch.linalg.solve(H_KK, H[-kept:, :-kept]).T  # H_QK H_KK⁻¹
    H_QQ = H[:-kept, :-kept] - answer_QK @ H[-kept:, :-kept]
    seen = replace(first_columns(stats, len(H) - kept), H_II=H_QQ.to(W_OI))
    solved = solver.solve(W_OQ, seen, grid, rng)
    E_OQ = (W_OQ - grid.decode(solved.codes, solved.params)).double()
    return Quantized(solved.codes, solved.params, (W_OK + E_OQ @ answer_QK).to(W_OI))


def first_columns(stats: Stats, count: int) -> Stats:
    """Return the statistics of the first channels alone."""
    if count == len(stats.low_I):
        return stats
    front = {name: getattr(stats, name)[..., :count] for name in ("low_I", "high_I", "mean_abs_I", "rows_TI")}
    return Stats(tokens=stats.tokens, H_II=stats.H_II[:count, :count], **front)


def quadratic(D: Tensor, H: Tensor) -> float:
    """Return tr(D H Dᵀ) = tr(DᵀD H) for D [O, I]: the squared output error per calibration token."""
    G = torch.zeros(H.shape, dtype=torch.float64, device=H.device)
    add_gram(G, D)
    products = G.mul_(H)  # zeros below the diagonal
    return float(2 * products.sum() - products.diagonal().sum())
