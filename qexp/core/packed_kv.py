"""Keys and values as packed codes: the integer form of a KV quantizer.

Per head and token, one range per group along the head; the codes decode, bit for bit, to what the quantizer simulates.
Source: methods/kv_cache.md 3.2; kernels.md section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qexp.core.rng import generator
from qexp.core.stages import Kv
from qexp.kernels.kv_codes import BITS, dequantize_codes, quantize_codes
from qexp.kernels.kv_codes import Codes as Codes


@runtime_checkable
class GroupedKv(Protocol):
    """The settings a KV quantizer has if it may be one that rounds groups along the head."""

    @property
    def bits(self) -> int:
        """Return the width of a code."""

    @property
    def symmetric(self) -> bool:
        """Return whether the range is symmetric about 0."""

    @property
    def clip(self) -> float:
        """Return the fraction of the range that is covered."""

    @property
    def group(self) -> int:
        """Return the elements per scale; -1 is the whole head."""


@dataclass(frozen=True)
class KvCodec:
    """Packs tensors [..., E]: uint8 codes [..., E bits / 8] with float16 scale and zero [..., G]."""

    bits: int
    symmetric: bool
    clip: float
    group: int  # 0: the whole head

    def encode(self, x: Tensor) -> Codes:
        """Return the codes of x [..., E] (float64 as float32)."""
        x = x.float() if x.dtype == torch.float64 else x
        kept = quantize_codes(x, self.bits, group=self.group, symmetric=self.symmetric, clip=self.clip, half=True)
        return Codes(kept.packed, kept.scale.half(), kept.zero.half())

    def decode(self, codes: Codes, dtype: torch.dtype) -> Tensor:
        """Return [..., E] in ``dtype``."""
        wide = Codes(codes.packed, codes.scale.float(), codes.zero.float())
        narrow = torch.float32 if dtype == torch.float64 else dtype
        return dequantize_codes(wide, self.bits, group=self.group, dtype=narrow).to(dtype)


@torch.no_grad()
def codec_of(kv: Kv, head_size: int) -> KvCodec | None:
    """Return the integer form of ``kv`` for heads of this size, or None where it has none.

    Settings of the right names are believed only if the codes decode to what ``kv`` computes on a random head.
    """
    if not isinstance(kv, GroupedKv) or kv.bits not in BITS or head_size % 8:
        return None
    group = 0 if kv.group in (-1, head_size) else kv.group
    if group and head_size % group:
        return None
    codec = KvCodec(kv.bits, kv.symmetric, kv.clip, group)
    sample = torch.randn(2, 1, 1, 8, head_size, generator=generator(0, "kv codec"))
    simulated = kv(sample[0], sample[1])
    same = all(torch.equal(codec.decode(codec.encode(x), x.dtype), y) for x, y in zip(sample, simulated, strict=True))
    return codec if same else None
