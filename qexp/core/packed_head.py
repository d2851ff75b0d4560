"""An 8-bit output head, and the embedding it may be tied to, for models where they are much of what a token reads.

Symmetric, one scale per row (token of the vocabulary), 255 levels. The head is two int4 planes, with inputs in floating
point (w8a16) or in 8 bits per token (w8a8, half the time); the embedding keeps the same codes row by row, since it
looks rows up. This is beyond what a recipe simulates: it is asked for by name (``engine.packing.pack_head``), never
done silently.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qexp.core.packed import TokenQuantizer
from qexp.core.packed_weight import FixedBuffers, IntegerWeight, PackedWeight
from qexp.core.words import FULL_BITS

TOP = 127
ROWS = 4096  # quantized at a time, in float32


class PackedEmbedding(FixedBuffers):
    """Rows of int8 codes [V, C] with a scale each; looks up and decodes."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids [...], [..., C] in the embedding's dtype."""
        return (self.codes[ids] * self.scale[ids][..., None]).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        """Follow ``model.to(dtype)`` in what is handed out, not in what is kept."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self


class PackedHead(nn.Module):
    """The output embedding, logits = x Wᵀ; ``quantizer`` of the inputs, or None."""

    def __init__(self, weight: PackedWeight, quantizer: TokenQuantizer | None) -> None:
        super().__init__()
        self.weight, self.quantizer = weight, quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [..., V] for x [..., C], in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        if self.quantizer is None:
            y = self.weight.times(rows)
        else:
            y = self.weight.times_codes(self.quantizer.codes(rows, None, False, self.weight.group), x.dtype)
        return y.view(*x.shape[:-1], self.weight.outputs)


@torch.no_grad()
def rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [V, C] and float32 scales [V] of a weight [V, C], rounded to the nearest."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    for start in range(0, len(weight), ROWS):
        some = weight[start : start + ROWS].float()
        step = some.abs().amax(1) / TOP
        scale[start : start + ROWS] = step
        codes[start : start + ROWS] = (some / step.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return codes, scale


def packed_head(codes: Tensor, scale: Tensor, bias: Tensor | None, act_bits: int) -> PackedHead:
    """Return the head of what :func:`rounded_rows` gave, for inputs of 8 or 16 bits."""
    unsigned = (codes.view(torch.uint8) ^ 128).contiguous()  # code + 128
    weight = PackedWeight([IntegerWeight(unsigned, scale[:, None], None, 8)], [bias])
    return PackedHead(weight, None if act_bits == FULL_BITS else TokenQuantizer(act_bits, True, 1.0))
