"""H = XᵀX, half of it computed: the second moment that every Hessian-based solver starts from.

Sums over many tokens gather in float64, on and above the diagonal only (:func:`add_gram`), and are mirrored once at the
end (:func:`mirrored`). The compiled kernel (csrc/cpu/gram.h) takes float32 and bfloat16 rows; products of bfloat16
numbers are exact in float32, but for subnormals, which count as zero where the machine multiplies them in pairs.

Source: methods/gptq.md section 2 (the sum); own measurement in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.kernels import ops, shapes

SMALL = 256  # columns below which a matrix product is not worth halving


def add_gram(H_II: Tensor, X_TI: Tensor) -> None:
    """Add XᵀX to H on and above its diagonal, in place; below it H stays as it is.

    Shapes: H float64 [I, I], contiguous, X [T, I] of any float dtype. Products of 16- and 32-bit X are summed in
    float32 over 512 rows (1024 of bfloat16; all T by the reference), then in float64. No derivative.
    Raises: RuntimeError naming what does not fit.
    """
    if X_TI.dtype == torch.float64:
        H_II += (X_TI.T @ X_TI).triu()
        return
    torch.ops.qexp.gram_(H_II, X_TI.float() if X_TI.dtype == torch.float16 else X_TI)


def mirrored(H_II: Tensor) -> Tensor:
    """Return the symmetric matrix that agrees with H on and above its diagonal."""
    return H_II.triu() + H_II.triu(1).T


def gram__reference(sum: Tensor, x: Tensor) -> None:
    """Do the same in torch: the operator where nothing is compiled, and on other devices."""
    shapes.gram_(sum, x)
    _add_halves(sum, x.float())


def _add_halves(sum: Tensor, x: Tensor) -> None:
    size = x.shape[1]
    if size <= SMALL or x.is_cuda:
        sum += (x.T @ x).triu()
        return
    mid = size // 2
    left, right = x[:, :mid], x[:, mid:]
    sum[:mid, mid:] += left.T @ right
    _add_halves(sum[:mid, :mid], left)
    _add_halves(sum[mid:, mid:], right)


assert "gram_" in ops.OPS  # importing ops defines the operator
