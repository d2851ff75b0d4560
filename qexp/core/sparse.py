"""The few weights of a layer that stay out of all quantization, kept exactly: positions and 16-bit values (SqueezeLLM).

Stored row by row: where each row begins, the columns in 16 bits (32 from 65,536 inputs on), the values in float16.

Source: arXiv:2306.07629 section 4.2; methods/squeezellm.md section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 1 << 16  # columns that 16 bits can tell apart


@dataclass(frozen=True)
class Sparse:
    """Entries by rising row and column: ``row`` and ``column`` int64 [N], ``value`` [N]; ``shape`` of the weight."""

    row: Tensor
    column: Tensor
    value: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask_OI: Tensor, W_OI: Tensor) -> Sparse:
        """Return the masked weights, as float16 keeps them."""
        row, column = mask_OI.nonzero(as_tuple=True)
        return cls(row, column, W_OI[row, column].half(), (mask_OI.shape[0], mask_OI.shape[1]))

    def over(self, W_OI: Tensor) -> Tensor:
        """Return a weight with the kept values in their places, differentiable."""
        return W_OI.index_put((self.row, self.column), self.value.to(W_OI))

    def cleared(self, W_OI: Tensor) -> Tensor:
        """Return a weight with zeros in their places, differentiable: what is left to quantize."""
        return W_OI.index_put((self.row, self.column), W_OI.new_zeros(()))

    def to(self, device: torch.device) -> Sparse:
        """Return it on a device."""
        return Sparse(self.row.to(device), self.column.to(device), self.value.to(device), self.shape)

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors that are stored; the width is counted nowhere: the layer knows it."""
        starts = torch.zeros(self.shape[0] + 1, dtype=torch.int32)
        starts[1:] = torch.bincount(self.row.cpu(), minlength=self.shape[0]).cumsum(0)
        narrow = self.shape[1] <= MOST
        column = (self.column - MOST // 2).to(torch.int16) if narrow else self.column.to(torch.int32)
        return {"starts": starts, "column": column, "value": self.value.half()}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Tensor], inputs: int) -> Sparse:
        """Undo :meth:`packed`."""
        starts, column = packed["starts"].long(), packed["column"].long()
        column = column + MOST // 2 if packed["column"].dtype == torch.int16 else column
        row = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        return cls(row, column, packed["value"], (len(starts) - 1, inputs))

    @property
    def nbits(self) -> int:
        """Return the stored bits."""
        return 8 * sum(tensor.nbytes for tensor in self.packed().values())
