"""Weights, activations and float64 answers that the tests of the 4-bit products share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.kernels import build, int4, matmul

TIERS = ("scalar", "avx2", "avxvnni", "avx512bw", "avx512vnni")


def tiers() -> list[str]:
    """The tiers this CPU can be forced to, none without compiled kernels."""
    return [tier for tier in TIERS if build.load() and _offers(tier)]


def _offers(tier: str) -> bool:
    try:
        build.force_isa(tier)
    except ValueError:
        return False
    build.force_isa(None)
    return True


@contextmanager
def forced(tier: str) -> Iterator[None]:
    build.force_isa(tier)
    try:
        yield
    finally:
        build.force_isa(None)


@dataclass(frozen=True)
class Case:
    """Codes q [N, K] -8..7, scale and zero [N, groups], activations a [M, K] int8 and x [M, K]."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int
    a: Tensor
    a_scale: Tensor
    bias: Tensor | None

    def packed(self, target: str = "auto") -> matmul.W4:
        made = int4.prepack_w4(int4.pack_int4(self.q), self.scale, self.zero, self.group, target)
        return matmul.W4(*made, self.q.shape[0], self.group)

    def weight(self) -> Tensor:
        """The dequantized weight in float64."""
        n, k = self.q.shape
        codes = self.q.double().reshape(n, self.scale.shape[1], -1)
        if self.zero is not None:
            codes = codes - self.zero.double().unsqueeze(2)
        return (codes * self.scale.double().unsqueeze(2)).reshape(n, k)

    def answer(self, a: Tensor | None = None) -> Tensor:
        """The product with a (else self.a) in float64, [M, N]."""
        out = (self.a if a is None else a).double() @ self.weight().T * self.a_scale.double().unsqueeze(1)
        return out if self.bias is None else out + self.bias.double()

    def size(self, a: Tensor | None = None, a_scale: Tensor | None = None) -> Tensor:
        """Root of the sum of squares of the terms of each element, [M, N]."""
        a_scale = self.a_scale if a_scale is None else a_scale
        squares = (self.a if a is None else a).double().square() @ self.weight().square().T
        return squares.sqrt() * a_scale.double().unsqueeze(1) + (0 if self.bias is None else self.bias.double().abs())

    def integers(self) -> Tensor:
        return (self.a.long() @ self.q.long().T).to(torch.int32)

    def bound(self) -> float:
        """fp32 error of one fma a group, in order: 2e-7 as in kernels.md, times the growth of a longer chain."""
        return 2e-7 * max(1.0, (self.scale.shape[1] / 16) ** 0.5)


def draw(m: int, n: int, k: int, group: int, *, asymmetric: bool = False, bias: bool = False, seed: int = 0) -> Case:
    random = torch.Generator().manual_seed(seed)
    groups = k // group if group else 1

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random, dtype=torch.int8)

    return Case(
        q=integers(-8, 8, n, k),
        scale=torch.rand(n, groups, generator=random) + 0.1,
        zero=integers(-8, 8, n, groups) if asymmetric else None,
        group=group,
        a=torch.randint(-128, 128, (m, k), generator=random, dtype=torch.int8),
        a_scale=torch.rand(m, generator=random) + 0.1,
        bias=torch.randn(n, generator=random) if bias else None,
    )


def error(got: Tensor, want: Tensor, size: Tensor | None = None) -> float:
    """||got - want|| / ||size||, the greater of the whole and a quarter of the worst row: one bad row cannot hide.

    size (else want) is what the terms of each element add up to when signs are random; where a result of few elements
    cancels, its own size says nothing about rounding.
    """
    size = want if size is None else size
    gap = got.double() - want
    tiny = torch.finfo(torch.float64).tiny  # a row of zeros must come out as zeros
    whole, rows = gap.norm() / size.norm().clamp(min=tiny), gap.norm(dim=1) / size.norm(dim=1).clamp(min=tiny)
    return float(torch.maximum(whole, rows.max() / 4))
