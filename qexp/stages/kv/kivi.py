"""Keys per channel over groups of consecutive tokens, values per token in groups along the head; recent tokens exact.

Keys (after RoPE) have outlier channels, values have none: so each of the two is grouped along its quiet axis.
x^ = s code + min with s = (max - min) / (2^b - 1), both in float16. A cache quantizes keys when R of them have come,
values when R newer ones have: query t reads key j exactly iff j >= floor(t / R) R, value j iff j >= t - R.
``causal_residual`` simulates just that in one forward. ``all`` quantizes every complete group of tokens for everyone:
pessimistic, and not causal, since the range of a group knows tokens behind the query.

Source: arXiv:2402.02750 sections 3.2-3.3, Algorithm 1; methods/kv_cache.md 3.3, 3.8.
Differs: a constant group does not divide by zero; batches padded on the left are refused, not counted as tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.errors import UserError, choose
from qexp.core.words import FULL_BITS
from qexp.kernels.range_codes import PARAMETER_BITS, fake_range

RESIDUAL, ALL = "causal_residual", "all"


@dataclass(frozen=True, kw_only=True)
class Kivi:
    """The quantizer; ``group`` is G, ``residual_tokens`` R, a multiple of it; ``simulate`` is the rule of a forward."""

    bits: int
    group: int
    residual_tokens: int
    simulate: str

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        if not 2 <= self.bits <= 8 and self.bits != FULL_BITS:
            raise UserError(f"kv.bits={self.bits}", f"2 to 8, or {FULL_BITS} for none", "bits.kv=4")
        if self.group < 1:
            raise UserError(f"kv.group={self.group}", "how many tokens share a scale", "method.kv.group=32")
        if self.residual_tokens < 1 or self.residual_tokens % self.group:
            got = f"kv.residual_tokens={self.residual_tokens} with kv.group={self.group}"
            raise UserError(got, "a multiple of the group", f"method.kv.residual_tokens={4 * self.group}")
        choose("kv.simulate", self.simulate, (RESIDUAL, ALL), "method.kv.simulate")

    def __call__(self, k_BASE: Tensor, v_BASE: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys with every complete group of tokens quantized, and all values quantized: [B, A, S, E] each.

        Arithmetic in float32. Raises: UserError if the group does not divide the head.
        """
        if self.bits >= FULL_BITS:
            return k_BASE, v_BASE
        self._check(v_BASE.shape[-1])
        groups = k_BASE.shape[-2] // self.group
        grouped, rest = k_BASE.split([groups * self.group, k_BASE.shape[-2] - groups * self.group], dim=-2)
        columns = grouped.unflatten(-2, (groups, self.group)).mT  # [B, A, groups, E, G]
        keys = fake_range(columns, self.bits, self.group).mT.flatten(-3, -2)
        return torch.cat([keys, rest], dim=-2), fake_range(v_BASE, self.bits, self.group)

    def exact(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Say which keys and values the last ``queries`` of ``keys`` positions read exactly.

        Shapes: bool [queries, keys] each; None where the rule is ``all``.
        """
        if self.simulate == ALL or self.bits >= FULL_BITS:
            return None
        j, R = torch.arange(keys, device=device), self.residual_tokens
        t = j[keys - queries :, None]
        return j >= t // R * R, j >= t - R

    def cost(self, head_size: int) -> float:
        """Return bits per cached element in a long context: the code, and per group its scale and minimum.

        Exact are, besides, up to R - 1 keys and R values of each head: a constant, however long the context.
        """
        if self.bits >= FULL_BITS:
            return float(FULL_BITS)
        self._check(head_size)
        return self.bits + 2 * PARAMETER_BITS / self.group

    def _check(self, head_size: int) -> None:
        if head_size % self.group:
            got, width = f"kv.group={self.group} does not divide head_size={head_size}", self._divisor(head_size)
            raise UserError(got, f"a divisor of {head_size}", f"method.kv.group={width}")

    def _divisor(self, head_size: int) -> int:
        """Return the largest divisor of the head and of R that is not above the group."""
        return next(g for g in range(self.group, 0, -1) if head_size % g == 0 == self.residual_tokens % g)
