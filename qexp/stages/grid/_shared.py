"""What grids share: slices of a weight that share parameters, and the checks of shapes and settings."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from qexp.core.errors import NumericalError, UserError
from qexp.core.words import FULL_BITS, Layer


def check_shape(bits: int, group: int, layer: Layer, key: str = "bits.group") -> None:
    """Raise UserError for a width that means nothing, or a group that does not divide the layer's columns."""
    if not 2 <= bits <= 8 and bits != FULL_BITS:
        raise UserError(f"grid.bits={bits}", f"2 to 8, or {FULL_BITS} for none", "bits.weight=4")
    if group < -1 or (group > 0 and layer.inputs % group):
        fits = max(g for g in range(1, layer.inputs + 1) if layer.inputs % g == 0 and g <= max(group, 1))
        got = f"grid.group={group} does not divide in_features={layer.inputs} of {layer.name}"
        raise UserError(got, f"a divisor of {layer.inputs}", f"{key}={fits} or -1")


def slices(W_OJ: Tensor, group: int) -> Tensor:
    """Return the weight as slices [O, G, g]: g = ``group`` columns, -1 the whole row, 0 the whole tensor [1, 1, OJ]."""
    if group == 0:
        return W_OJ.reshape(1, 1, -1)
    return W_OJ.reshape(len(W_OJ), -1, W_OJ.shape[1] if group == -1 else group)


def check_sliced(bits: int, group: int, layer: Layer, key: str = "bits.group") -> None:
    """Raise UserError as :func:`check_shape`, and for a grid whose parameters cannot be those of a whole weight."""
    check_shape(bits, group, layer, key)
    if group == 0:
        raise UserError("grid.group=0, one set of values for a whole weight", "rows or groups", f"{key}=-1")


def check_finite(W_OJ: Tensor) -> None:
    """Raise NumericalError for a weight that is not finite."""
    if not W_OJ.isfinite().all():
        raise NumericalError("the weight has elements that are not finite")


def check_ratios(least: float, most: float, step: float) -> None:
    """Raise UserError for ratios that cannot be searched."""
    if not 0 < least <= most or step <= 0:
        got = f"grid.least_ratio={least}, most_ratio={most}, ratio_step={step}"
        raise UserError(got, "0 < least <= most, and a step", "method.grid.least_ratio=0.5")


def ratios(least: float, most: float, step: float) -> list[float]:
    """Return the ratios from least to most."""
    return [least + i * step for i in range(int((most - least) / step + 1e-6) + 1)]


def diagonal(H_JJ: Tensor | None, W_OJ: Tensor) -> Tensor:
    """Return what an error of each column counts, [J] in the dtype of W: diag H, or one."""
    return W_OJ.new_ones(W_OJ.shape[1]) if H_JJ is None else H_JJ.diagonal().to(W_OJ)


class Grouped(Protocol):
    """A grid whose slices share parameters."""

    @property
    def group(self) -> int:
        """Return how many columns share parameters; -1 is the whole row, 0 the whole tensor."""
        ...


def columns(grid: Grouped, outputs: int, inputs: int) -> int:
    """Return how many weights share parameters."""
    return {-1: inputs, 0: outputs * inputs}.get(grid.group, grid.group)
