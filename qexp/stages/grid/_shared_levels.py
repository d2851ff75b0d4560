"""Grids whose values are a sorted table of levels for each slice: which level is nearest, and what it is.

Ties go to the lower level.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(X_OJ: Tensor, levels_OGL: Tensor) -> Tensor:
    """Return the index, int64 [O, J], of the nearest level of each element's slice; levels rise along L."""
    between = (levels_OGL[..., 1:] + levels_OGL[..., :-1]).div_(2).contiguous()
    X_OGg = X_OJ.reshape(*levels_OGL.shape[:2], -1).contiguous()
    return torch.searchsorted(between, X_OGg).reshape(X_OJ.shape)


def take(levels_OGL: Tensor, index_OJ: Tensor) -> Tensor:
    """Return the levels [O, J] that indices stand for."""
    index_OGg = index_OJ.long().reshape(*levels_OGL.shape[:2], -1)
    return levels_OGL.gather(-1, index_OGg).reshape(index_OJ.shape)
