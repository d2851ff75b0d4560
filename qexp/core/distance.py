"""How far a block's answer is from the float one: plain squared error, or of each channel's mean and spread.

Source: methods/block_reconstruction.md section 5; arXiv:2309.02784 eq. 2 (mean_var) and its code (mean_std_sq).
"""

from __future__ import annotations

from torch import Tensor

from qexp.core.placed import wide

TINY = 1e-6  # inside the root, as the code of Norm Tweaking has it


def distance(kind: str, answer_BSC: Tensor, target_BSC: Tensor, scale: float, skip_first: bool) -> Tensor:
    """Return a scalar, float32 (float64 for float64); ``scale`` is the mean square of the targets.

    mse, nmse = mse / scale; mean_var: |Δ mean| + |Δ variance| over the tokens of each sequence, averaged over channels;
    mean_std_sq: the sum over channels of the squares of Δ mean and Δ deviation. Sequences are averaged.
    """
    answer, target = (wide(x[:, 1:] if skip_first else x) for x in (answer_BSC, target_BSC))
    if kind in ("mse", "nmse"):
        error = (answer - target).pow(2).mean()
        return error / scale if kind == "nmse" else error
    means = answer.mean(1) - target.mean(1)
    if kind == "mean_var":
        return (means.abs() + (answer.var(1, correction=0) - target.var(1, correction=0)).abs()).mean()
    deviations = _deviation(answer) - _deviation(target)
    return (means.pow(2) + deviations.pow(2)).sum(1).mean()


def _deviation(x_BSC: Tensor) -> Tensor:
    return (x_BSC.var(1) + TINY).sqrt()
