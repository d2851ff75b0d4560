"""Dense bytes for integer codes: b-bit unsigned codes, and the canonical signed int4 of checkpoints.

Eight b-bit codes fill b bytes, least significant bit first: code i of a group of eight takes bits i b .. i b + b - 1 of
the little-endian integer that these bytes spell. A last group that is not full is padded with zero codes: n codes take
ceil(n / 8) b bytes. A group is built as one 64-bit word whose bytes are then viewed, on a little-endian host.

Wide: records of integers of up to 62 bits, each with a width of its own, one after another without any gap.

Canonical int4: byte j = element 2j in the low nibble and 2j + 1 in the high one, two's complement, -8..7.

Source: kernels.md section 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDEST = 62


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


def pack_wide(records: Tensor, widths: Sequence[int]) -> Tensor:
    """Pack records of unsigned integers, field f in ``widths[f]`` bits, least significant bit first.

    Every integer is added to the 64-bit word where it begins and, what is cut off there, to the next one.

    Shapes: records int64 [n, F] -> uint8 [ceil(n sum(widths) / 8)]. Raises: ValueError on a wrong dtype, width or code.
    """
    _check_widths(records, torch.int64, widths)
    for values, bits in zip(records.unbind(1), widths, strict=True):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >> bits):
            raise ValueError(f"codes span {int(values.min())}..{int(values.max())}, expected {bits} unsigned bits")
    total = len(records) * sum(widths)
    words = torch.zeros(total // 64 + 2, dtype=torch.int64, device=records.device)
    for values, place, shift in zip(records.unbind(1), *_places(len(records), widths, records.device), strict=True):
        words.index_add_(0, place, values << shift)
        words.index_add_(0, place + 1, (values >> 1) >> (63 - shift))  # shifts by 64 mean nothing
    return words.view(torch.uint8)[: -(-total // 8)].clone()


def unpack_wide(packed: Tensor, widths: Sequence[int], count: int) -> Tensor:
    """Undo :func:`pack_wide`.

    Shapes: packed uint8 [ceil(count sum(widths) / 8)] -> int64 [count, F]. Raises: ValueError on dtype, width, length.
    """
    _check_widths(packed, torch.uint8, widths)
    total = count * sum(widths)
    if packed.shape != (-(-total // 8),):
        raise ValueError(f"packed is {tuple(packed.shape)}, expected {-(-total // 8)} bytes for {count} records")
    words = torch.nn.functional.pad(packed, (0, 8 * (total // 64 + 2) - len(packed))).view(torch.int64)
    fields = []
    for bits, place, shift in zip(widths, *_places(count, widths, packed.device), strict=True):
        low = (words[place] >> shift) & (((1 << (63 - shift)) << 1) - 1)  # without the sign that comes down
        high = (words[place + 1] << (63 - shift)) << 1
        fields.append((low | high) & ((1 << bits) - 1))
    return torch.stack(fields, 1)


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


def _check_widths(tensor: Tensor, dtype: torch.dtype, widths: Sequence[int]) -> None:
    if tensor.dtype != dtype or not all(1 <= bits <= WIDEST for bits in widths):
        raise ValueError(f"got {tensor.dtype} and widths={list(widths)}, expected {dtype} and 1 to {WIDEST} bits")


def _places(count: int, widths: Sequence[int], device: torch.device) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return of every field [F] the word [count] that each of its integers begins in, and the bit of that word."""
    begins = torch.tensor([sum(widths[:f]) for f in range(len(widths))], device=device)
    bit_FN = begins[:, None] + torch.arange(count, device=device) * sum(widths)
    return (bit_FN // 64).unbind(0), (bit_FN % 64).unbind(0)
