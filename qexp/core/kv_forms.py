"""What a KV quantizer may be beyond ``stages.Kv``: one that leaves recent tokens exact, one that comes before RoPE.

The attention door asks for these forms by their attributes, so that a member states its rule and computes no attention.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qexp.core.stages import Kv


@runtime_checkable
class ResidualKv(Protocol):
    """A quantizer under which a query reads recent keys and values exactly and the older ones quantized."""

    @property
    def bits(self) -> int:
        """Return the width of a code."""

    @property
    def group(self) -> int:
        """Return the tokens of a key's channel, and the elements of a token's value, that share a scale."""

    @property
    def residual_tokens(self) -> int:
        """Return how many recent tokens a cache keeps exact."""

    def exact(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Say which keys and which values the last ``queries`` of ``keys`` positions read exactly.

        Shapes: bool [queries, keys] each, or None where all of them read the same quantized ones.
        """


@runtime_checkable
class EarlyKv(Protocol):
    """A quantizer that can round keys before positions turn them; it then leaves the keys that the door gives it."""

    @property
    def pre_rope(self) -> bool:
        """Return whether it does."""

    def round_keys(self, k_E: Tensor) -> Tensor:
        """Return keys [..., E] before RoPE, quantized."""


def early(kv: Kv | None) -> EarlyKv | None:
    """Return the quantizer if it rounds keys before RoPE."""
    return kv if isinstance(kv, EarlyKv) and kv.pre_rope else None
