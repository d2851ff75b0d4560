"""Dense bytes for integer codes: b-bit unsigned codes, and the canonical signed int4 of checkpoints.

Eight b-bit codes fill b bytes, least significant bit first: code i of a group of eight takes bits i b .. i b + b - 1 of
the little-endian integer that these bytes spell. A last group that is not full is padded with zero codes: n codes take
ceil(n / 8) b bytes. A group is built as one 64-bit word whose bytes are then viewed, on a little-endian host.

Canonical int4: byte j = element 2j in the low nibble and 2j + 1 in the high one, two's complement, -8..7.

Source: kernels.md section 7.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes of 1 to 8 bits.

    Shapes: codes uint8 [..., n] -> uint8 [..., ceil(n / 8) * bits]. Raises: ValueError on a wrong dtype or code.
    """
    _check(codes, bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes reach {int(codes.max())}, expected at most {2**bits - 1} for {bits} bits")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    full = padded.reshape(*codes.shape[:-1], padded.shape[-1] // 8, 8)
    words = full[..., 0].to(torch.int64)
    for i in range(1, 8):
        words |= full[..., i].to(torch.int64) << (i * bits)
    return words.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack_codes`.

    Shapes: packed uint8 [..., ceil(count / 8) * bits] -> uint8 [..., count]. Raises: ValueError on dtype or width.
    """
    _check(packed, bits)
    groups = -(-count // 8)
    if packed.shape[-1] != groups * bits:
        raise ValueError(f"packed has {packed.shape[-1]} bytes a row, expected {groups * bits} for {count} codes")
    octets = torch.nn.functional.pad(packed.reshape(*packed.shape[:-1], groups, bits), (0, 8 - bits))
    words = octets.contiguous().view(torch.int64)
    shifts = torch.arange(8, device=packed.device) * bits
    codes: Tensor = (words >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def pack_int4(q: Tensor) -> Tensor:
    """Pack signed 4-bit values two to a byte.

    Shapes: q int8 [..., K] -> uint8 [..., K / 2]. Raises: ValueError on a wrong dtype, odd K or a value outside -8..7.
    """
    if q.dtype != torch.int8 or q.shape[-1] % 2:
        raise ValueError(f"q is {q.dtype} with {q.shape[-1]} columns, expected int8 and an even number")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise ValueError(f"q spans {int(q.min())}..{int(q.max())}, expected -8..7")
    nibbles = q.view(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo :func:`pack_int4`: uint8 [..., K / 2] -> int8 [..., K]. Raises: ValueError on a wrong dtype."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed is {packed.dtype}, expected uint8")
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(-2)


def _check(tensor: Tensor, bits: int) -> None:
    if tensor.dtype != torch.uint8 or not 1 <= bits <= 8:
        raise ValueError(f"got {tensor.dtype} and bits={bits}, expected uint8 and 1 to 8 bits")
