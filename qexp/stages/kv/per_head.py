"""Quantize the key and the value of each head of each token by themselves, in groups along the head.

asymmetric: s = clip (hi - lo) / (2^b - 1) on the true range of a group, z = round(-clip lo / s);
symmetric: s = clip max|x| / (2^(b-1) - 1). s and z are float16, as a cache keeps them. Every position is quantized, the
current one too, as QuaRot simulates it. ``pre_rope`` quantizes keys before RoPE, behind the norm of keys where there is
one, and without the rotation R3: a simulation only, since a cache of such keys would turn all of them at every token.

Source: arXiv:2404.00456 section 4 and methods/kv_cache.md 3.2, 3.4, 3.8 (QuaRot, SpinQuant; keys before RoPE: KVQuant).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.words import FULL_BITS
from qexp.kernels.quantize import fake_quantize_groups

PARAM_BITS = 16  # of the scale, and as many of the zero point


@dataclass(frozen=True, kw_only=True)
class PerHead:
    """The quantizer. ``group`` elements of a head share a scale, -1 the whole head; ``clip`` in (0, 1]."""

    bits: int
    symmetric: bool
    clip: float
    group: int
    pre_rope: bool

    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        if not 2 <= self.bits <= 8 and self.bits != FULL_BITS:
            raise UserError(f"kv.bits={self.bits}", f"2 to 8, or {FULL_BITS} for none", "bits.kv=4")
        if not 0 < self.clip <= 1:
            raise UserError(f"kv.clip={self.clip}", "a ratio in (0, 1]", "method.kv.clip=1.0")
        if self.group != -1 and self.group < 1:
            raise UserError(f"kv.group={self.group}", "a divisor of the head size, or -1", "method.kv.group=-1")

    def __call__(self, k_BASE: Tensor, v_BASE: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized keys and values [B, A, S, E], same dtype: no position looks at another.

        With ``pre_rope`` the keys are quantized already. Raises: UserError if the group does not divide the head.
        """
        if self.bits >= FULL_BITS:
            return k_BASE, v_BASE
        return k_BASE if self.pre_rope else self._quantize(k_BASE), self._quantize(v_BASE)

    def round_keys(self, k_E: Tensor) -> Tensor:
        """Return keys [..., E] as they are before RoPE, quantized. Raises: UserError if the group does not divide E."""
        return k_E if self.bits >= FULL_BITS else self._quantize(k_E)

    def cost(self, head_size: int) -> float:
        """Return bits per cached element: the code, and per group its scale and zero point."""
        if self.bits >= FULL_BITS:
            return float(FULL_BITS)
        parameters = 1 if self.symmetric else 2
        return self.bits + parameters * PARAM_BITS / self._width(head_size)

    def _quantize(self, x_BASE: Tensor) -> Tensor:
        """Return one of the two, quantized."""
        group = self._width(x_BASE.shape[-1])
        return fake_quantize_groups(x_BASE, self.bits, group, self.symmetric, self.clip, half=True)

    def _width(self, head_size: int) -> int:
        """Return how many elements share a scale."""
        width = head_size if self.group == -1 else self.group
        if head_size % width:
            got = f"kv.group={self.group} does not divide head_size={head_size}"
            raise UserError(got, f"a divisor of {head_size}", "method.kv.group=-1")
        return width
