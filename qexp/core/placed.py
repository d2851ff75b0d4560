"""A tensor that follows the computation: made on the CPU, copied once to the device and dtype it is used at."""

from __future__ import annotations

import torch
from torch import Tensor


class Placed:
    """One tensor and its latest copy; only one copy is kept so that folded transforms do not fill the device."""

    def __init__(self, tensor: Tensor) -> None:
        # A matmul's last bits depend on the layout, which saving does not keep. What is being learned is not copied.
        self.tensor = tensor if tensor.requires_grad else tensor.contiguous()
        self._copy = self.tensor

    def like(self, x: Tensor) -> Tensor:
        """Return the tensor on the device of x, in float64 if x is float64, else in float32."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.tensor.requires_grad:  # being learned: a kept copy would be stale after the next step
            return self.tensor.to(x.device, dtype)
        if (self._copy.device, self._copy.dtype) != (x.device, dtype):
            with torch.inference_mode(False):  # kept: a later caller may need gradients through it
                self._copy = self.tensor.to(x.device, dtype)
        return self._copy


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype of its arithmetic: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
