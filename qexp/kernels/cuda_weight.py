"""Packed weights of the CUDA kernels: made, described and decoded. The layout is in cuda.py and csrc/cuda/layout.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qexp.kernels.cuda_abi import TYPES, Library, Product, address
from qexp.kernels.int4 import write_header
from qexp.kernels.shapes import HEADER_BYTES

LAYOUTS = ("cuda_mma", "cuda_sm90")  # two names of one layout
ROWS, COLUMNS, SMALLEST_GROUP, DEPTH = 128, 64, 32, 131072


class Weight(NamedTuple):
    """A packed weight [n, k]: tiles uint8, scale [groups, N'], two-level inner scales, scale * zero; None if absent."""

    tiles: Tensor
    scale: Tensor | None
    inner: Tensor | None
    zero: Tensor | None
    n: int
    k: int
    group: int

    @property
    def groups(self) -> int:
        """Return how many groups a row has."""
        return self.k // self.group if self.group else 1

    def describe(self) -> Product:
        """Return a product with the weight's fields set."""
        return Product(
            w=address(self.tiles),
            scale=address(self.scale),
            inner=address(self.inner),
            zero=address(self.zero),
            n=self.n,
            k=self.k,
            group=self.group,
        )


def is_packed(w_s: Tensor, n: int) -> bool:
    """Return whether scales are those of this layout: fp32 [1, groups, n rounded up to 128]."""
    return w_s.dim() == 3 and w_s.shape[0] == 1 and w_s.shape[2] == -(-n // ROWS) * ROWS


def weight_of(w_p: Tensor, w_s: Tensor, w_z: Tensor | None, n: int, k: int, group: int) -> Weight:
    """Return the parts of a packed weight. Raises: RuntimeError if they do not fit n, k and group."""
    if group < 0 or (group and (group % SMALLEST_GROUP or k % group)):
        raise RuntimeError(f"group: got {group}, expected 0 or a multiple of {SMALLEST_GROUP} that divides K={k}")
    if k >= DEPTH:
        raise RuntimeError(f"K: got {k}, expected less than {DEPTH}, where int32 sums could overflow")
    expected = HEADER_BYTES + w_s.shape[2] * (-(-k // COLUMNS) * COLUMNS) // 2
    if w_p.numel() != expected or w_p.data_ptr() % 16:
        raise RuntimeError(f"w_p: got {w_p.numel()} bytes, expected {expected}, aligned to 16, for n={n} and K={k}")
    groups = k // group if group else 1
    two_level = bool(group) and w_s.shape[1] == groups + 1
    if w_s.shape[1] != groups + two_level:
        raise RuntimeError(f"w_s: got shape {list(w_s.shape)}, expected [1, {groups}, {w_s.shape[2]}] ({group=})")
    zero = None if w_z is None or w_z.numel() == 0 else w_z.contiguous()
    if zero is not None and list(zero.shape) != [1, groups, w_s.shape[2]]:
        raise RuntimeError(f"w_z: got shape {list(zero.shape)}, expected [1, {groups}, {w_s.shape[2]}]")
    scale = w_s.contiguous()
    return Weight(w_p[HEADER_BYTES:], scale, scale[:, 1:] if two_level else None, zero, n, k, group)


def prepack(
    library: Library, w_q: Tensor, scale: Tensor, zero: Tensor | None, group: int, target: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (w_p, w_s, w_z) of checked arguments (int4.prepack_w4). Raises: RuntimeError for groups not of 32."""
    n, k = w_q.shape[0], 2 * w_q.shape[1]
    if group % SMALLEST_GROUP:
        raise RuntimeError(f"group: got {group}, expected 0 or a multiple of {SMALLEST_GROUP} for target {target!r}")
    w_p = w_q.new_empty(HEADER_BYTES + _up(n, ROWS) * _up(k, COLUMNS) // 2)
    w_p[:HEADER_BYTES] = write_header(target, n, k, group).to(w_q.device)
    library.repack("prepack_w4", w_q.contiguous(), n, k, w_p[HEADER_BYTES:])
    w_s = _rows_last(scale.float().reshape(n, -1))
    if zero is None:
        return w_p, w_s, w_s.new_empty(0)
    return w_p, w_s, _rows_last(scale.float().reshape(n, -1) * zero.float().reshape(n, -1))


def prepack_two_level(
    library: Library, w_q: Tensor, outer: Tensor, inner: Tensor, group: int, target: str = "cuda_mma"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a packed weight outer[n] inner[n, g] q with integer group scales, which need no float in the main loop.

    Shapes: w_q canonical uint8 [N, K / 2], outer fp32 [N], inner of integers 1..15 [N, K / group], group a multiple of
    64. Raises: RuntimeError naming the argument.
    """
    n, k = w_q.shape[0], 2 * w_q.shape[1]
    if group < 64 or group % 64 or k % group or list(inner.shape) != [n, k // group]:
        raise RuntimeError(
            f"inner: got shape {list(inner.shape)}, {group=}, expected [{n}, K / group], group % 64 == 0"
        )
    if not bool(((inner >= 1) & (inner <= 15) & (inner == inner.round())).all()):
        raise RuntimeError("inner: got values outside 1..15, expected integers, so that products fit 8 bits")
    w_p, w_s, w_z = prepack(library, w_q, outer.reshape(n, 1), None, 0, target)
    w_p[:HEADER_BYTES] = write_header(target, n, k, group).to(w_q.device)
    return w_p, torch.cat((w_s, _rows_last(inner.float())), dim=1), w_z


def two_level(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round group scales [N, groups] to outer[n] inner[n, g] with inner in 1..15; the largest of a row is exact."""
    outer = scale.float().amax(1) / 15
    return outer, (scale.float() / outer.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(1, 15)


def prepack_shapes(w_q: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shapes of the packed weight, for tracing."""
    n, k = w_q.shape[0], 2 * w_q.shape[1]
    shape = [1, 1 if scale.dim() == 1 else scale.shape[1], _up(n, ROWS)]
    w_p = w_q.new_empty([HEADER_BYTES + _up(n, ROWS) * _up(k, COLUMNS) // 2])
    w_z = [0] if zero is None else shape
    return w_p, scale.new_empty(shape, dtype=torch.float32), scale.new_empty(w_z, dtype=torch.float32)


def dequantized(library: Library, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight [n, k] in ``dtype``."""
    out = weight.tiles.new_empty((weight.n, weight.k), dtype=dtype)
    product = weight.describe()
    product.out, product.out_type = out.data_ptr(), TYPES[dtype]
    library.dequantize(product, out)
    return out


def unprepacked(library: Library, weight: Weight) -> Tensor:
    """Return the canonical codes, uint8 [n, k / 2]."""
    out = weight.tiles.new_empty((weight.n, weight.k // 2))
    library.repack("unprepack_w4", weight.tiles, weight.n, weight.k, out)
    return out


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _rows_last(values: Tensor) -> Tensor:
    """Return [N, groups] as [1, groups, N'], padded with 0."""
    return torch.nn.functional.pad(values.T, (0, -values.shape[0] % ROWS)).contiguous()[None]
