"""Per-token activation codes in plain torch, for the settings that ``had_quant`` leaves: asymmetric, or an odd width.

x [M, K] becomes int8 codes q with one scale and one zero point per row, x^ = scale (q - zero): exactly the numbers of
:func:`qexp.kernels.quantize.fake_quantize_per_token`. Asymmetric codes 0 .. 2^b - 1 are shifted down by 2^(b-1) to fit
int8, and the zero point with them.

Source: methods/rtn.md section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.kernels.quantize import asymmetric_grid, symmetric_grid


def token_codes(x: Tensor, bits: int, symmetric: bool, clip: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (codes, scale, zero) of each row.

    Shapes: x [M, K] float -> int8 [M, K], float32 [M], float32 [M] or None (symmetric: 0). Units: clip is a fraction of
    the row's range. A row with NaN or Inf has codes 0 and the scale NaN. Raises: ValueError beyond 8 bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}, expected 2 to 8")
    rows = x.float()
    grid = symmetric_grid(rows, bits, clip) if symmetric else asymmetric_grid(rows, bits, clip, with_zero=True)
    finite = grid.scale.isfinite()
    codes = torch.mul(rows, grid.scale.reciprocal()).round_()
    shift = 0
    if grid.zero is not None:
        codes.add_(grid.zero)
        shift = 1 << (bits - 1)
    codes.clamp_(grid.lowest, grid.highest).sub_(shift)
    codes = torch.where(finite, codes, 0.0).to(torch.int8)
    scale = torch.where(finite, grid.scale, torch.nan).squeeze(-1)
    return codes, scale, None if grid.zero is None else torch.where(finite, grid.zero - shift, 0.0).squeeze(-1)
