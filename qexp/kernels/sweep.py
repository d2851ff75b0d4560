"""Columns of a weight rounded one after the other to a uniform grid, each error fed to the columns behind it.

The innermost part of GPTQ's sweep (stages/solver/gptq.py): for column k of a few neighbours
    q_k = clamp(round(t_k / s) + z, 0, top),  e_k = w_k - (q_k - z) s,  t_j += M_kj e_k for all j > k.
Column by column in torch this is ten calls of a few microseconds each, which is most of the sweep's time on a CPU.

Source: methods/gptq.md section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.kernels import ops, shapes


def sweep_columns(T_JO: Tensor, E_JO: Tensor, M_JJ: Tensor, scale_JO: Tensor, zero_JO: Tensor, top: int) -> Tensor:
    """Round the columns T in their order; T gathers errors, E (the original weight) becomes the error, in place.

    Shapes: T, E, scale, zero float32 [J, O] (columns as rows), M [J, J] unit upper triangular -> codes uint8 [J, O].
    Raises: RuntimeError naming the argument that does not fit.
    """
    codes: Tensor = torch.ops.qexp.sweep_columns(T_JO, E_JO, M_JJ, scale_JO, zero_JO, top)
    return codes


def sweep_columns_reference(
    target: Tensor, error: Tensor, mix: Tensor, scale: Tensor, zero: Tensor, top: int
) -> Tensor:
    """Do the same in torch: the operator where nothing is compiled, and on other devices."""
    codes = shapes.sweep_columns(target, error, mix, scale, zero, top)
    for k in range(len(target)):
        code = torch.div(target[k], scale[k]).round_().add_(zero[k]).clamp_(0, top)
        codes[k] = code
        error[k] -= code.sub_(zero[k]).mul_(scale[k])
        target[k + 1 :].addr_(mix[k, k + 1 :], error[k])
    return codes


assert "sweep_columns" in ops.OPS  # importing ops defines the operator
