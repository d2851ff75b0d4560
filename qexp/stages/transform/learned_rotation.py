"""Learn the rotations of the residual stream (R1) and of each layer's values (R2) by gradient descent (SpinQuant).

Both start as randomised Hadamard matrices and move on the orthogonal matrices (core/stiefel.py) down the next-token
loss of the quantized network, its weights frozen. Everything learned is folded: no run-time cost. R3 and R4, where
wanted, are ``hadamard_online`` in front of it ("had" variant). With ``round_weights: false`` weights stay in 16 bits
while learning, which is what GPTQ behind it wants (paper Table 3); with true they are rounded, for RTN behind it.

Source: arXiv:2405.16406 sections 3.2-3.3, code 8f47aa3, methods/spinquant.md.
Differs: one process with the global batch of 8; no QR at random (drift is repaired once, at the end, in float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.compound_maps import PerHead
from qexp.core.errors import UserError, choose
from qexp.core.hadamard import randomized_hadamard
from qexp.core.learned import Learned, Objective
from qexp.core.maps import LinearMap, Orthogonal
from qexp.core.stages import Sites, Surroundings
from qexp.core.stiefel import cayley_step, nearest_orthogonal
from qexp.core.words import Insert, Site


@dataclass(frozen=True, kw_only=True)
class LearnedRotation:
    """``rate`` is the largest step, falling to 0 over ``steps`` of ``batch`` sequences; ``load`` a learned file."""

    residual: bool
    values: bool
    steps: int
    batch: int
    rate: float
    schedule: str
    clip_norm: float
    round_weights: bool
    load: str

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    inserts: ClassVar[str] = "orthogonal"
    scope: ClassVar[str] = "model"

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        key = "method.transform.learned_rotation"
        choose(f"{key}.schedule", self.schedule, ("cosine", "linear"), f"{key}.schedule")
        if self.steps < 0 or self.batch < 1:
            raise UserError(f"{key}.steps={self.steps}, batch={self.batch}", "steps of at least one sequence", key)

    @property
    def after(self) -> tuple[str, ...]:
        """Return fold_norm where the residual stream is rotated: gains do not commute with rotations."""
        return ("fold_norm",) if self.residual else ()

    def sites(self, model: Sites) -> list[Site]:
        """Return the residual stream, where it can be rotated, and every layer's values."""
        residual = [s for s in model.sites("residual") if "orthogonal" in s.admits] if self.residual else []
        return residual + (model.sites("value") if self.values else [])

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert:
        """Return the start: a randomised Hadamard matrix."""
        return self._insert(site, self._start(site, rng))

    def learn(
        self,
        sites: Sequence[Site],
        around: Mapping[str, Surroundings],
        objective: Objective,
        rng: torch.Generator,
        track: Callable[[range], Iterable[int]],
    ) -> Learned:
        """Return the rotation of each site, and the loss of every step."""
        if not sites:
            return Learned({}, [])
        turns, losses = {site.name: self._start(site, rng) for site in sites}, []
        for step in track(range(self.steps)):
            leaves = {name: R.clone().requires_grad_() for name, R in turns.items()}
            inserts = {site.name: self._insert(site, leaves[site.name]) for site in sites}
            chosen = in_turn(step, self.batch, len(objective))
            losses.append(objective(inserts, chosen, self.round_weights))
            turns = self._stepped(leaves, step)
        final = {name: nearest_orthogonal(R) for name, R in turns.items()}
        return Learned({site.name: self._insert(site, final[site.name]) for site in sites}, losses)

    def _start(self, site: Site, rng: torch.Generator) -> Tensor:
        size = site.head_size if site.kind == "value" else site.size
        return randomized_hadamard(size, rng).apply(torch.eye(size, dtype=torch.float64))

    def _insert(self, site: Site, R: Tensor) -> Insert:
        if site.kind != "value":
            return Insert("orthogonal", Orthogonal(R))
        turn: LinearMap = PerHead(Orthogonal(R), site.size // site.head_size)
        return Insert("per_head", turn)

    def _stepped(self, leaves: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return every rotation after one step against its gradient, clipped together by their norm."""
        gradients = {name: torch.zeros_like(R) if R.grad is None else R.grad for name, R in leaves.items()}
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        if not math.isfinite(norm):
            return {name: R.detach() for name, R in leaves.items()}  # one bad batch must not spoil what was learned
        scale = min(1.0, self.clip_norm / (norm + 1e-6))
        part = step / self.steps
        rate = self.rate * ((1 + math.cos(math.pi * part)) / 2 if self.schedule == "cosine" else 1 - part)
        return {name: cayley_step(R.detach(), scale * gradients[name], rate)[0] for name, R in leaves.items()}


def in_turn(step: int, batch: int, count: int) -> list[int]:
    """Return which of ``count`` sequences a step takes: the next ``batch`` of them, from the first again at the end."""
    return [(step * batch + i) % count for i in range(min(batch, count))]
