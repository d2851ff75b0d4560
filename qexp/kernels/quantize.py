"""Dynamic fake quantization of activations: each token (or group of a token) is rounded to its own uniform grid.

Symmetric: s = clip max|x| / (2^(b-1) - 1), x^ = s clamp(round(x / s), -2^(b-1), 2^(b-1) - 1).
Asymmetric: s = clip (max - min) / (2^b - 1), z = round(-clip min / s),
x^ = s (clamp(round(x / s) + z, 0, 2^b - 1) - z);
a token's range is first widened to contain 0, a group's is not, and z is not clamped. Rounding is half to even. With
``half``, s and z are what float16 holds: s is rounded to it first, and its floor of 2^-10 max|x| keeps |z| in 2^10.

This runs before every linear of an evaluation. On a CPU the compiled kernel reads each row once from memory; without it
torch makes two reductions over x and then rounds in place, in chunks of rows that stay in cache: the same numbers, bit
for bit. Where a gradient is asked for, torch computes and round passes it straight through.

Source: methods/rtn.md section 3, methods/quarot.md section 3.7. Differs: the reciprocal of s is taken once (kernels.md
section 7), and s has a floor of float resolution in place of special cases for zero and constant rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qexp.kernels import ops

assert "fake_quantize" in ops.OPS  # importing it is what defines torch.ops.qexp
COMPILED = (torch.float32, torch.bfloat16, torch.float16)
HALF_EPSILON, HALF_TINY = 2.0**-10, 2.0**-24  # of float16
CHUNK_ELEMENTS = 1 << 18  # 1 MB of float32: the second-level cache of one core


def fake_quantize_per_token(x: Tensor, bits: int, symmetric: bool, clip: float | Tensor) -> Tensor:
    """Round each row of x to its own grid of 2^bits values and return it dequantized.

    Shapes: x [..., I] -> same shape and dtype. Arithmetic in float32 for 16-bit x, else in the dtype of x.
    Units: clip is a fraction of the row's range, a tensor [] where it is learned.
    A row with NaN or Inf becomes NaN; the others do not notice.
    """
    return _fake(x, bits, x.shape[-1], symmetric, True, clip)


def fake_quantize_groups(
    x: Tensor, bits: int, group: int, symmetric: bool, clip: float | Tensor, half: bool = False
) -> Tensor:
    """Round each group of consecutive columns to its own grid, else as :func:`fake_quantize_per_token`.

    Shapes: x [..., I] -> same shape and dtype. Raises: ValueError if the group does not divide I.
    """
    if group < 1 or x.shape[-1] % group:
        raise ValueError(f"group={group} does not divide the {x.shape[-1]} columns of x")
    return _fake(x, bits, group, symmetric, False, clip, half)


def fake_quantize_fixed(x: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Round x to a grid that is known beforehand; what lies outside goes to its nearest end.

    Shapes: x [..., I]; scale and zero (None: symmetric about 0) broadcast against it -> same shape and dtype as x.
    Arithmetic in float32 for 16-bit x, else in the dtype of x.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    lowest = 0 if zero is not None else -(2 ** (bits - 1))
    shift = 0 if zero is None else zero.to(wide)
    step = scale.to(wide)
    codes = (pass_through_round(wide / step) + shift).clamp(lowest, lowest + 2**bits - 1)
    return ((codes - shift) * step).to(x.dtype)


def fake_quantize_reference(
    x: Tensor, bits: int, group: int, symmetric: bool, widen: bool, clip: float | Tensor, half: bool = False
) -> Tensor:
    """Compute the op ``fake_quantize`` in plain torch.

    Shapes: x [..., I] of any float dtype, group divides I (0: all of it) -> same shape and dtype. ``widen``: a range is
    first widened to contain 0. Raises: RuntimeError naming the argument.
    """
    check_fake_quantize(x, bits, group, clip)
    rows = x.reshape(-1, group or x.shape[-1])
    grid = symmetric_grid(rows, bits, clip, half) if symmetric else asymmetric_grid(rows, bits, clip, widen, half)
    return _on_grid(rows, grid).reshape(x.shape)


def check_fake_quantize(x: Tensor, bits: int, group: int, clip: float | Tensor) -> None:
    """Raise RuntimeError naming the first argument of ``fake_quantize`` that is wrong; works on fake tensors."""
    torch._check(x.dim() >= 1 and x.shape[-1] >= 1, lambda: f"x: got shape {tuple(x.shape)}, expected [..., d]")
    torch._check(2 <= bits <= 8, lambda: f"bits: got {bits}, expected 2 to 8")
    torch._check(bool(0 < clip <= 1), lambda: f"clip: got {clip}, expected a number in (0, 1]")
    d = x.shape[-1]
    divides = group >= 0 and d % (group or d) == 0
    torch._check(divides, lambda: f"group: got {group}, expected 0 or a divisor of d={d}")


def _fake(
    x: Tensor, bits: int, group: int, symmetric: bool, widen: bool, clip: float | Tensor, half: bool = False
) -> Tensor:
    """Run the op where its compiled kernel serves: a CPU, no gradient wanted, not float64; else plain torch."""
    wanted = x.requires_grad or (isinstance(clip, Tensor) and clip.requires_grad)
    learns = wanted and torch.is_grad_enabled()
    if x.device.type == "cpu" and x.dtype in COMPILED and not learns and x.shape[-1]:
        y: Tensor = torch.ops.qexp.fake_quantize(x, bits, group, symmetric, widen, float(clip), half)
        return y
    return fake_quantize_reference(x, bits, group, symmetric, widen, clip, half)


class Grid(NamedTuple):
    """Codes lowest..highest stand for scale * (code - zero); scale and zero are [R, 1], no zero means 0."""

    scale: Tensor
    zero: Tensor | None
    lowest: int
    highest: int


def symmetric_grid(rows: Tensor, bits: int, clip: float | Tensor, half: bool = False) -> Grid:
    """Return the grid whose greatest code stands for clip * max|x| of each row of [R, I]."""
    low, high = _range(rows)
    top = 2 ** (bits - 1) - 1
    tiny = HALF_TINY if half else torch.finfo(low.dtype).tiny
    scale = _kept(torch.maximum(-low, high).mul(clip).div(top).clamp(min=tiny), half)
    return Grid(scale, None, -top - 1, top)


def asymmetric_grid(rows: Tensor, bits: int, clip: float | Tensor, with_zero: bool, half: bool = False) -> Grid:
    """Return the grid over clip times the range of each row of [R, I], widened to contain 0 on request."""
    low, high = _range(rows)
    if with_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    top, number = 2**bits - 1, torch.finfo(low.dtype)
    epsilon, tiny = (HALF_EPSILON, HALF_TINY) if half else (number.eps, number.tiny)
    floor = torch.maximum(-low, high) * epsilon + tiny  # so that a constant row c comes out as c
    scale = _kept(torch.maximum((high - low).mul(clip).div(top), floor), half)
    return Grid(scale, pass_through_round(-low * clip / scale), 0, top)


def _kept(scale: Tensor, half: bool) -> Tensor:
    """Return the scale as it is kept, in its own dtype; its gradient passes beside float16, where it would vanish."""
    return scale + (scale.half().to(scale.dtype) - scale).detach() if half else scale


def _range(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value of each row, [R, 1], float64 for float64 and else float32."""
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    return (low, high) if rows.dtype == torch.float64 else (low.float(), high.float())


