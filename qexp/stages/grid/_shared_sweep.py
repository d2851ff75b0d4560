"""How uniform grids round neighbouring columns in a solver's sweep.

Source: methods/gptq.md section 3; the kernel is ``qexp/kernels/sweep.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qexp.core.words import Params
from qexp.kernels.sweep import sweep_columns


def sweep(T_JO: Tensor, E_JO: Tensor, M_JJ: Tensor, params: Sequence[Params], bits: int) -> Tensor:
    """Round columns to uniform grids in turn: ``kernels.sweep``, with the [O, 1] ``params`` of each column."""
    scale_JO = torch.cat([p["scale"] for p in params], 1).T.contiguous()
    if "zero" in params[0]:
        zero_JO = torch.cat([p["zero"] for p in params], 1).T.to(scale_JO)
    else:
        zero_JO = torch.full_like(scale_JO, 1 << (bits - 1))
    return sweep_columns(T_JO, E_JO, M_JJ, scale_JO, zero_JO, (1 << bits) - 1)
