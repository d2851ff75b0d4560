"""The optimiser loop of free tensors: AdamW on groups, one rate each, falling along a cosine.

Orthogonal matrices move on their own manifold (core/stiefel.py) and take their batches the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Knobs:
    """Tensors that are learned together, and their first rate."""

    tensors: Sequence[Tensor]
    rate: float


def minimise(
    knobs: Sequence[Knobs], loss: Callable[[int], float], steps: Iterable[int], count: int, decay: float
) -> list[float]:
    """Take ``count`` steps down ``loss(step)``, which adds gradients to the tensors; return the losses.

    ``decay`` is AdamW's weight decay. The rates fall to a thousandth. A step whose loss or gradient is not finite is
    left out.
    """
    groups = [{"params": list(k.tensors), "lr": k.rate} for k in knobs]
    optimiser = torch.optim.AdamW(groups, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * step / max(1, count))) / 2
    )
    losses: list[float] = []
    for step in steps:
        optimiser.zero_grad()
        found = loss(step)
        gradients = [t.grad for k in knobs for t in k.tensors if t.grad is not None]
        if math.isfinite(found) and all(bool(g.isfinite().all()) for g in gradients):
            optimiser.step()
        losses.append(found)
        schedule.step()
    return losses


def in_turn(step: int, batch: int, count: int) -> list[int]:
    """Return which of ``count`` sequences a step takes: the next ``batch`` of them, from the first again at the end."""
    return [(step * batch + i) % count for i in range(min(batch, count))]