def _on_grid(rows: Tensor, grid: Grid) -> Tensor:
    """Return rows [R, I] rounded to the grid, in their own dtype."""
    inverse = grid.scale.reciprocal()
    if (rows.requires_grad or grid.scale.requires_grad) and torch.is_grad_enabled():
        zero = 0 if grid.zero is None else grid.zero
        codes = (pass_through_round(rows * inverse) + zero).clamp(grid.lowest, grid.highest)
        return ((codes - zero) * grid.scale).to(rows.dtype)
    out, direct = torch.empty_like(rows), rows.dtype == inverse.dtype
    step = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1])) if rows.device.type == "cpu" else max(1, rows.shape[0])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        place = out[part] if direct else None  # None: a temporary of one chunk
        codes = torch.mul(rows[part].to(inverse.dtype), inverse[part], out=place).round_()
        if grid.zero is None:
            codes.clamp_(grid.lowest, grid.highest)
        else:
            codes.add_(grid.zero[part]).clamp_(grid.lowest, grid.highest).sub_(grid.zero[part])
        codes.mul_(grid.scale[part])
        if not direct:
            out[part] = codes
    return out


def pass_through_round(v: Tensor) -> Tensor:
    """Round half to even; a gradient passes straight through, and v + (round(v) - v) is free of rounding error."""
    return v + (v.round() - v).detach() if v.requires_grad else v.round()
