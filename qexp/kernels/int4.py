"""Signed 4-bit weights: the canonical bytes of checkpoints, and the layouts that the matrix products read.

Canonical: byte j of a row = element 2j in the low nibble, 2j + 1 in the high one, two's complement, -8..7. A layout is
made from it by ``prepack_w4``, and is one uint8 vector: 64 bytes that say what it is (:class:`Header`), then the codes.

    reference   the canonical bytes; scales fp32 [N, groups]
    cpu         p16k8: [N/16][K/8][64]; byte 4c + j of a block holds column c, k = 8i + j in its low nibble and
                k = 8i + 4 + j in the high one, as code + 8. N is padded to 16 and K to 8 with the weight 0.
                Scales fp32 [N/16, groups, 16], padded with 0.
    cuda_*      qexp/kernels/cuda.py

A weight is scale * (code - zero); w_z holds scale * zero, and is empty without zero points.

Source: kernels.md sections 6 and 7.
"""

from __future__ import annotations

import importlib
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.kernels import build, ops, pack, shapes
from qexp.kernels.shapes import HEADER_BYTES

LAYOUTS = {"reference": 0, "cpu": 1, "cuda_mma": 2, "cuda_sm90": 3}
_FORMAT = struct.Struct("<4sBBHqqq")  # magic, version, layout, 0, N, K, group; zeros up to HEADER_BYTES
_MAGIC, _VERSION = b"QXW4", 1


class Header(NamedTuple):
    """What the first bytes of a packed weight say: layout by name, and the sizes before any padding."""

    layout: str
    n: int
    k: int
    group: int


def pack_int4(q: Tensor) -> Tensor:
    """Return int8 [..., K], values -8..7, as canonical uint8 [..., K / 2]. Raises: RuntimeError for others or odd K."""
    packed: Tensor = torch.ops.qexp.pack_int4(q)
    return packed


def unpack_int4(packed: Tensor) -> Tensor:
    """Return canonical uint8 [..., K / 2] as int8 [..., K]. Raises: RuntimeError on a wrong dtype."""
    q: Tensor = torch.ops.qexp.unpack_int4(packed)
    return q


