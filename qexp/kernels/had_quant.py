"""Hadamard rotation of rows, and rotation fused with per-token quantization and packing.

A row, or each block of it, is viewed as [K', 2^p]: y = s x (H_K' (x) S_{2^p})^T, the order and orientation of
``hadamard.py``, which the offline rotation of weights shares. The references below fix the order of every addition
(butterflies of stride 1, 2, 4, .., then the columns of H_K' four at a time), and the compiled kernels keep it: the
bits of a result depend neither on the instruction set nor on whether anything was compiled.

Quantization: scale = clip amax / qmax, inv = 1 / scale once, q = clamp(round(x inv), -qmax - 1, qmax), half to even. A
zero row has scale 0 and codes 0. A scale below the least normal float is raised to it, so that inv stays finite. A row
(or group) with NaN or Inf has scale NaN and codes 0: what is computed from it is NaN and the other rows do not notice.

Source: kernels.md sections 6 and 7.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.kernels import ops
from qexp.kernels.pack import pack_int4

assert "hadamard" in ops.OPS  # importing it is what defines torch.ops.qexp
TINY = torch.finfo(torch.float32).tiny
CHUNK_GROUPS = 16  # of four columns of H_K'
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HadQuant(NamedTuple):
    """Codes, scales and sums of codes of M rows, see :func:`had_quant`."""

    q: Tensor
    scale: Tensor
    sums: Tensor


def hadamard(x: Tensor, *, block: int = 0, scale: float | None = None, had_k: Tensor | None = None) -> Tensor:
    """Return scale * x (H_K' (x) S_{2^p})^T, by rows or by blocks of a row; differentiable.

    Shapes: x [..., n] bf16, fp16 or fp32; block divides n, 0 for the whole row; had_k int8 [K', K'] of +-1, K' 2^p =
    block or n, None for K' = 1 -> shape and dtype of x. ``scale=None`` is 1/sqrt(block or n): the orthonormal map.
    Arithmetic in float32, one rounding; sums are scaled last, so |x| n must stay below 3.4e38.
    Raises: RuntimeError naming the argument.
    """
    factor = 1 / math.sqrt(block or max(1, x.shape[-1])) if scale is None else scale
    y: Tensor = torch.ops.qexp.hadamard(x, block, factor, had_k)
    return y


def had_quant(
    x: Tensor,
    bits: int,
    *,
    block: int = 0,
    rotate: bool = True,
    clip: float = 1.0,
    group: int = 0,
    had_k: Tensor | None = None,
    container8: bool = False,
    sum_group: int = 0,
) -> HadQuant:  # the op's own argument list: exempt from the limit of six, as in the schema
    """Rotate each row by the orthonormal Hadamard (on request), quantize it, pack it and add up its codes.

    Shapes: x [..., n] bf16, fp16 or fp32, leading dims flattened to M -> q int8 [M, n] (8 bits, or 4 bits with
    ``container8``) or uint8 [M, n / 2] canonical nibbles; scale float32 [M] (group=0) or [M, n / group]; sums of q
    int32 [M, n / sum_group], [M, 1] for sum_group=0. Units: clip is a fraction of the range, in (0, 1].
    Arithmetic in float32. Raises: RuntimeError naming the argument, also where x requires a gradient.
    """
    made = torch.ops.qexp.had_quant(x, bits, block, rotate, clip, group, had_k, container8, sum_group)
    return HadQuant(*made)


def hadamard_reference(x: Tensor, block: int, scale: float, had_k: Tensor | None) -> Tensor:
    """Compute the op ``hadamard`` in plain torch; shapes and errors as there."""
    check_rotation(x, block, had_k)
    _check_signs(had_k)
    y = _rotated(x.reshape(-1, x.shape[-1]), block, had_k)
    return (y * scale).to(x.dtype).reshape(x.shape)


def had_quant_reference(
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
    """Compute the op ``had_quant`` in plain torch; shapes and errors as there."""
    check_had_quant(x, bits, block, rotate, clip, group, had_k, container8, sum_group)
    _check_signs(had_k if rotate else None)
    n = x.shape[-1]
    rows, norm = x.reshape(-1, n), 1.0
    y = rows.float()
    if rotate:
        y, norm = _rotated(rows, block, had_k), 1 / math.sqrt(block or n)
    q, scale = _codes(y.reshape(-1, group or n), float32(norm), bits, clip)
    q, scale = q.reshape(-1, n), scale.reshape((-1, n // group) if group else (-1,))
    sums = q.reshape(q.shape[0], n // (sum_group or n), sum_group or n).sum(-1, dtype=torch.int32)
    return (q if bits == 8 or container8 else pack_int4(q)), scale, sums


def keep_for_backward(ctx: Any, inputs: tuple[Tensor, int, float, Tensor | None], output: Tensor) -> None:  # noqa: ARG001 -- torch's signature
    """Remember what the derivative of ``hadamard`` needs: nothing of x."""
    ctx.block, ctx.scale, ctx.had_k = inputs[1], inputs[2], inputs[3]


def hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    """Return the derivative of ``hadamard``: the transposed map, differentiable itself."""
    turned = None if ctx.had_k is None else ctx.had_k.T.contiguous()
    return torch.ops.qexp.hadamard(grad, ctx.block, ctx.scale, turned), None, None, None


def check_rotation(x: Tensor, block: int, had_k: Tensor | None) -> None:
    """Raise RuntimeError unless x, block and had_k describe a rotation; works on fake tensors."""
    torch._check(x.dtype in DTYPES, lambda: f"x: got {x.dtype}, expected bfloat16, float16 or float32")
    torch._check(x.dim() >= 1 and x.shape[-1] >= 1, lambda: f"x: got shape {tuple(x.shape)}, expected [..., n], n >= 1")
    n = x.shape[-1]
    torch._check(block >= 0 and n % (block or n) == 0, lambda: f"block: got {block}, expected 0 or a divisor of n={n}")
    order = 1
    if had_k is not None:
        order = had_k.shape[0]
        torch._check(had_k.dtype == torch.int8, lambda: f"had_k: got {had_k.dtype}, expected int8")
        square = had_k.dim() == 2 and had_k.shape[1] == order and order > 1
        torch._check(square, lambda: f"had_k: got shape {tuple(had_k.shape)}, expected [K', K'], K' > 1")
        torch._check(had_k.device == x.device, lambda: f"had_k: got {had_k.device}, expected {x.device}, that of x")
    width = block or n
    rest = width // order
    fits = rest * order == width and rest & (rest - 1) == 0 and rest > 0
    want = f"{width} = K' 2^p{_hint(width)}"
    torch._check(fits, lambda: f"had_k: got order {order} for width {width}, expected {want}")


def check_had_quant(
    x: Tensor,
    bits: int,
    block: int,
    rotate: bool,
    clip: float,
    group: int,
    had_k: Tensor | None,
    container8: bool,
    sum_group: int,
) -> None:
    """Raise RuntimeError naming the first argument of ``had_quant`` that is wrong; works on fake tensors."""
    check_rotation(x, block if rotate else 1, had_k if rotate else None)
    n = x.shape[-1]
    torch._check(not (x.requires_grad and torch.is_grad_enabled()), lambda: "x: requires a gradient, expected none")
    torch._check(bits in (4, 8), lambda: f"bits: got {bits}, expected 4 or 8")
    torch._check(0 < clip <= 1, lambda: f"clip: got {clip}, expected a number in (0, 1]")
    for name, width in (("group", group), ("sum_group", sum_group)):
        divides = width >= 0 and n % (width or n) == 0
        torch._check(divides, lambda: f"{name}: got {width}, expected 0 or a divisor of n={n}")  # noqa: B023 -- called at once
    packs = bits == 8 or container8 or n % 2 == 0
    torch._check(packs, lambda: f"x: got n={n}, expected an even n to pack nibbles")


def _check_signs(had_k: Tensor | None) -> None:
    if had_k is not None:
        torch._check(bool((had_k.abs() == 1).all()), lambda: "had_k: got other entries, expected +1 and -1")


def float32(value: float) -> float:
    """Round a Python number to float32, as a kernel's argument is."""
    return float(torch.tensor(value, dtype=torch.float32))


def _hint(width: int) -> str:
    """Return a hint: the odd part a Hadamard factor has to cover."""
    odd = width // (width & -width)
    return f" with K' a multiple of {odd}" if odd > 1 else ""


def _rotated(rows: Tensor, block: int, had_k: Tensor | None) -> Tensor:
    """Return rows [M, n] times the Hadamard matrix of every block, not normalised, float32."""
    order = 1 if had_k is None else had_k.shape[0]
    width = block or rows.shape[1]
    y, stride, size = rows.float(), 1, width // order
    while stride < size:
        pairs = y.reshape(-1, 2, stride)
        y = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        stride *= 2
    if had_k is not None:
        y = _mixed(y.reshape(-1, order, size), had_k)
    return y.reshape(rows.shape)


def _mixed(y: Tensor, had_k: Tensor) -> Tensor:
    """Return H_K' times y [B, K', C] over its middle axis.

    In a group of four columns a row of H is a sign times one of eight patterns that begin with +: eight sums of four
    inputs serve every row, a quarter of the additions of the plain product. A row adds the sums with sign + and then
    subtracts those with sign -, in chunks of 16 groups: the order of csrc/cpu/hadamard.h.
    """
    order = had_k.shape[0]
    y = torch.nn.functional.pad(y, (0, 0, 0, -order % 4))
    signs = torch.nn.functional.pad(had_k, (0, -order % 4), value=1).reshape(order, -1, 4)
    total = y.new_zeros(order, y.shape[0], y.shape[2])
    for begin in range(0, signs.shape[1], CHUNK_GROUPS):
        chunk = signs[:, begin : begin + CHUNK_GROUPS]
        first = chunk[..., 0]
        sums = _signed_sums(y[:, 4 * begin : 4 * (begin + chunk.shape[1])])
        for groups in (first < 0).to(torch.int8).argsort(dim=1, stable=True).T:  # those to add, then the others
            pick = chunk[torch.arange(order, device=y.device), groups]
            sign, pattern = pick[:, 0], (pick < 0).long()
            a, b, c, d = pattern.unbind(1)
            total += sign[:, None, None] * sums[groups, (a ^ b) + 2 * (c ^ d) + 4 * (a ^ c)]
    return total.transpose(0, 1)


def _signed_sums(y: Tensor) -> Tensor:
    """Return the eight sums of every four inputs of y [B, 4 G, C] that begin with +: [G, 8, B, C]."""
    a, b, c, d = y.reshape(y.shape[0], y.shape[1] // 4, 4, y.shape[2]).transpose(0, 1).unbind(2)
    ab, cd = (a + b, a - b), (c + d, c - d)
    return torch.stack([*(p + q for q in cd for p in ab), *(p - q for q in cd for p in ab)], dim=1)


def _codes(y: Tensor, norm: float, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """Return int8 codes [R, G] and float32 scales [R, 1] of norm * y."""
    top = 2 ** (bits - 1) - 1
    amax = y.abs().amax(-1, keepdim=True) * norm
    scale = (amax * clip / top).clamp(min=TINY).where(amax != 0, 0.0)
    scale = scale.where(amax.isfinite(), float("nan"))
    step = scale.reciprocal() * norm
    q = torch.where(scale > 0, (y * step).round().clamp(-top - 1, top), 0.0)
    return q.to(torch.int8), scale
