"""A KV cache of packed codes for transformers' generation.

Each layer keeps the codes of keys (after RoPE and, where the recipe has it, after the rotation R3) and values, and
hands attention what they decode to. The attention door then rotates the query alone. The result is that of fake
quantization in the door, token by token or in one piece. Sliding-window layers keep every position: the mask hides the
old ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from qexp.core.packed_kv import Codes, KvCodec
from qexp.models.attention import Door

POSITIONS = 2  # the dimension of [B, A, S, ...] that grows


class CodedLayer(DynamicLayer):
    """What layers that keep codes have in common: the way to the attention door, and a change of every tensor."""

    def __init__(self, door: Door) -> None:
        super().__init__()
        self.door = door

    def arrive(self, key_states: Tensor) -> Tensor:
        """Return new keys [B, A, S, E] as they are stored: rotated where the recipe rotates them."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return key_states if self.door.rotation is None else self.door.rotation.apply(key_states)

    def hand_out(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return decoded keys and values, and tell the door not to quantize them again."""
        self.door.decoded = weakref.ref(keys)
        return keys, values

    def tensors(self) -> list[Tensor]:
        """Return all that is stored."""
        raise NotImplementedError

    def change_each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Return the bytes of all that is stored."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these sequences of the batch (beam search)."""
        self.change_each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self.change_each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self.change_each(lambda part: part[indices])

    def offload(self) -> None:
        """Move to the host."""
        self.change_each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device of the keys."""
        self.change_each(lambda part: part.to(self.device, non_blocking=True))


class PackedKvLayer(CodedLayer):
    """The codes of one attention layer, each part [B, A, S, ...]."""

    def __init__(self, codec: KvCodec, door: Door) -> None:
        super().__init__(door)
        self.codec = codec
        self.stored: tuple[Codes, Codes] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append k, v [B, A, S, E] and return all that is stored, decoded, in their dtype."""
        dtype = key_states.dtype
        new = self.codec.encode(self.arrive(key_states)), self.codec.encode(value_states)
        if self.stored is not None:
            new = _joined(self.stored[0], new[0]), _joined(self.stored[1], new[1])
        self.stored = new
        return self.hand_out(self.codec.decode(new[0], dtype), self.codec.decode(new[1], dtype))

    def get_seq_length(self) -> int:
        """Return how many positions are stored."""
        return 0 if self.stored is None else self.stored[0].packed.shape[POSITIONS]

    def tensors(self) -> list[Tensor]:
        """Return codes, scales and zero points."""
        return [part for codes in self.stored or () for part in codes]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove positions, as transformers asks: with a number that is not positive."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}), expected minus the number of positions to drop")
        if tokens_to_remove:
            self.change_each(lambda part: part[:, :, :tokens_to_remove])

    def reset(self) -> None:
        """Forget everything."""
        self.stored, self.is_initialized = None, False

    def change_each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every stored tensor."""
        if self.stored is not None:
            keys, values = (Codes(*(change(part) for part in codes)) for codes in self.stored)
            self.stored = keys, values


class PackedKvCache(Cache):
    """One layer of codes per decoder block."""

    def __init__(self, layers: Sequence[CodedLayer]) -> None:
        super().__init__(layers=list(layers))

    def nbytes(self) -> int:
        """Return the bytes of all that is stored."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, CodedLayer))


def _joined(old: Codes, new: Codes) -> Codes:
    return Codes(*(torch.cat(parts, dim=POSITIONS) for parts in zip(old, new, strict=True)))
