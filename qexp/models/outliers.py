"""Controlled stress tests that leave a model's function unchanged.

``scale`` multiplies a few channels of every linear input and divides the columns that read them: what
per-channel scaling can undo. ``rotate`` turns the residual stream to its principal axes after norm folding, so
that its energy gathers in few channels, as in large models: only a rotation can undo it. With ``channels`` and
``scale`` the gathered channels of a rotated stream are scaled too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qexp.core import rewrite
from qexp.core.compound_maps import PerHead
from qexp.core.errors import UserError
from qexp.core.maps import Dense, Diagonal
from qexp.core.norms import Center, unit_gain
from qexp.core.rng import generator
from qexp.core.words import Insert, Site
from qexp.models.view import ModelView

log = logging.getLogger(__name__)


@torch.no_grad()
def inject(view: ModelView, outliers: Mapping[str, Any], text: Tensor | None) -> None:
    """Apply ``model.outliers`` (kind, channels, scale, seed) in place; ``text``: token ids [N, S] for rotate."""
    kind, channels, scale = str(outliers["kind"]), int(outliers["channels"]), float(outliers["scale"])
    if kind == "none":
        return
    if channels < 0 or scale <= 0:
        raise UserError(f"model.outliers has channels={channels}, scale={scale}", "channels >= 0 and scale > 0")
    if kind == "rotate":
        assert text is not None
        _rotate(view, text)
        for site in view.sites("attn_in", "mlp_in") if channels else []:
            _scale(view, site, torch.arange(site.size), channels, scale)
        return
    if channels == 0:
        raise UserError("model.outliers.kind=scale scales no channel", "channels", "model.outliers.channels=4")
    for site in view.sites("attn_in", "value", "mlp_in", "mlp_mid"):
        width = site.head_size or site.size
        wanted = max(1, channels * width // site.size) if site.head_size else channels
        order = torch.randperm(width, generator=generator(int(outliers["seed"]), "outliers", site.name))
        _scale(view, site, order, wanted, scale)


def _scale(view: ModelView, site: Site, order: Tensor, channels: int, scale: float) -> None:
    """Scale the first ``channels`` of ``order``, a permutation of the channels of a site or of one of its heads."""
    width = len(order)
    if channels > width:
        raise UserError(f"model.outliers.channels={channels} exceeds the {width} channels of {site.name}")
    factor = torch.ones(width, dtype=torch.float64)
    factor[order[:channels]] = scale
    if site.head_size:
        rewrite.insert(view.model, site, Insert("per_head", PerHead(Diagonal(factor), site.size // site.head_size)))
    else:
        rewrite.insert(view.model, site, Insert("diagonal", Diagonal(factor)))


def _rotate(view: ModelView, text: Tensor) -> None:
    """Rotate the residual stream to the principal axes of what the linears read, strongest first."""
    residual = view.sites("residual")[0]
    if "orthogonal" not in residual.admits:
        raise UserError(
            f"model.outliers.kind=rotate on a {view.config.model_type}, whose post-norms do not commute with rotations",
            "a model without post-norms, or the other kind",
            "model.outliers='{kind: scale, channels: 4, scale: 30}'",
        )
    view.untie()
    if "center" in residual.admits:
        rewrite.insert(view.model, residual, Insert("center", Center(residual.size)))
    for site in view.sites("head_in", "attn_in", "mlp_in"):
        gain = view.gain(site)
        assert gain is not None
        rewrite.insert(view.model, site, unit_gain(gain, view.bias(site)))
    axes = torch.linalg.eigh(_normed_covariance(view, text)).eigenvectors.flip(1)
    rewrite.insert(view.model, residual, Insert("orthogonal", Dense(axes, axes.T.contiguous())))


def _normed_covariance(view: ModelView, text: Tensor) -> Tensor:
    """Return the second moment [C, C] of the normed stream that q/k/v and gate/up read, float64."""
    size = view.config.hidden_size
    total = torch.zeros(size, size, dtype=torch.float64)
    paths = [view.linear(site.readers[0]).path for site in view.sites("attn_in", "mlp_in")]

    def add(x: Tensor) -> None:
        flat = x.flatten(0, -2).double().cpu()
        total.add_(flat.T @ flat)

    for path in paths:
        path.observer = add
    view.model(text.to(view.model.device), use_cache=False)
    for path in paths:
        path.observer = None
    return total
