"""Activations of a few layers before and after the transforms: |x| on a small grid, and the kurtosis.

Kurtosis E[x⁴] / E[x²]² over all elements of the input: 3 for a Gaussian, in the hundreds with outlier channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.core.words import Group
from qexp.models.view import ModelView

GRID = 64  # tokens and channels shown; channels are pooled by their maximum


class Surfaces:
    """Remembers the inputs before any transform; ``compare`` looks again."""

    def __init__(self, view: ModelView, tokens: Tensor) -> None:
        self.view, self.tokens = view, tokens[:1]
        middle = len(view.blocks) // 2
        self.groups = view.groups(0)[:1] + view.groups(middle)[-2:] if len(tokens) else []
        self.before = self._look()

    @torch.no_grad()
    def _look(self) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        paths = {group.layers[0].name: self.view.linear(group.layers[0].name).path for group in self.groups}
        for name, path in paths.items():
            path.observer = lambda x, name=name: seen.__setitem__(name, x[0].float().cpu())
        if paths:
            # without the head: its logits would be the largest tensor of the whole run
            self.view.model.base_model(self.tokens.to(self.view.model.device), use_cache=False)
        for path in paths.values():
            path.observer = None
        return seen

    def compare(self) -> list[dict[str, Any]]:
        """Return one entry per layer for the record's ``diagnostics.activations``."""
        after = self._look()
        return [self._entry(group, self.before, after) for group in self.groups]

    def _entry(self, group: Group, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Any]:
        name = group.layers[0].name
        return {
            "layer": name,
            "before": _grid(before[name]),
            "after": _grid(after[name]),
            "kurtosis_before": _kurtosis(before[name]),
            "kurtosis_after": _kurtosis(after[name]),
        }


def _grid(x: Tensor) -> list[list[float]]:
    """Return |x| [T, I] as at most GRID x GRID numbers: tokens from the second on (the first is the start token)."""
    size = x[1 : GRID + 1].abs()
    pooled = torch.nn.functional.adaptive_max_pool1d(size[None], min(GRID, x.shape[1]))[0]
    return [[float(f"{value:.4g}") for value in row] for row in pooled.tolist()]


def _kurtosis(x: Tensor) -> float:
    wide = x[1:].double()
    return float(wide.pow(4).mean() / wide.pow(2).mean().pow(2).clamp(min=1e-300))
