"""What every operator returns for shapes alone, after checking what shapes and dtypes can tell: for tracing.

One function per operator, with its name and arguments; the references call them too, for their checks.
A complaint is a RuntimeError, "argument: got this, expected that", as the compiled kernels raise it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.kernels.had_quant import check_had_quant, check_rotation
from qexp.kernels.kv_codes import check_dequantize_codes, check_quantize_codes
from qexp.kernels.quantize import check_fake_quantize

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEADER_BYTES = 64  # of a packed weight: int4.py
_VECTOR = "the vector that prepack_w4 returns"


def hadamard(x: Tensor, block: int, scale: float, had_k: Tensor | None) -> Tensor:
    """Return what has the shape of x."""
    check_rotation(x, block, had_k)
    return x.new_empty(x.shape)


def gram_(sum: Tensor, x: Tensor) -> None:
    """Check what is summed, and into what."""
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16):
        raise RuntimeError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected float32 or bfloat16 [T, I]")
    columns = x.shape[1]
    if sum.dtype != torch.float64 or sum.shape != (columns, columns) or not sum.is_contiguous():
        got = f"{sum.dtype} of shape {tuple(sum.shape)}, strides {sum.stride()}"
        raise RuntimeError(f"sum: got {got}, expected float64 [{columns}, {columns}], contiguous")


def sweep_columns(target: Tensor, error: Tensor, mix: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return the codes, uint8 [J, O]."""
    if target.dim() != 2:
        raise RuntimeError(f"target: got shape {tuple(target.shape)}, expected [J, O]")
    columns, rows = target.shape
    expected = {"error": (error, columns, rows), "mix": (mix, columns, columns)}
    expected |= {"target": (target, columns, rows), "scale": (scale, columns, rows), "zero": (zero, columns, rows)}
    for name, (x, height, width) in expected.items():
        if x.dtype != torch.float32 or x.shape != (height, width):
            got = f"{x.dtype} of shape {tuple(x.shape)}"
            raise RuntimeError(f"{name}: got {got}, expected float32 [{height}, {width}]")
    if not 1 <= top <= 255:
        raise RuntimeError(f"top: got {top}, expected 1..255")
    return target.new_empty((columns, rows), dtype=torch.uint8)


