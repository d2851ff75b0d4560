"""What the transforms did to activations: figures for every linear's input, and |x| of a few layers on a small grid.

Figures, before any transform and at the end: the kurtosis E[x⁴] / E[x²]² over all elements (3 for a Gaussian, in the
hundreds with outlier channels), the loudest channel over the median one, and the signal over the noise that the
recipe's activation quantizer makes of the input; kept channels are left out. Measured on one calibration sequence,
without its first token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.core.method import Method
from qexp.core.words import Group
from qexp.engine.acting import act_of, search_quantizer
from qexp.models.view import ModelView

GRID = 64  # tokens and channels shown; channels are pooled by their maximum
Figures = dict[str, float | None]


class Surfaces:
    """Remembers the inputs before any transform; ``activations`` and ``inputs`` tell what became of them."""

    def __init__(self, view: ModelView, method: Method, tokens: Tensor) -> None:
        self.view, self.method, self.tokens = view, method, tokens[:1]
        blocks = range(len(view.blocks)) if len(tokens) else range(0)
        self.groups = [group for block in blocks for group in view.groups(block)]
        middle = len(view.blocks) // 2
        shown = view.groups(0)[:1] + view.groups(middle)[-2:] if len(tokens) else []
        self.shown = {group.site for group in shown}
        self.before = self._look()
        self.after: dict[str, tuple[Figures, list[list[float]]]] = {}

    def look_again(self) -> None:
        """Measure what the inputs have become."""
        self.after = self._look()

    @torch.no_grad()
    def _look(self) -> dict[str, tuple[Figures, list[list[float]]]]:
        seen: dict[str, tuple[Figures, list[list[float]]]] = {}
        paths = {group.site: self.view.linear(group.layers[0].name).path for group in self.groups}

        def observer(group: Group) -> Any:
            path = paths[group.site]
            quantizer, kept = search_quantizer(act_of(self.method, group), path.ranges.get("clip")), path.kept

            def look(x: Tensor) -> None:
                rows = x.flatten(0, -2)[1:].float()
                quantized = rows[:, : rows.shape[1] - kept]
                noise = None if quantizer is None else quantizer(quantized[None])[0] - quantized
                seen[group.site] = _figures(quantized, noise), _grid(rows) if group.site in self.shown else []

            return look

        for group in self.groups:
            paths[group.site].observer = observer(group)
        try:
            if self.groups:
                # without the head: its logits would be the largest tensor of the whole run
                self.view.model.base_model(self.tokens.to(self.view.model.device), use_cache=False)
        finally:
            for path in paths.values():
                path.observer = None
        return seen

    def activations(self) -> list[dict[str, Any]]:
        """Return the grids of a few layers for the record's ``diagnostics.activations``."""
        entries = []
        for group in (group for group in self.groups if group.site in self.shown):
            (before, grid), (after, grid_after) = self.before[group.site], self.after[group.site]
            kurtosis = {"kurtosis_before": before["kurtosis"], "kurtosis_after": after["kurtosis"]}
            entries.append({"layer": group.layers[0].name, "before": grid, "after": grid_after, **kurtosis})
        return entries

    def found(self) -> dict[str, Any]:
        """Return what the record's ``diagnostics`` say of inputs."""
        return {"activations": self.activations(), "inputs": self.inputs()}

    def inputs(self) -> list[dict[str, Any]]:
        """Return the figures of every linear's input for the record's ``diagnostics.inputs``."""
        every = [group for group in self.groups if group.site in self.before and group.site in self.after]
        return [
            {"layer": group.layers[0].name, "before": self.before[group.site][0], "after": self.after[group.site][0]}
            for group in every
        ]


def _figures(quantized: Tensor, noise: Tensor | None) -> Figures:
    wide = quantized.double()
    loudest = quantized.abs().amax(0)
    kurtosis = wide.pow(4).mean() / wide.pow(2).mean().pow(2).clamp(min=1e-300)
    peak = loudest.max() / loudest.median().clamp(min=1e-30)
    found: Figures = {"kurtosis": float(kurtosis), "peak": float(peak), "sqnr_db": None}
    if noise is not None:
        signal, lost = wide.pow(2).sum(), noise.double().pow(2).sum()
        found["sqnr_db"] = float(10 * torch.log10(signal.clamp(min=1e-300) / lost.clamp(min=1e-300)))
    return found


def _grid(rows: Tensor) -> list[list[float]]:
    """Return |x| [T, I] as at most GRID x GRID numbers."""
    size = rows[:GRID].abs().cpu()
    pooled = torch.nn.functional.adaptive_max_pool1d(size[None], min(GRID, rows.shape[1]))[0]
    return [[float(f"{value:.4g}") for value in row] for row in pooled.tolist()]
