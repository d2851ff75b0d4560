"""Solve the layers of one input group: equal grids are stacked along rows and solved at once.

Rows do not interact in any solver (each row has its own grid), so stacking q, k and v gives the identical codes with
one factorisation and a third of the column loop. A grid with one range for the whole tensor is not stacked.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from qexp.core.linear import QuantLinear
from qexp.core.stages import Grid, Method
from qexp.core.words import FULL_BITS, Group, Layer, LayerReport, Quantized, Stats
from qexp.models.view import ModelView

Grids = dict[str, Grid]


def grids_of(view: ModelView, method: Method) -> Grids:
    """Return the grid of every layer at the bits its allocation gives; layers at 16 bits have none."""

    def no_sensitivity(layer: Layer, bits: int) -> float:
        raise NotImplementedError("no allocation of this version asks for sensitivities")

    bits = method.allocation.assign(view.layers, no_sensitivity)
    return {a.name: method.grid.for_layer(a, bits[a.name]) for a in view.layers if bits[a.name] < FULL_BITS}


@torch.no_grad()
def solve_group(
    view: ModelView, group: Group, stats: Stats | None, method: Method, grids: Grids, rng: torch.Generator
) -> list[LayerReport]:
    """Quantize the layers of ``group`` in place and report on each."""
    reports = []
    layers = [layer for layer in group.layers if layer.name in grids]
    for grid, members in groupby(layers, key=lambda layer: grids[layer.name]):
        part = list(members)
        for stack in [part] if grid.group else [[layer] for layer in part]:
            reports += _solve_stack(view, stack, stats, method, grid, rng)
    return reports


def _solve_stack(
    view: ModelView, stack: list[Layer], stats: Stats | None, method: Method, grid: Grid, rng: torch.Generator
) -> list[LayerReport]:
    linears = [view.linear(layer.name) for layer in stack]
    W_OI = torch.cat([linear.weight.float() for linear in linears])
    solved = method.solver.solve(W_OI, stats, grid, rng)
    reports, row = [], 0
    for layer, linear in zip(stack, linears, strict=True):
        rows = slice(row, row + layer.outputs)
        row += layer.outputs
        own = Quantized(solved.codes[rows], {k: v if v.shape[0] == 1 else v[rows] for k, v in solved.params.items()})
        reports.append(_installed(layer, linear, own, grid, stats))
    return reports


def _installed(layer: Layer, linear: QuantLinear, own: Quantized, grid: Grid, stats: Stats | None) -> LayerReport:
    W = linear.weight.float().clone()
    linear.install(grid, own)
    D = linear.weight.float() - W
    error = None if stats is None else _quadratic(D, stats.H_II) / max(_quadratic(W, stats.H_II), 1e-30)
    sqnr = 10 * torch.log10(W.pow(2).sum() / D.pow(2).sum().clamp(min=1e-30))
    return LayerReport(layer.name, grid.cost(layer.outputs, layer.inputs), error, float(sqnr))


def _quadratic(D: Tensor, H: Tensor) -> float:
    """Return tr(D H Dᵀ): the squared output error over the calibration tokens, per token."""
    return float(((D @ H.to(D)) * D).sum())