def had_quant(
    x: Tensor,
    bits: int,
    block: int,
    rotate: bool,
    clip: float,
    group: int,
    had_k: Tensor | None,
    container8: bool,
    sum_group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and sums."""
    check_had_quant(x, bits, block, rotate, clip, group, had_k, container8, sum_group)
    n = x.shape[-1]
    rows = x.numel() // n
    whole = bits == 8 or container8
    q = x.new_empty([rows, n if whole else n // 2], dtype=torch.int8 if whole else torch.uint8)
    scale = x.new_empty([rows, n // group] if group else [rows], dtype=torch.float32)
    return q, scale, x.new_empty([rows, n // (sum_group or n)], dtype=torch.int32)


def quantize_codes(
    x: Tensor, bits: int, group: int, symmetric: bool, clip: float, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points."""
    check_quantize_codes(x, bits, group, clip)
    d = x.shape[-1]
    shape = [*x.shape[:-1], d // (group or d)]
    packed = x.new_empty([*x.shape[:-1], d * bits // 8], dtype=torch.uint8)
    return packed, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def dequantize_codes(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """Return the values."""
    d = check_dequantize_codes(packed, scale, zero, bits, group, dtype)
    return packed.new_empty([*packed.shape[:-1], d], dtype=dtype)


def fake_quantize(
    x: Tensor, bits: int, group: int, symmetric: bool, widen: bool, clip: float, half: bool = False
) -> Tensor:
    """Return what has the shape of x."""
    check_fake_quantize(x, bits, group, clip)
    return x.new_empty(x.shape)


def pack_int4(q: Tensor) -> Tensor:
    """Return half as many bytes."""
    expect("q", q, torch.int8, "[..., K] with even K", q.dim() >= 1 and q.shape[-1] % 2 == 0)
    return q.new_empty([*q.shape[:-1], q.shape[-1] // 2], dtype=torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return twice as many values."""
    expect("packed", packed, torch.uint8, "[..., K / 2]", packed.dim() >= 1)
    return packed.new_empty([*packed.shape[:-1], 2 * packed.shape[-1]], dtype=torch.int8)


def p16k8(w_q: Tensor, group: int) -> Tensor:
    """Return header and blocks of 64 bytes."""
    expect("w_q", w_q, torch.uint8, "[N, K / 2]", w_q.dim() == 2)
    torch._check(group >= 0, lambda: f"group: got {group}, expected 0 or more")
    return w_q.new_empty([HEADER_BYTES + 64 * (-(-w_q.shape[0] // 16) * -(-w_q.shape[1] // 4))])


def w4a8(
    a_q: Tensor,
    a_scale: Tensor,
    a_sums: Tensor | None,
    w_p: Tensor,
    w_s: Tensor,
    w_z: Tensor | None,
    n: int,
    group: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return [M, n]."""
    expect("a_q", a_q, torch.int8, "[M, K]", a_q.dim() == 2)
    rows = a_q.shape[0]
    expect("a_scale", a_scale, torch.float32, f"[M] with M={rows}", a_scale.dim() == 1 and a_scale.shape[0] == rows)
    if a_sums is not None:
        groups = a_q.shape[1] // group if group > 0 else 1
        fits = a_sums.dim() == 2 and a_sums.shape[0] == rows and a_sums.shape[1] == groups
        expect("a_sums", a_sums, torch.int32, f"[M, groups] with M={rows}, groups={groups}", fits)
    torch._check(out_dtype in FLOATS, lambda: f"out_dtype: got {out_dtype}, expected one of {FLOATS}")
    _check_weight(a_q, w_p, w_s, w_z)
    _check_bias(a_q, bias, n)
    return a_q.new_empty([rows, n], dtype=out_dtype)


def w4a4(
    a_q: Tensor,
    a_scale: Tensor,
    a_sums: Tensor | None,
    w_p: Tensor,
    w_s: Tensor,
    w_z: Tensor | None,
    n: int,
    group: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return [M, n]; packed rows have half as many bytes as columns."""
    if a_q.dtype == torch.uint8 and a_q.dim() == 2:
        a_q = a_q.new_empty([a_q.shape[0], 2 * a_q.shape[1]], dtype=torch.int8)
    return w4a8(a_q, a_scale, a_sums, w_p, w_s, w_z, n, group, bias, out_dtype)


def w4a16(x: Tensor, w_p: Tensor, w_s: Tensor, w_z: Tensor | None, n: int, group: int, bias: Tensor | None) -> Tensor:
    """Return [M, n] in the dtype of x."""
    fits = x.dtype in FLOATS and x.dim() == 2
    torch._check(fits, lambda: f"x: got {x.dtype} {tuple(x.shape)}, expected [M, K] in one of {FLOATS}")
    torch._check(group >= 0, lambda: f"group: got {group}, expected 0 or more")
    _check_weight(x, w_p, w_s, w_z)
    _check_bias(x, bias, n)
    return x.new_empty([x.shape[0], n])


def w4a8_i32(a_q: Tensor, w_p: Tensor, n: int) -> Tensor:
    """Return [M, n]."""
    expect("a_q", a_q, torch.int8, "[M, K]", a_q.dim() == 2)
    expect("w_p", w_p, torch.uint8, _VECTOR, w_p.dim() == 1)
    return a_q.new_empty([a_q.shape[0], n], dtype=torch.int32)


def floor_read(x: Tensor) -> Tensor:
    """Return one number."""
    return x.new_empty([], dtype=torch.int64)


def floor_dot(x: Tensor, steps: int) -> Tensor:
    """Return two numbers."""
    return x.new_empty([2], dtype=torch.int64)


def expect(name: str, x: Tensor, dtype: torch.dtype, shape: str, fits: bool) -> None:
    """Raise RuntimeError unless x has this dtype and ``fits`` the shape that is described."""
    got = f"{x.dtype} {tuple(x.shape)}"
    torch._check(x.dtype == dtype and fits, lambda: f"{name}: got {got}, expected {dtype} {shape}")


def _check_weight(x: Tensor, w_p: Tensor, w_s: Tensor, w_z: Tensor | None) -> None:
    expect("w_p", w_p, torch.uint8, _VECTOR, w_p.dim() == 1)
    for name, part in (("w_p", w_p), ("w_s", w_s), ("w_z", w_z)):
        if part is not None:
            device, dtype = part.device, part.dtype
            torch._check(device == x.device, lambda: f"{name}: got {device}, expected {x.device}")  # noqa: B023
            floats = name == "w_p" or dtype == torch.float32
            torch._check(floats, lambda: f"{name}: got {dtype}, expected float32")  # noqa: B023 -- called at once


def _check_bias(x: Tensor, bias: Tensor | None, n: int) -> None:
    if bias is not None:
        fits = bias.dtype in FLOATS and bias.dim() == 1 and bias.shape[0] == n and bias.device == x.device
        got = f"{bias.dtype} {tuple(bias.shape)} on {bias.device}"
        torch._check(fits, lambda: f"bias: got {got}, expected [{n}] in one of {FLOATS} on {x.device}")