def prepack_w4(
    w_q: Tensor, scale: Tensor, zero: Tensor | None, group: int, target: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (w_p, w_s, w_z): codes, scales and scale * zero as the kernels of ``target`` read them.

    Shapes: w_q canonical uint8 [N, K / 2]; scale fp32, bf16 or fp16, [N] (group = 0) or [N, K / group]; zero the same
    shape, on the signed axis -8..7. target: "reference", "cpu", "cuda_mma", "cuda_sm90", or "auto" for the best of the
    device. Raises: RuntimeError naming the argument, what it is and what is expected; also for scales not finite.
    """
    packed: tuple[Tensor, Tensor, Tensor] = torch.ops.qexp.prepack_w4(w_q, scale, zero, group, target)
    return packed


def write_header(layout: str, n: int, k: int, group: int) -> Tensor:
    """Return the 64 bytes that open a packed weight, uint8 on the CPU."""
    text = _FORMAT.pack(_MAGIC, _VERSION, LAYOUTS[layout], 0, n, k, group)
    return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def read_header(w_p: Tensor) -> Header:
    """Return what a packed weight says of itself. Raises: RuntimeError if it is none, or not of this version."""
    if w_p.dtype != torch.uint8 or w_p.dim() != 1 or w_p.numel() < HEADER_BYTES:
        raise RuntimeError(f"w_p: got {w_p.dtype} {list(w_p.shape)}, expected the uint8 vector that prepack_w4 returns")
    magic, version, layout, _, n, k, group = _FORMAT.unpack(bytes(w_p[: _FORMAT.size].tolist()))
    names = {number: name for name, number in LAYOUTS.items()}
    if magic != _MAGIC or version != _VERSION or layout not in names:
        raise RuntimeError(f"w_p: got no packed weight of version {_VERSION}, expected what prepack_w4 returns")
    return Header(names[layout], n, k, group)


def unprepack_w4(w_p: Tensor) -> Tensor:
    """Return the codes of a weight in layout "reference" or "cpu", int8 [N, K]; raises RuntimeError for another."""
    layout, n, k, _ = read_header(w_p)
    body = w_p[HEADER_BYTES:]
    if layout == "reference":
        return pack.unpack_int4(body.reshape(n, k // 2))
    if layout != "cpu":
        raise RuntimeError(
            f"w_p: got layout {layout!r}, expected 'cpu' or 'reference'; call prepack_w4 for this device"
        )
    blocks = body.reshape(-1, -(-k // 8), 16, 4)
    nibbles = torch.stack((blocks & 15, blocks >> 4), dim=3)  # [N/16, K/8, 16, half, 4]
    codes = nibbles.permute(0, 2, 1, 3, 4).reshape(blocks.shape[0] * 16, -1)
    return codes[:n, :k].to(torch.int8) - 8


# References, called by ops.py with the operators' arguments.


def pack_int4_reference(q: Tensor) -> Tensor:
    """Pack with plain torch."""
    shapes.pack_int4(q)
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise RuntimeError(f"q: got values {int(q.min())}..{int(q.max())}, expected -8..7")
    return pack.pack_int4(q)


def unpack_int4_reference(packed: Tensor) -> Tensor:
    """Unpack with plain torch."""
    shapes.unpack_int4(packed)
    return pack.unpack_int4(packed)


def p16k8_reference(w_q: Tensor, group: int) -> Tensor:
    """Return header and codes of the layout "cpu"."""
    shapes.p16k8(w_q, group)
    n, k = w_q.shape[0], 2 * w_q.shape[1]
    codes = pack.unpack_int4(w_q).add_(8).view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -k % 8, 0, -n % 16), value=8)
    split = codes.reshape(codes.shape[0] // 16, 16, -1, 2, 4)
    body = (split[:, :, :, 0] | (split[:, :, :, 1] << 4)).transpose(1, 2).reshape(-1)
    return torch.cat((write_header("cpu", n, k, group).to(w_q.device), body))


def prepack_w4_reference(
    w_q: Tensor, scale: Tensor, zero: Tensor | None, group: int, target: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Check, then lay out; CUDA layouts are made in qexp/kernels/cuda.py."""
    target = _check_prepack(w_q, scale, zero, group, target)
    if not bool(torch.isfinite(scale).all()):
        raise RuntimeError("scale: got elements that are not finite, expected finite weight scales")
    if target.startswith("cuda"):
        made: tuple[Tensor, Tensor, Tensor] = _cuda().prepack_w4(w_q, scale, zero, group, target)
        return made
    n = w_q.shape[0]
    w_s = scale.float().reshape(n, -1)
    w_z = w_s.new_empty(0) if zero is None else w_s * zero.float().reshape(n, -1)
    if target == "reference":
        head = write_header(target, n, 2 * w_q.shape[1], group).to(w_q.device)
        return torch.cat((head, w_q.flatten())), w_s.clone(), w_z
    return torch.ops.qexp.p16k8(w_q, group), _in_blocks(w_s), w_z if zero is None else _in_blocks(w_z)


def prepack_w4_shapes(
    w_q: Tensor, scale: Tensor, zero: Tensor | None, group: int, target: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shapes of the packed weight, for tracing."""
    target = _check_prepack(w_q, scale, zero, group, target)
    if target.startswith("cuda"):
        made: tuple[Tensor, Tensor, Tensor] = _cuda().prepack_w4_shapes(w_q, scale, zero, group, target)
        return made
    n, groups = w_q.shape[0], 1 if scale.dim() == 1 else scale.shape[1]
    shape = [n, groups] if target == "reference" else [-(-n // 16), groups, 16]
    w_p = w_q.new_empty([HEADER_BYTES + w_q.numel()]) if target == "reference" else shapes.p16k8(w_q, group)
    w_z = [0] if zero is None else shape
    return w_p, scale.new_empty(shape, dtype=torch.float32), scale.new_empty(w_z, dtype=torch.float32)


def _in_blocks(scales: Tensor) -> Tensor:
    """Return scales [N, groups] as [N/16, groups, 16], padded with 0."""
    padded = torch.nn.functional.pad(scales, (0, 0, 0, -scales.shape[0] % 16))
    return padded.reshape(-1, 16, scales.shape[1]).transpose(1, 2).contiguous()


def _check_prepack(w_q: Tensor, scale: Tensor, zero: Tensor | None, group: int, target: str) -> str:
    """Raise RuntimeError for arguments that do not fit each other; return the target, with "auto" resolved."""
    filled = w_q.dim() == 2 and w_q.shape[0] > 0 and w_q.shape[1] > 0
    shapes.expect("w_q", w_q, torch.uint8, "[N, K / 2], not empty", filled)
    n, k = w_q.shape[0], 2 * w_q.shape[1]
    if group and (group < 8 or group % 8 or k % group):
        raise RuntimeError(f"group: got {group}, expected 0 or a multiple of 8 that divides K={k}")
    fitting = [[n, k // group]] if group else [[n], [n, 1]]
    for name, value in (("scale", scale), ("zero", zero)):
        if value is not None and list(value.shape) not in fitting:
            raise RuntimeError(f"{name}: got shape {list(value.shape)}, expected {fitting[0]} (N={n}, K={k}, {group=})")
        if value is not None and value.device != w_q.device:
            raise RuntimeError(f"{name}: got {value.device}, expected {w_q.device}, that of w_q")
    if scale.dtype not in shapes.FLOATS:
        raise RuntimeError(f"scale: got {scale.dtype}, expected one of {shapes.FLOATS}")
    if zero is not None and zero.dtype == torch.uint8:
        raise RuntimeError(
            "zero: got uint8, expected the signed zero point on the axis -8..7: (zero.int() - 8).to(int8)"
        )
    if target != "auto" and target not in LAYOUTS:
        raise RuntimeError(f"target: got {target!r}, expected auto, {', '.join(LAYOUTS)}")
    return target if target != "auto" else _best_layout(w_q.device, group)


def _best_layout(device: torch.device, group: int) -> str:
    if device.type == "cuda":
        best: str = _cuda().best_layout(group)
        return best
    return "cpu" if device.type == "cpu" and build.load() else "reference"


def _cuda() -> Any:
    """Return the module of the CUDA kernels; imported only where a CUDA layout is asked for."""
    return importlib.import_module("qexp.kernels.cuda")


assert ops.OPS["prepack_w4"] == "int4"  # importing this module defines the operators
