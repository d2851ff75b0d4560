"""Codes over a float range: x^ = s code + min, scale and minimum in float16, no integer zero point.

s = (max - min) / (2^b - 1) and min are rounded to float16 first, then code = clamp(round((x - min) / s), 0, 2^b - 1):
what is stored decodes to what is simulated, bit for bit. s has float16's smallest number as floor (a constant group
would divide by zero); a group with NaN, Inf or a range beyond float16 comes back as NaN.

Source: arXiv:2402.02750 section 3.2 and methods/kv_cache.md 3.2 (KIVI; QuaRot's kernels store the same pair).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qexp.kernels.kv_codes import Codes, dequantize_codes
from qexp.kernels.pack import pack_codes
from qexp.kernels.quantize import pass_through_round

FLOOR = 2.0**-24  # float16's smallest number
PARAMETER_BITS = 16  # of the scale, and as many of the minimum


class RangeCodes(NamedTuple):
    """Packed codes uint8 [..., d bits / 8], scale and minimum float16 [..., d / group]."""

    packed: Tensor
    scale: Tensor
    low: Tensor


def fake_range(x: Tensor, bits: int, group: int) -> Tensor:
    """Round each group of the last dimension to its range and return it dequantized.

    Shapes: x [..., d], group divides d -> same shape and dtype. Arithmetic in float32, whatever comes in. A gradient
    passes straight through the rounding.
    """
    rows = _rows(x, group)
    scale, low = _range(rows, bits)
    rounded = (_codes(rows, scale, low, bits) - _zero(scale, low)) * scale.float()
    return rounded.flatten(-2).to(x.dtype)


def encode_range(x: Tensor, bits: int, group: int) -> RangeCodes:
    """Return the packed codes of what :func:`fake_range` computes.

    Shapes: x [..., d], group divides d and 8 divides d -> :class:`RangeCodes`.
    """
    rows = _rows(x, group)
    scale, low = _range(rows, bits)
    codes = _codes(rows, scale, low, bits).nan_to_num(nan=0.0).to(torch.uint8)
    return RangeCodes(pack_codes(codes.flatten(-2), bits).contiguous(), scale.squeeze(-1), low.squeeze(-1))


def decode_range(codes: RangeCodes, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """Return [..., d] in ``dtype`` (float64: the float32 numbers). Shapes: as :func:`encode_range` gives them."""
    zero = _zero(codes.scale, codes.low)
    stored, narrow = Codes(codes.packed, codes.scale.float(), zero), dtype if dtype != torch.float64 else torch.float32
    return dequantize_codes(stored, bits, group=group, dtype=narrow).to(dtype)


def _rows(x: Tensor, group: int) -> Tensor:
    """Return float32 [..., d / group, group]. Raises: ValueError if the group does not divide d."""
    if group < 1 or x.shape[-1] % group:
        raise ValueError(f"group={group} does not divide the {x.shape[-1]} columns of x")
    return x.float().reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _range(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and minimum, float16 [..., 1]: the scale spans from the minimum that is stored to the maximum."""
    low, high = rows.amin(-1, keepdim=True).half(), rows.amax(-1, keepdim=True)
    return ((high - low.float()) / (2**bits - 1)).clamp(min=FLOOR).half(), low


def _codes(rows: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    return pass_through_round((rows - low.float()) / scale.float()).clamp(0, 2**bits - 1)


def _zero(scale: Tensor, low: Tensor) -> Tensor:
    """Return the float that the minimum is at: x^ = s (code - zero), the form of the compiled kernel."""
    return -(low.float() / scale.float())
