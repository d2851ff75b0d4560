"""Integer weights in the layout of the kernels: one int4 plane up to 4 bits, two planes up to 8.

A grid stores codes c in 0 .. 2^b - 1 with weight = s (c - z). For b <= 4 the kernels get q = c - 2^(b-1) in -8 .. 7 and
the zero point z - 2^(b-1). For 5 to 8 bits the byte q = c - 2^(b-1) is cut, exactly, into two int4 matrices
    q = 16 h + l + 8,   h, l in -8 .. 7,      w = 16 s h + s (l - (z - 2^(b-1) - 8)),
and both go through the same kernels: any width, group and zero point runs, 8-bit weights in 8 bits of memory and, where
arithmetic is the limit, at half the speed of 4-bit ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qexp.core.linear import QuantLinear
from qexp.kernels.matmul import W4, w4a4, w4a8, w4a16
from qexp.kernels.pack import pack_int4

CHECKED_ROWS = 16
HALF = 8  # of the 16 values of an int4
PARTS = ("w_p", "w_s", "w_z")  # of a plane: codes in the kernels' layout, scales, zero terms
ALIGNMENT = 8  # columns and groups of the kernels come in eights


class Activations(NamedTuple):
    """Codes of a matrix [M, K]: x = scale (codes - zero), ``zero`` None for 0; ``sums`` of codes per weight group."""

    codes: Tensor
    scale: Tensor
    sums: Tensor
    zero: Tensor | None
    bits: int


@dataclass(frozen=True)
class IntegerWeight:
    """What an integer grid stored: weight = scale (code - zero); ``zero`` None stands for 2^(bits-1).

    Shapes: codes uint8 [O, I], scale and zero float32 [O, G].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    @property
    def group(self) -> int:
        """Return the columns per scale, 0 for the whole row."""
        return 0 if self.scale.shape[1] == 1 else self.codes.shape[1] // self.scale.shape[1]

    def decoded(self) -> Tensor:
        """Return the weight [O, I] in float64."""
        zero = torch.full_like(self.scale, 1 << (self.bits - 1)) if self.zero is None else self.zero
        slices = self.codes.double().view(*self.scale.shape, -1)
        return ((slices - zero.double()[..., None]) * self.scale.double()[..., None]).view(self.codes.shape)

    def stands_for(self, decoded: Tensor) -> bool:
        """Return whether the first rows are ``decoded`` [R, I]."""
        rows = slice(len(decoded))
        zero = None if self.zero is None else self.zero[rows]
        few = replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=zero)
        return torch.allclose(few.decoded(), decoded.double(), rtol=1e-5, atol=0)

    def row_sums(self) -> Tensor:
        """Return the sums of the rows of the weight, float32 [O]; integer sums first, so that little is rounded."""
        columns = self.codes.shape[1] // self.scale.shape[1]
        codes = self.codes.view(*self.scale.shape, columns).sum(-1, dtype=torch.int32)
        zero = float(1 << (self.bits - 1)) if self.zero is None else self.zero.double()
        return ((codes - columns * zero) * self.scale.double()).sum(1).float()


def integer_weight(linear: QuantLinear) -> IntegerWeight | None:
    """Return the integers behind a quantized layer, or None if its grid is not uniform: found by decoding some rows."""
    grid, codes, params = linear.grid, linear.codes, linear.params
    if grid is None or codes is None or grid.dim != 1 or "scale" not in params or params.keys() - {"scale", "zero"}:
        return None
    zero = params.get("zero")
    made = IntegerWeight(codes, params["scale"].float(), None if zero is None else zero.float(), grid.bits)
    middle = torch.full_like(made.scale, (2**grid.bits - 1) / 2)  # of a grid without a zero level
    tried = [made] if zero is not None else [made, replace(made, zero=middle)]
    decoded = grid.decode(codes[:CHECKED_ROWS], {name: value[:CHECKED_ROWS] for name, value in params.items()})
    return next((guess for guess in tried if guess.stands_for(decoded)), None)


def is_aligned(weight: IntegerWeight) -> bool:
    """Return whether the kernels take this shape."""
    return weight.codes.shape[1] % ALIGNMENT == 0 and weight.group % ALIGNMENT == 0


class FixedBuffers(nn.Module):
    """A module whose buffers have the dtype they need, whatever the rest of the model computes in."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedBuffers:  # noqa: ARG002
        """Follow ``model.to(device)`` but not ``model.to(dtype)``: scales stay float32, whatever the model's dtype."""
        device = fn(torch.empty(0, device=next(self.buffers()).device)).device
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(device)
        return self


