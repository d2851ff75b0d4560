"""Norms as seen by transforms: a gain (and perhaps a bias) behind a division by the root mean square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qexp.core.maps import Diagonal
from qexp.core.words import Insert

NORM, OFFSET_NORM = "norm", "offset_norm"  # the gain is w, or 1 + w (Gemma)


class ScaledRmsNorm(nn.Module):
    """RMSNorm with gain and optional bias: what a LayerNorm is once its input has zero mean."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x) * weight + bias, computed in float32 for 16-bit inputs."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide.to(x.dtype) * self.weight) + self.bias


def gain_of(norm: Any, kind: str) -> Tensor:
    """Return the effective gain, float64 [I]; ``kind`` is "norm" or "offset_norm"."""
    weight: Tensor = norm.weight.detach().double()
    return 1 + weight if kind == OFFSET_NORM else weight


def bias_of(norm: nn.Module) -> Tensor | None:
    """Return the bias of the norm, float64 [I], or None."""
    bias = getattr(norm, "bias", None)
    return None if bias is None else bias.detach().double()


def unit_gain(gain: Tensor, bias: Tensor | None) -> Insert:
    """Return the insert that makes a norm a plain division: its gain and bias move into the readers.

    A channel of gain 0 (Gemma 3 has them) gets the factor inf: its readers' columns become 0, its gain 1.
    """
    return Insert("diagonal", Diagonal(1 / gain), None if bias is None else -bias)


@dataclass(frozen=True)
class Center:
    """x - mean(x): what LayerNorm does first. Folded into the writers of the residual stream; readers keep theirs."""

    size: int

    def apply(self, x: Tensor) -> Tensor:
        """Return x minus its mean over the last axis."""
        return x - x.mean(-1, keepdim=True)

    def dual(self, x: Tensor) -> Tensor:
        """Return x: the norms behind are blind to the mean."""
        return x

    undual = dual

    def state(self) -> tuple[str, dict[str, Tensor], dict[str, int | str]]:
        """Never stored: it is folded before any block is walked."""
        return "center", {}, {"size": self.size}
