"""A layer of the KV cache whose recent tokens are exact and whose older ones are packed codes (KIVI).

What comes in one piece is seen exactly: a prompt is attended to as it is, and quantized behind that. Keys wait until
R of them are there and are then quantized together; of the values the last R wait. What is quantized never changes.

Source: arXiv:2402.02750 Algorithm 1; methods/kv_cache.md 3.3.
Differs: a decoded token attends to decoded tensors, so the saving is in what is kept, not in what is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qexp.core.packed_residual import RangeCodes, ResidualCodec
from qexp.models.attention import Door
from qexp.models.packed_cache import POSITIONS, CodedLayer


class ResidualKvLayer(CodedLayer):
    """One attention layer: codes, each part [B, A, groups or S, ...], and the exact rest, [B, A, S, E]."""

    is_croppable = False

    def __init__(self, codec: ResidualCodec, door: Door) -> None:
        super().__init__(door)
        self.codec = codec
        self.coded: tuple[RangeCodes | None, RangeCodes | None] = None, None
        self.recent: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return all that is stored, decoded, and k, v [B, A, S, E] behind it as they are; then store them."""
        keys, values = self.arrive(key_states), value_states
        if self.recent is not None:
            keys, values = (
                torch.cat([old, new], POSITIONS) for old, new in zip(self.recent, (keys, values), strict=True)
            )
        codec, dtype = self.codec, key_states.dtype
        all_keys = _behind(self.coded[0], keys, lambda codes: codec.decode_keys(codes, dtype))
        all_values = _behind(self.coded[1], values, lambda codes: codec.decode_values(codes, dtype))
        self._keep(keys, values)
        return self.hand_out(all_keys, all_values)

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """Quantize of what is exact so far whole residuals of keys, and the values older than the last R."""
        R, waiting = self.codec.residual_tokens, keys.shape[POSITIONS]
        done, old = waiting - waiting % R, max(0, values.shape[POSITIONS] - R)
        of_keys, of_values = self.coded
        if done:
            of_keys = _joined(of_keys, self.codec.encode_keys(keys[:, :, :done]))
        if old:
            of_values = _joined(of_values, self.codec.encode_values(values[:, :, :old]))
        self.coded = of_keys, of_values
        self.recent = keys[:, :, done:].clone(), values[:, :, old:].clone()  # copies: a view would keep the prompt

    def get_seq_length(self) -> int:
        """Return how many positions are stored."""
        if self.recent is None:
            return 0
        groups = 0 if self.coded[0] is None else self.coded[0].packed.shape[POSITIONS]
        return groups * self.codec.group + self.recent[0].shape[POSITIONS]

    def tensors(self) -> list[Tensor]:
        """Return codes, scales, minima, and the exact keys and values."""
        return [*(part for codes in self.coded if codes is not None for part in codes), *(self.recent or ())]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove positions. Raises: ValueError once anything is quantized, which stays so."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}), expected minus the number of positions to drop")
        if not tokens_to_remove or self.recent is None:
            return
        if any(codes is not None for codes in self.coded):
            R = self.codec.residual_tokens
            raise ValueError(
                f"crop({tokens_to_remove}) on a cache that has quantized tokens, which cannot be undone: R={R}"
            )
        self.change_each(lambda part: part[:, :, :tokens_to_remove])

    def reset(self) -> None:
        """Forget everything."""
        self.coded, self.recent, self.is_initialized = (None, None), None, False

    def change_each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor."""
        if self.recent is not None:
            keys, values = (None if codes is None else RangeCodes(*map(change, codes)) for codes in self.coded)
            self.coded, self.recent = (keys, values), (change(self.recent[0]), change(self.recent[1]))


def _behind(codes: RangeCodes | None, exact: Tensor, decode: Callable[[RangeCodes], Tensor]) -> Tensor:
    return exact if codes is None else torch.cat([decode(codes), exact], POSITIONS)


def _joined(old: RangeCodes | None, new: RangeCodes) -> RangeCodes:
    if old is None:
        return new
    return RangeCodes(*(torch.cat(parts, POSITIONS) for parts in zip(old, new, strict=True)))
