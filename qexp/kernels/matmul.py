"""Products with packed 4-bit weights: integer activations (w4a8, w4a4), float activations (w4a16), the integers alone.

out[m, n] = a_scale[m] sum_g w_s[n, g] (acc[m, n, g] - zero[n, g] sum_k a_q[m, k]) + bias[n]
acc[m, n, g] = sum over the k of group g of a_q[m, k] w_q[n, k], exact; the rest in fp32, one rounding to the output.

A row with scale NaN gives a row of NaN, scale 0 a row of bias. The weight comes from ``int4.prepack_w4``.

Source: kernels.md sections 6 to 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qexp.kernels import ops, pack, shapes
from qexp.kernels.int4 import read_header, unprepack_w4

EXACT_IN_FLOAT = 1 << 14  # terms of at most 8 * 128 = 2^10 whose sums stay below 2^24


class W4(NamedTuple):
    """A packed weight [n, K] as ``int4.prepack_w4`` made it; w_z is None or empty without zero points."""

    w_p: Tensor
    w_s: Tensor
    w_z: Tensor | None
    n: int
    group: int


def w4a8(
    a_q: Tensor, a_scale: Tensor, a_sums: Tensor | None, weight: W4, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return the product of 8-bit activations [M, K] and the weight, [M, n] in ``out_dtype`` (fp32, bf16, fp16).

    Shapes: a_q int8 [M, K], a_scale fp32 [M], a_sums int32 [M, K / group] ([M, 1] for group = 0) as ``had_quant``
    returns them or None to have them computed, bias [n]. Raises: RuntimeError naming the argument, got and expected.
    """
    out: Tensor = torch.ops.qexp.w4a8(a_q, a_scale, a_sums, *weight, bias, out_dtype)
    return out


def w4a4(
    a_q: Tensor, a_scale: Tensor, a_sums: Tensor | None, weight: W4, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As :func:`w4a8` for 4-bit activations: canonical uint8 [M, K / 2], or int8 [M, K] holding -8..7."""
    out: Tensor = torch.ops.qexp.w4a4(a_q, a_scale, a_sums, *weight, bias, out_dtype)
    return out


def w4a16(x: Tensor, weight: W4, bias: Tensor | None) -> Tensor:
    """Return x [M, K] (bf16, fp16 or fp32) times the weight, [M, n] in the dtype of x; products and sums in fp32."""
    out: Tensor = torch.ops.qexp.w4a16(x, *weight, bias)
    return out


def w4a8_i32(a_q: Tensor, w_p: Tensor, n: int) -> Tensor:
    """Return the exact integers sum_k a_q[m, k] w_q[n, k], int32 [M, n]; a_q int8 [M, K]."""
    out: Tensor = torch.ops.qexp.w4a8_i32(a_q, w_p, n)
    return out


# References, called by ops.py with the operators' arguments.


def w4a8_reference(
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
    """Exact integers per group, combined in float64."""
    weight = W4(w_p, w_s, w_z, n, group)
    shapes.w4a8(a_q, a_scale, a_sums, *weight, bias, out_dtype)
    w_q = _codes(weight, a_q.shape[1])
    scale, shift = _scales(weight)
    total = a_scale.new_zeros(a_q.shape[0], n, dtype=torch.float64)
    step = group or a_q.shape[1]
    for g, start in enumerate(range(0, a_q.shape[1], step)):
        part = slice(start, start + step)
        total += _exact_product(a_q[:, part], w_q[:, part]) * scale[:, g].double()
        if shift is not None:
            total -= a_q[:, part].sum(1, keepdim=True).double() * shift[:, g].double()
    total *= a_scale.double().unsqueeze(1)
    return _finish(total, bias, out_dtype)


def w4a4_reference(
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
    """As w4a8, after unpacking."""
    if a_q.dtype == torch.uint8:
        a_q = pack.unpack_int4(a_q)
    elif a_q.numel() and (int(a_q.min()) < -8 or int(a_q.max()) > 7):
        raise RuntimeError(f"a_q: got values {int(a_q.min())}..{int(a_q.max())}, expected -8..7")
    return w4a8_reference(a_q, a_scale, a_sums, w_p, w_s, w_z, n, group, bias, out_dtype)


def w4a16_reference(
    x: Tensor, w_p: Tensor, w_s: Tensor, w_z: Tensor | None, n: int, group: int, bias: Tensor | None
) -> Tensor:
    """Dequantize the whole weight to fp32, then one product."""
    weight = W4(w_p, w_s, w_z, n, group)
    shapes.w4a16(x, *weight, bias)
    w_q = _codes(weight, x.shape[1])
    scale, shift = _scales(weight)
    w = w_q.float().reshape(n, scale.shape[1], -1) * scale.unsqueeze(2)
    if shift is not None:
        w -= shift.unsqueeze(2)
    with torch.autocast(x.device.type, enabled=False):
        return _finish(x.float() @ w.reshape(n, -1).T, bias, x.dtype)


def w4a8_i32_reference(a_q: Tensor, w_p: Tensor, n: int) -> Tensor:
    """Return exact integers by a float64 product."""
    shapes.w4a8_i32(a_q, w_p, n)
    w_q = _codes(W4(w_p, w_p, None, n, read_header(w_p).group), a_q.shape[1])
    return (a_q.double() @ w_q.double().T).to(torch.int32)


def _codes(weight: W4, k: int) -> Tensor:
    """Return the codes, int8 [n, K], after comparing what the header says with what the call says."""
    header = read_header(weight.w_p)
    for name, got, expected in (("n", weight.n, header.n), ("K", k, header.k), ("group", weight.group, header.group)):
        if got != expected:
            raise RuntimeError(f"{name}: got {got}, expected {expected}, with which w_p was packed")
    return unprepack_w4(weight.w_p)


def _scales(weight: W4) -> tuple[Tensor, Tensor | None]:
    """Return w_s and w_z as [n, groups], out of the blocks of 16 of the layout "cpu"."""

    def rows(blocks: Tensor) -> Tensor:
        return blocks if blocks.dim() == 2 else blocks.transpose(1, 2).flatten(0, 1)[: weight.n]

    has_shift = weight.w_z is not None and weight.w_z.numel() > 0
    return rows(weight.w_s), rows(weight.w_z) if has_shift and weight.w_z is not None else None


def _exact_product(a: Tensor, w: Tensor) -> Tensor:
    """Return a [M, g] times w [n, g] transposed, of integers, in float64; by a float32 product while that is exact."""
    dtype = torch.float32 if a.shape[1] <= EXACT_IN_FLOAT and a.device.type == "cpu" else torch.float64
    return (a.to(dtype) @ w.to(dtype).T).double()


def _finish(total: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (total if bias is None else total + bias.to(total.dtype)).to(dtype)


assert ops.OPS["w4a8"] == "matmul"  # importing this module defines the operators