class PackedWeight(FixedBuffers):
    """Weights [N, K], stacked from several layers of equal grid, with their biases; computes y = x Wᵀ + b."""

    bias: Tensor | None
    row_sums: Tensor

    def __init__(self, parts: Sequence[IntegerWeight], biases: Sequence[Tensor | None], target: str = "auto") -> None:
        super().__init__()
        codes, scale = torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts])
        zero = None if parts[0].zero is None else torch.cat([_zero(p) for p in parts])
        self.outputs, self.inputs = codes.shape
        self.group, bits = parts[0].group, max(p.bits for p in parts)
        halves = torch.cat([torch.full_like(p.codes[:, :1], 1 << (p.bits - 1)) for p in parts])
        q = codes.to(torch.int16) - halves
        middle = None if zero is None else zero - halves
        planes = [_plane(q, scale, middle, target)] if bits <= 4 else _two_planes(q, scale, middle, target)
        self.count = len(planes)
        for i, plane in enumerate(planes):
            for name, tensor in zip(PARTS, plane, strict=True):
                self.register_buffer(f"{name}{i}", tensor)
        self.register_buffer("bias", _stacked(biases, [len(p.codes) for p in parts], scale.device))
        self.register_buffer("row_sums", torch.cat([p.row_sums() for p in parts]))

    @property
    def kind(self) -> str:
        """Return the weight bits as they lie in memory: w4, or w8 (two int4 planes)."""
        return f"w{4 * self.count}"

    @property
    def device(self) -> torch.device:
        """Return where the weight is."""
        return self.row_sums.device

    @property
    def planes(self) -> list[W4]:
        """Return the int4 matrices whose products are added."""
        return [self._plane(i) for i in range(self.count)]

    def _plane(self, i: int) -> W4:
        w_p, w_s, w_z = (getattr(self, f"{part}{i}") for part in PARTS)
        return W4(w_p, w_s, w_z, self.outputs, self.group)

    def times(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b [M, N] in the dtype of x [M, K] (bfloat16, float16 or float32); sums in float32."""
        if self.count == 1:
            return w4a16(x, self.planes[0], self.bias)
        high, low = self.planes  # in float32: two 16-bit roundings would be one too many
        return (w4a16(x.float(), high, None) + w4a16(x.float(), low, self.bias)).to(x.dtype)

    def times_codes(self, a: Activations, dtype: torch.dtype) -> Tensor:
        """Return x Wᵀ + b [M, N] in ``dtype`` for x given as codes; scaled in float32, rounded once."""
        product, given = w4a4 if a.bits == 4 else w4a8, (a.codes, a.scale, a.sums)
        if self.count == 1 and a.zero is None:
            return product(*given, self.planes[0], self.bias, dtype)
        y = product(*given, self.planes[-1], self.bias, torch.float32)
        if self.count == 2:
            y = y.add_(product(*given, self.planes[0], None, torch.float32))
        if a.zero is not None:  # sum_k w (q - zero) = sum_k w q - zero sum_k w
            y = y.addr_(a.scale * a.zero, self.row_sums, alpha=-1)
        return y.to(dtype)


def _zero(part: IntegerWeight) -> Tensor:
    assert part.zero is not None
    return part.zero


def _plane(q: Tensor, scale: Tensor, zero: Tensor | None, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return one int4 matrix prepacked, by ``PARTS``; zero (float, on the axis of q) [N, G] or None."""
    group = 0 if scale.shape[1] == 1 else q.shape[1] // scale.shape[1]
    flat = (scale[:, 0], None if zero is None else zero[:, 0]) if group == 0 else (scale, zero)
    packed: tuple[Tensor, Tensor, Tensor] = torch.ops.qexp.prepack_w4(pack_int4(q.to(torch.int8)), *flat, group, target)
    return packed


def _two_planes(q: Tensor, scale: Tensor, zero: Tensor | None, target: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    high = q >> 4
    low = q - (high << 4) - HALF
    return [
        _plane(high, 16 * scale, None, target),
        _plane(low, scale, (torch.zeros_like(scale) if zero is None else zero) - HALF, target),
    ]


def _stacked(biases: Sequence[Tensor | None], sizes: Sequence[int], device: torch.device) -> Tensor | None:
    """Return the biases in one float32 vector, zeros where a layer has none; None if none has."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, sizes, strict=True)
    return torch.cat([torch.zeros(n, device=device) if b is None else b.detach().float() for b, n in pairs])
