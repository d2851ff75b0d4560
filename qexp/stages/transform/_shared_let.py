"""Where learned scales and shifts start, and maps of keys that commute with rotary embeddings.

Source: methods/omniquant.md section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.core.compound_maps import HeadMaps
from qexp.core.stages import Surroundings
from qexp.core.words import Insert, Site

DEAD = 1e-5


def scale_start(site: Site, around: Surroundings, alpha: float) -> Tensor:
    """Return s = max|x|^alpha / max|W|^(1-alpha) of every channel of a site, float32 [site.size].

    W is one of the readers: q, up, o. Channels of a value head that several query heads read take their largest.
    """
    W = around.weights[-1 if site.kind == "mlp_in" else 0]
    x_max, w_max = around.stats.absmax_I.clamp(min=DEAD), W.abs().amax(0).clamp(min=DEAD)
    if site.kind == "value":
        shape = (site.size // site.head_size, -1, site.head_size)
        x_max, w_max = (t.view(shape).amax(1).flatten() for t in (x_max, w_max))
    return (x_max.pow(alpha) / w_max.pow(1 - alpha)).clamp(min=DEAD)


def shift_start(around: Surroundings) -> Tensor | None:
    """Return the middle of every channel's range, where the norm that writes the site has a bias to take it."""
    if around.bias is None:
        return None
    return ((around.stats.low_I + around.stats.high_I) / 2).clone()


def tied(site: Site, scale: Tensor) -> Insert:
    """Return the insert of scales of keys [H, d/2], the same for both members of a rotated pair, or [H, d]."""
    if scale.shape[1] == site.head_size:
        return Insert("per_head", HeadMaps(scale))
    return Insert("rotary_diagonal", HeadMaps(torch.cat([scale, scale], dim=1)))
