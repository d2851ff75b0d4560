"""Random orthogonal matrices on both sides of every weight, so that neither it nor H has outliers (QuIP, QuIP#).

W' = V W Uᵀ, x' = x Uᵀ behind x / c, y = y' V. Nothing of it can be folded into neighbours: Uᵀ runs online at the input
and V at the output. U and V are (A (x) B) between two random permutations, A and B random orthogonal of about sqrt(n)
(QuIP), or diag(±1) H (QuIP#). Rescaling first balances each column of W against H: c_j = (H_jj / (Wᵀ W)_jj)^(1/4),
W <- W diag(c).

Source: arXiv:2307.13304 section 4, Alg. 1-2 (Kronecker form); arXiv:2402.04396 section 3 (randomized Hadamard).
Differs: readers of one input share U and c (one online map serves q, k and v); the published script of QuIP ran the
blocked butterfly by a wrong flag, this is the paper's form; float64 throughout; dead columns keep c = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.compound_maps import Chain
from qexp.core.errors import choose
from qexp.core.hadamard import randomized_hadamard
from qexp.core.maps import Dense, Diagonal, Kronecker, LinearMap, Permutation
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Insert, Site
from qexp.stages.transform._shared import random_orthogonal, smaller_side

KINDS = ("kronecker", "hadamard")
INPUTS = ("attn_in", "attn_out", "mlp_in", "mlp_mid")


@dataclass(frozen=True, kw_only=True)
class Incoherence:
    """``kind`` of the orthogonal maps; ``rescale`` is c; ``outputs`` is V (without it only inputs are turned)."""

    kind: str
    rescale: bool
    outputs: bool

    version: ClassVar[int] = 1
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "orthogonal"
    scope: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        """Raise UserError for an unknown kind."""
        choose("transform.incoherence.kind", self.kind, KINDS, "method.transform.incoherence.kind")

    @property
    def needs(self) -> frozenset[str]:
        """Return "activations" where columns are rescaled."""
        return frozenset({"activations"} if self.rescale else ())

    def sites(self, model: Sites) -> list[Site]:
        """Return the input of every linear, and every linear's output."""
        return model.sites(*INPUTS, *(["output"] if self.outputs else []))

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert | None:
        """Return c and U of an input, or V of an output."""
        turn = _orthogonal(site.size, self.kind, rng)
        if site.kind == "output" or not self.rescale:
            return Insert("orthogonal", turn)
        return Insert("dense", Chain((Diagonal(1 / _balance(around)), turn)))


def _balance(around: Surroundings) -> Tensor:
    """Return c, float32 [I], with a geometric mean of 1 over the live columns."""
    energy = around.stats.H_II.diagonal()
    weight = torch.stack([W.pow(2).sum(0) for W in around.weights]).sum(0)
    live = (energy > 0) & (weight > 0)
    c = torch.where(live, energy / weight, 1.0).pow(0.25)
    return torch.where(live, c / c[live].log().mean().exp(), 1.0) if bool(live.any()) else c


def _orthogonal(size: int, kind: str, rng: torch.Generator) -> LinearMap:
    if kind == "hadamard":
        return randomized_hadamard(size, rng)
    p = smaller_side(size)
    orders = [torch.randperm(size, generator=rng) for _ in range(2)]
    return Chain((Permutation(orders[0]), Kronecker(_turn(p, rng), _turn(size // p, rng)), Permutation(orders[1])))


def _turn(size: int, rng: torch.Generator) -> Dense:
    q = random_orthogonal(size, rng)
    return Dense(q, q.T.contiguous())
