"""Codes of 2, 4 or 8 bits for keys and values: one range per group of consecutive elements, packed densely.

Asymmetric: s = clip (max - min) / (2^b - 1), z = round(-clip min / s), code = clamp(round(x / s) + z, 0, 2^b - 1).
Symmetric: s = clip max|x| / (2^(b-1) - 1), z = 2^(b-1). Either way x^ = s (code - z): the same numbers, bit for bit, as
``quantize.fake_quantize_groups``. With ``half`` both fit float16: s is rounded to it before any code is derived, and,
asymmetric, has 2^-10 max|x| as floor, so that |z| is at most 2^10. A group with NaN or Inf has scale NaN, zero 0 and
codes 0, so it comes back as NaN.

Source: methods/kv_cache.md 3.2; kernels.md section 7 (packing: ``pack.pack_codes``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qexp.kernels import ops
from qexp.kernels.pack import pack_codes, unpack_codes
from qexp.kernels.quantize import asymmetric_grid, symmetric_grid

assert "quantize_codes" in ops.OPS  # importing it is what defines torch.ops.qexp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (2, 4, 8)


class Codes(NamedTuple):
    """Packed codes uint8 [..., d bits / 8], scale and zero [..., d / group], float32 for the operators."""

    packed: Tensor
    scale: Tensor
    zero: Tensor


def quantize_codes(
    x: Tensor, bits: int, *, group: int = 0, symmetric: bool = False, clip: float = 1.0, half: bool = False
) -> Codes:
    """Quantize each group of the last dimension to unsigned codes and pack them.

    Shapes: x [..., d] bf16, fp16 or fp32, group divides d (0: all of it), 8 divides d -> :class:`Codes`.
    Units: clip is a fraction of the range, in (0, 1]. Arithmetic in float32. Raises: RuntimeError naming the argument.
    """
    return Codes(*torch.ops.qexp.quantize_codes(x, bits, group, symmetric, clip, half))


def dequantize_codes(codes: Codes, bits: int, *, group: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return scale * (code - zero), float32 arithmetic and one rounding.

    Shapes: as :func:`quantize_codes` gives them -> [..., d] of ``dtype``. Raises: RuntimeError naming the argument.
    """
    x: Tensor = torch.ops.qexp.dequantize_codes(codes.packed, codes.scale, codes.zero, bits, group, dtype)
    return x


def quantize_codes_reference(
    x: Tensor, bits: int, group: int, symmetric: bool, clip: float, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op ``quantize_codes`` in plain torch; shapes and errors as there."""
    check_quantize_codes(x, bits, group, clip)
    d = x.shape[-1]
    rows = x.reshape(-1, group or d)
    centre = 1 << (bits - 1)
    grid = symmetric_grid(rows, bits, clip, half) if symmetric else asymmetric_grid(rows, bits, clip, False, half)
    zero = torch.full_like(grid.scale, centre) if grid.zero is None else grid.zero
    good = grid.scale.isfinite()
    codes = (rows.float() * grid.scale.reciprocal()).round() + zero
    codes = torch.where(good, codes.clamp(0, 2 * centre - 1), 0.0).to(torch.uint8)
    shape = (*x.shape[:-1], d // (group or d))
    scale, zero = torch.where(good, grid.scale, float("nan")), torch.where(good, zero, 0.0)
    return pack_codes(codes.reshape(x.shape), bits), scale.reshape(shape), zero.reshape(shape)


def dequantize_codes_reference(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Compute the op ``dequantize_codes`` in plain torch; shapes and errors as there."""
    d = check_dequantize_codes(packed, scale, zero, bits, group, dtype)
    codes = unpack_codes(packed, bits, d).float().reshape(*scale.shape, group or d)
    return ((codes - zero[..., None]) * scale[..., None]).to(dtype).reshape(*packed.shape[:-1], d)


def check_quantize_codes(x: Tensor, bits: int, group: int, clip: float) -> None:
    """Raise RuntimeError naming the first argument of ``quantize_codes`` that is wrong; works on fake tensors."""
    torch._check(x.dtype in DTYPES, lambda: f"x: got {x.dtype}, expected bfloat16, float16 or float32")
    torch._check(x.dim() >= 1 and x.shape[-1] >= 1, lambda: f"x: got shape {tuple(x.shape)}, expected [..., d], d >= 1")
    torch._check(not (x.requires_grad and torch.is_grad_enabled()), lambda: "x: requires a gradient, expected none")
    torch._check(bits in BITS, lambda: f"bits: got {bits}, expected 2, 4 or 8")
    d = x.shape[-1]
    torch._check(d % 8 == 0, lambda: f"x: got d={d}, expected a multiple of 8, the codes that are packed together")
    torch._check(group >= 0 and d % (group or d) == 0, lambda: f"group: got {group}, expected 0 or a divisor of d={d}")
    torch._check(0 < clip <= 1, lambda: f"clip: got {clip}, expected a number in (0, 1]")


def check_dequantize_codes(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, dtype: torch.dtype
) -> int:
    """Return d. Raises: RuntimeError naming the first argument of ``dequantize_codes`` that is wrong."""
    torch._check(bits in BITS, lambda: f"bits: got {bits}, expected 2, 4 or 8")
    torch._check(dtype in DTYPES, lambda: f"dtype: got {dtype}, expected bfloat16, float16 or float32")
    torch._check(packed.dtype == torch.uint8, lambda: f"packed: got {packed.dtype}, expected uint8")
    torch._check(packed.dim() >= 1, lambda: "packed: got a scalar, expected [..., d bits / 8]")
    width = packed.shape[-1]
    torch._check(width >= 1 and width % bits == 0, lambda: f"packed: got {width} bytes, expected d bits / 8 with 8 | d")
    d = width * 8 // bits
    torch._check(
        group >= 0 and d % (group or d) == 0,
        lambda: f"group: got {group}, expected 0 or a divisor of d={d}",
    )
    shape = (*packed.shape[:-1], d // (group or d))
    for name, tensor in (("scale", scale), ("zero", zero)):
        fits = tensor.dtype == torch.float32 and tuple(tensor.shape) == shape
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        torch._check(fits, lambda: f"{name}: got {got}, expected float32 {shape}")  # noqa: B023 -- called at once
        torch._check(tensor.device == packed.device, lambda: f"{name}: got {tensor.device}, expected {packed.device}")  # noqa: B023
    return d
