"""How uniform grids round neighbouring columns in a solver's sweep.

Source: methods/gptq.md section 3; the kernel is ``qexp/kernels/sweep.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.core.words import Params
from qexp.kernels.sweep import sweep_columns


def sweep(T_JO: Tensor, E_JO: Tensor, M_JJ: Tensor, params: Params, bits: int) -> Tensor:
    """Round columns to uniform grids in turn: ``kernels.sweep``, with ``params`` [J, O] of each column."""
    scale_JO = params["scale"]
    zero_JO = params["zero"].to(scale_JO) if "zero" in params else torch.full_like(scale_JO, 1 << (bits - 1))
    return sweep_columns(T_JO, E_JO, M_JJ, scale_JO, zero_JO, (1 << bits) - 1)
