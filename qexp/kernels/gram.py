"""H = XᵀX, half of it computed: the second moment that every Hessian-based solver starts from.

The compiled kernel (csrc/cpu/gram.h) takes float32 and bfloat16 rows; products of bfloat16 numbers are exact in
float32, so no precision is lost on the way. The reference halves the work too, by cutting the columns in two and
mirroring the corner.

Source: methods/gptq.md section 2 (the sum); own measurement in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.kernels import ops, shapes

SMALL = 256  # columns below which a matrix product is not worth halving


def gram(X_TI: Tensor) -> Tensor:
    """Return XᵀX.

    Shapes: X [T, I] -> [I, I], symmetric to the bit where compiled. Dtypes: float32 and 16-bit X give float32 sums,
    float64 X gives float64. No derivative.
    """
    if X_TI.is_cuda or X_TI.dtype == torch.float64:
        wide = X_TI if X_TI.dtype == torch.float64 else X_TI.float()
        return wide.T @ wide
    H_II: Tensor = torch.ops.qexp.gram(X_TI.float() if X_TI.dtype == torch.float16 else X_TI)
    return H_II


def gram_reference(x: Tensor) -> Tensor:
    """Return xᵀx in float32: the operator where nothing is compiled."""
    shapes.gram(x)
    return _halves(x.float())


def _halves(x: Tensor) -> Tensor:
    size = x.shape[1]
    if size <= SMALL:
        return x.T @ x
    left, right = x[:, : size // 2], x[:, size // 2 :]
    corner = left.T @ right
    return torch.cat([torch.cat([_halves(left), corner], 1), torch.cat([corner.T, _halves(right)], 1)])


assert "gram" in ops.OPS  # importing ops defines the operator
