"""The operators on CUDA tensors, by a library of csrc/cuda: which kernel serves which shape.

"decode" up to 32 tokens; "wgmma" (sm_90a) above 64; "tile" (mma.sync) for what is left; "tile_s4" for packed 4-bit
activations on chips with 4-bit tensor cores (8.x); others get their 4-bit activations in bytes. w4a16 decodes the
weight once for more than 64 tokens. Arguments that no kernel covers go to the references.

Source: kernels.md sections 4 and 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qexp.kernels import had_quant, matmul, shapes
from qexp.kernels.cuda_abi import TYPES, Library, Product, Rotation, address
from qexp.kernels.cuda_weight import LAYOUTS, SMALLEST_GROUP, Weight, dequantized, is_packed, weight_of
from qexp.kernels.int4 import read_header
from qexp.kernels.shapes import HEADER_BYTES

FEW_TOKENS, SOME_TOKENS = 32, 64


class Kernels:
    """The operators by one library, for tensors of one compute capability; arguments as in ops.SCHEMAS."""

    def __init__(self, library: Library, capability: int) -> None:
        self.library, self.capability, self.forced = library, capability, ""

    def w4a8(
        self,
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
        """Return the product of int8 activations; see matmul.w4a8."""
        out = shapes.w4a8(a_q, a_scale, a_sums, w_p, w_s, w_z, n, group, bias, out_dtype)
        if not is_packed(w_s, n):
            return matmul.w4a8_reference(a_q, a_scale, a_sums, w_p, w_s, w_z, n, group, bias, out_dtype)
        weight = weight_of(w_p, w_s, w_z, n, a_q.shape[1], group)
        if weight.zero is not None and a_sums is None:
            a_sums = a_q.reshape(len(a_q), weight.groups, -1).sum(-1, dtype=torch.int32)
        return self._integer(a_q, a_scale.contiguous(), a_sums, weight, bias, out)

    def w4a4(
        self,
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
        """Return the product of 4-bit activations, packed or in int8; see matmul.w4a4."""
        if a_q.dtype == torch.int8:
            return self.w4a8(a_q, a_scale, a_sums, w_p, w_s, w_z, n, group, bias, out_dtype)
        out = shapes.w4a4(a_q, a_scale, a_sums, w_p, w_s, w_z, n, group, bias, out_dtype)
        if not is_packed(w_s, n):
            return matmul.w4a4_reference(a_q, a_scale, a_sums, w_p, w_s, w_z, n, group, bias, out_dtype)
        m, k = a_q.shape[0], 2 * a_q.shape[1]
        native = (
            self.capability < 90 and m > FEW_TOKENS and group % 64 == 0 and w_s.shape[1] <= max(1, k // (group or k))
        )
        if (self.forced == "tile_s4" or (native and not self.forced)) and (w_z is None or a_sums is not None):
            weight = weight_of(w_p, w_s, w_z, n, k, group)
            reordered = a_q.new_empty((m, _up(k, 64) // 2))
            self.library.repack("reorder_a4", a_q.contiguous(), m, k, reordered)
            return self._integer(reordered, a_scale.contiguous(), a_sums, weight, bias, out)
        codes = a_q.new_empty((m, _up(k, 64)), dtype=torch.int8)
        self.library.repack("expand_a4", a_q.contiguous(), m, k, codes)
        return self.w4a8(codes[:, :k], a_scale, a_sums, w_p, w_s, w_z, n, group, bias, out_dtype)

    def w4a8_i32(self, a_q: Tensor, w_p: Tensor, n: int) -> Tensor:
        """Return exact integers; reads the header, so it waits for the device: an op for tests."""
        out = shapes.w4a8_i32(a_q, w_p, n)
        header = read_header(w_p)
        if header.layout not in LAYOUTS:
            return matmul.w4a8_i32_reference(a_q, w_p, n)
        for name, got, expected in (("n", n, header.n), ("K", a_q.shape[1], header.k)):
            if got != expected:
                raise RuntimeError(f"{name}: got {got}, expected {expected}, with which w_p was packed")
        return self._integer(a_q, None, None, Weight(w_p[HEADER_BYTES:], None, None, None, n, header.k, 0), None, out)

    def w4a16(
        self, x: Tensor, w_p: Tensor, w_s: Tensor, w_z: Tensor | None, n: int, group: int, bias: Tensor | None
    ) -> Tensor:
        """Return the product of float activations; see matmul.w4a16."""
        out = shapes.w4a16(x, w_p, w_s, w_z, n, group, bias)
        if not is_packed(w_s, n):
            return matmul.w4a16_reference(x, w_p, w_s, w_z, n, group, bias)
        weight, m, k = weight_of(w_p, w_s, w_z, n, x.shape[1], group), x.shape[0], x.shape[1]
        if m <= SOME_TOKENS and x.dtype != torch.float32 and weight.inner is None:
            rows = _aligned(x, 32)
            product = _product(weight, rows, None, None, bias, out)
            product.a_type = TYPES[x.dtype]
            if self.library.w4a16(product, x):
                return out
        decoded = dequantized(self.library, weight, x.dtype)[:, :k]
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x, decoded, None if bias is None else bias.to(x.dtype))

    def hadamard(self, x: Tensor, block: int, scale: float, had_k: Tensor | None) -> Tensor:
        """Return the rotated rows; see had_quant.hadamard."""
        had_quant.check_rotation(x, block, had_k)
        rows = _aligned(x.reshape(-1, x.shape[-1]), 1)
        out = torch.empty_like(rows)
        rotation = _rotation(rows, block, had_k, True)
        rotation.out, rotation.factor = out.data_ptr(), scale
        rotation.group = rotation.sum_group = rotation.n
        if not self.library.rotate(rotation, False, x):
            return had_quant.hadamard_reference(x, block, scale, had_k)
        return out.reshape(x.shape)

    def had_quant(
        self,
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
        """Return codes, scales and sums; see had_quant.had_quant."""
        q, scale, sums = shapes.had_quant(x, bits, block, rotate, clip, group, had_k, container8, sum_group)
        rows = _aligned(x.reshape(-1, x.shape[-1]), 1)
        rotation = _rotation(rows, block, had_k, rotate)
        rotation.out, rotation.scale, rotation.sums = q.data_ptr(), scale.data_ptr(), sums.data_ptr()
        rotation.bits, rotation.packed, rotation.clip = bits, int(q.dtype == torch.uint8), clip
        rotation.group, rotation.sum_group = group or rotation.n, sum_group or rotation.n
        if not self.library.rotate(rotation, True, x):
            return had_quant.had_quant_reference(x, bits, block, rotate, clip, group, had_k, container8, sum_group)
        return q, scale, sums

    def _integer(
        self, a: Tensor, a_scale: Tensor | None, a_sums: Tensor | None, weight: Weight, bias: Tensor | None, out: Tensor
    ) -> Tensor:
        """Run the integer product into ``out`` by the kernel that suits the shape."""
        rows = a.contiguous() if a.dtype == torch.uint8 else _aligned(a, 32)
        product = _product(weight, rows, a_scale, a_sums, bias, out)
        fits = bool(self.forced) and (self.forced == "tile_s4") == (a.dtype == torch.uint8)
        for kernel in [self.forced] if fits else self._preferred(a):
            if self.library.w4a8(product, kernel, a):
                return out
        raise RuntimeError(f"group: got {weight.group}, expected 0 or a multiple of 32 (K={weight.k}, {self.forced=})")

    def _preferred(self, a: Tensor) -> list[str]:
        m = a.shape[0]
        if a.dtype == torch.uint8:
            return ["tile_s4"]
        if m <= FEW_TOKENS:
            return ["decode", "tile"]
        return ["wgmma", "tile"] if m > SOME_TOKENS and self.capability == 90 else ["tile", "decode"]


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _aligned(rows: Tensor, columns: int) -> Tensor:
    """Return rows [M, K] dense or strided as they are if a kernel can read them, else a copy padded with zeros."""
    size, k = rows.element_size(), rows.shape[1]
    strided = rows.stride(1) == 1 and rows.stride(0) * size % 16 == 0 and rows.data_ptr() % 16 == 0
    if k % columns == 0 and (rows.is_contiguous() if columns == 1 else strided) and rows.data_ptr() % 16 == 0:
        return rows
    copy = rows.new_zeros((rows.shape[0], _up(k, columns)))
    copy[:, :k] = rows
    return copy


def _product(
    weight: Weight, a: Tensor, a_scale: Tensor | None, a_sums: Tensor | None, bias: Tensor | None, out: Tensor
) -> Product:
    """Describe a product; ``a`` may be padded beyond the weight's columns, where the layout holds zeros."""
    product = weight.describe()
    product.a, product.a_stride = address(a), a.stride(0) * a.element_size()
    product.a_scale, product.a_sums = address(a_scale), address(None if a_sums is None else a_sums.contiguous())
    product.bias, product.out = address(bias), address(out)
    product.m, product.n = out.shape
    product.k = _up(weight.k, SMALLEST_GROUP)
    product.out_type, product.bias_type = TYPES[out.dtype], TYPES[bias.dtype] if bias is not None else 0
    return product


def _rotation(rows: Tensor, block: int, had_k: Tensor | None, rotate: bool) -> Rotation:
    n = rows.shape[1]
    width = (block or n) if rotate else 1
    mixed = had_k is not None and rotate
    return Rotation(
        x=rows.data_ptr(),
        had_k=address(had_k.contiguous()) if had_k is not None and mixed else None,
        rows=rows.shape[0],
        n=n,
        width=width,
        order=len(had_k) if had_k is not None and mixed else 1,
        x_type=TYPES[rows.dtype],
        factor=1 / math.sqrt(width),
    )
