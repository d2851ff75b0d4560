"""Groups of tokens as packed codes: the integer form of a KV quantizer that leaves recent tokens exact.

Keys are packed along tokens, per channel, values along the head, per token; both decode, bit for bit, to what the
quantizer simulates. Source: arXiv:2402.02750 Algorithm 1; methods/kv_cache.md 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.core.kv_forms import ResidualKv
from qexp.core.rng import generator
from qexp.core.stages import Kv
from qexp.kernels.kv_codes import BITS
from qexp.kernels.range_codes import RangeCodes as RangeCodes
from qexp.kernels.range_codes import decode_range, encode_range

PACKED_TOGETHER = 8  # codes of a row that the kernels take at a time


@dataclass(frozen=True)
class ResidualCodec:
    """Packs groups of ``group`` tokens (keys) or elements (values); ``residual_tokens`` recent ones stay exact."""

    bits: int
    group: int
    residual_tokens: int

    def encode_keys(self, k_BATE: Tensor) -> RangeCodes:
        """Return the codes of keys [B, A, T, E], T a multiple of the group: each part [B, A, T / group, E, ...]."""
        columns = k_BATE.unflatten(2, (k_BATE.shape[2] // self.group, self.group)).mT
        return encode_range(columns.contiguous(), self.bits, self.group)

    def decode_keys(self, codes: RangeCodes, dtype: torch.dtype) -> Tensor:
        """Return keys [B, A, T, E] in ``dtype``."""
        return decode_range(codes, self.bits, self.group, dtype).mT.flatten(2, 3)

    def encode_values(self, v_BATE: Tensor) -> RangeCodes:
        """Return the codes of values [B, A, T, E]: each part [B, A, T, ...]."""
        return encode_range(v_BATE, self.bits, self.group)

    def decode_values(self, codes: RangeCodes, dtype: torch.dtype) -> Tensor:
        """Return values [B, A, T, E] in ``dtype``."""
        return decode_range(codes, self.bits, self.group, dtype)


@torch.no_grad()
def residual_codec_of(kv: Kv, head_size: int) -> ResidualCodec | None:
    """Return the integer form of ``kv`` for heads of this size, or None where it has none.

    Settings of the right names are believed only if the codes decode to what ``kv`` computes on a random head.
    """
    if not isinstance(kv, ResidualKv) or kv.bits not in BITS or kv.group % PACKED_TOGETHER or head_size % kv.group:
        return None
    codec = ResidualCodec(kv.bits, kv.group, kv.residual_tokens)
    k, v = torch.randn(2, 1, 2, 2 * kv.group, head_size, generator=generator(0, "residual codec"))
    k_hat, v_hat = kv(k, v)
    same = torch.equal(codec.decode_keys(codec.encode_keys(k), k.dtype), k_hat)
    same &= torch.equal(codec.decode_values(codec.encode_values(v), v.dtype), v_hat)
    return codec if same else None
