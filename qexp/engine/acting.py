"""Activation quantizers with calibrated ranges: when ranges are taken, and what a search sees in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from qexp.core.method import Method
from qexp.core.stages import Act, Grid
from qexp.core.words import FULL_BITS, Group, Params, Stats
from qexp.models.view import ModelView

NO_RANGES: Params = {}


def act_of(method: Method, group: Group) -> Act:
    """Return the activation quantizer of one input, at the bits its readers get."""
    if method.act.bits >= FULL_BITS:
        return method.act
    bits = max(method.allocation.act_bits(layer, method.act.bits) for layer in group.layers)
    return method.act if bits == method.act.bits else replace(cast("Any", method.act), bits=bits)


def has_work(method: Method, grids: Mapping[str, Grid]) -> bool:
    """Return whether anything of a recipe happens block by block; ``grids`` are those of the quantized layers."""
    return bool(grids) or bool(method.stage("block")) or is_calibrated(method.act)


def is_calibrated(act: Act) -> bool:
    """Return whether the quantizer keeps ranges of every input."""
    return act.bits < FULL_BITS and "activations" in act.needs


def calibrate(view: ModelView, act: Act, group: Group, stats: Stats | None) -> None:
    """Keep the ranges of one input, behind all its maps, where the quantizer wants them."""
    if is_calibrated(act):
        assert stats is not None, "a calibrated quantizer without calibration"
        path = view.linear(group.layers[0].name).path
        quantized = slice(0, len(stats.low_I) - path.kept)
        path.ranges = act.fit(stats.low_I[quantized], stats.high_I[quantized])


def search_quantizer(
    act: Act, clip: Tensor | None = None, ranges: Params = NO_RANGES
) -> Callable[[Tensor], Tensor] | None:
    """Return what stands for ``act`` while something is tried: with ``ranges`` if known, else those of each batch."""
    if act.bits >= FULL_BITS:
        return None
    if not is_calibrated(act):
        return act.freeze(ranges if clip is None else {"clip": clip})
    if ranges:
        return act.freeze(ranges)

    def quantize(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        return act.freeze(act.fit(rows.amin(0).float(), rows.amax(0).float()))(x)

    return quantize
