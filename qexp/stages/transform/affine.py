"""Learn invertible matrices where OmniQuant has scales, opened from the diagonal outwards (AffineQuant).

x <- (x - t) A^-1, W <- W A^T: values and o share a matrix for every key/value head; behind norms, a diagonal that
folds or (``full``) a matrix whose inverse runs online; keys and queries a tied diagonal, or (``rotate_keys``) turns of
the pairs that rotary embeddings turn. A = P o M, M the gradual mask: 1 on the diagonal, ``stability`` in a band that
grows with the epochs, 0 outside: entries outside have no gradient and stay 0. Starts as OmniQuant's scales.

Source: arXiv:2403.12544 section 3, code 0f3ba93, methods/affinequant.md.
Differs: only matrices that leave the function as it was (the code's free matrices of keys do not commute with rotary
embeddings); diagonals are positive by an exponential and are not truncated; |W| in the start; shifts only where norms
have biases; a block whose matrices are worse conditioned than 1e4 falls back to their diagonals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.compound_maps import HeadMaps
from qexp.core.learned import Made, Part
from qexp.core.maps import Dense, Diagonal
from qexp.core.minimise import Knobs
from qexp.core.stages import Sites, Surroundings
from qexp.core.training import Training
from qexp.core.words import Insert, Site
from qexp.stages.transform._shared_let import scale_start, shift_start, tied

WORST = 1e4  # condition number


@dataclass(frozen=True, kw_only=True)
class Affine:
    """``alpha`` of the first scales, ``rate`` of all; ``stability`` of what the mask opens; ``full``: see above."""

    alpha: float
    rate: float
    stability: float
    full: bool
    rotate_keys: bool
    shift: bool
    training: Training

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"activations"})
    after: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[str] = "block"
    learns_ranges: ClassVar[bool] = False

    @property
    def inserts(self) -> str:
        """Return the kind of map behind norms."""
        return "dense" if self.full else "diagonal"

    def sites(self, model: Sites) -> list[Site]:
        """Return the sites behind norms, the values, and the keys."""
        return model.sites("attn_in", "mlp_in", "value", "keys")

    def kind_at(self, site: Site) -> str:
        """Return the kind of map at a site."""
        return {"value": "per_head", "keys": "rotary"}.get(site.kind, self.inserts)

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert:
        """Return the start."""
        return self._insert(site, self._start(site, around), 1)

    def part(self, sites: Sequence[Site], around: Mapping[str, Surroundings], rng: torch.Generator) -> Part:
        """Return the matrices of one block; the mask opens as epochs begin."""
        leaves = {site.name: self._start(site, around[site.name]) for site in sites}
        tensors = [tensor.requires_grad_() for parts in leaves.values() for tensor in parts.values()]
        share = [0.0]  # of the band, opened

        def make() -> Made:
            return Made({site.name: self._insert(site, leaves[site.name], share[0]) for site in sites})

        def begin_epoch(epoch: int, epochs: int) -> None:
            share[0] = epoch / (epochs - 1) if epochs > 1 else 1.0

        return Part([Knobs("matrices", tensors, self.rate)], make, begin_epoch=begin_epoch)

    def _start(self, site: Site, around: Surroundings) -> dict[str, Tensor]:
        """Return what is learned of a site: log diagonals, what is beside them, turns, a shift."""
        d = site.head_size
        if site.kind == "keys":
            heads, free = site.size // d, "per_head" in site.admits
            leaves = {"scale": torch.zeros(heads, d if free else d // 2)}
            turns = self.rotate_keys and "rotary" in site.admits and not free
            return leaves | ({"turn": torch.zeros(heads, d // 2)} if turns else {})
        leaves = {"scale": scale_start(site, around, self.alpha).log()}
        if site.kind == "value":
            leaves = {"scale": leaves["scale"].view(-1, d), "beside": torch.zeros(site.size // d, d, d)}
        elif self.full:
            leaves["beside"] = torch.zeros(site.size, site.size)
        if self.shift and not (self.full and site.kind != "value") and (t := shift_start(around)) is not None:
            leaves["shift"] = t
        return leaves

    def _insert(self, site: Site, leaves: dict[str, Tensor], share: float) -> Insert:
        """Return the insert of the learned tensors; the map is A^-1, so that the readers get A."""
        scale = leaves["scale"].exp()
        if site.kind == "keys":
            return _turned(scale, leaves["turn"]) if "turn" in leaves else tied(site, scale)
        shift = -leaves["shift"] if "shift" in leaves else None
        if "beside" not in leaves:
            return Insert("diagonal", Diagonal(1 / scale), shift)
        A = self._matrix(scale, leaves["beside"], share)
        if site.kind == "value":
            return Insert("per_head", HeadMaps(torch.linalg.inv_ex(A).inverse, A), shift)
        return Insert("dense", Dense(torch.linalg.inv_ex(A).inverse, A))

    def _matrix(self, scale: Tensor, beside: Tensor, share: float) -> Tensor:
        """Return A, float64: the diagonal, and beside it the open band.

        Where states are compared or kept it is the diagonal alone if A is near singular.
        """
        n = scale.shape[-1]
        band = mask(n, share, self.stability).to(beside)
        A = (beside * band.fill_diagonal_(0) + torch.diag_embed(scale)).double()
        if torch.is_grad_enabled() or float(torch.linalg.cond(A).max()) < WORST:
            return A
        return torch.diag_embed(scale).double()


def mask(n: int, share: float, stability: float) -> Tensor:
    """Return the gradual mask [n, n]: 1, and ``stability`` where 0 < |i - j| < k, k from 1 (share 0) to n (share 1)."""
    width = round(share * (n - 1)) + 1
    apart = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    return torch.where(apart == 0, 1.0, torch.where(apart < width, stability, 0.0))


def _turned(scale: Tensor, turn: Tensor) -> Insert:
    """Return maps of keys: [[a, b], [-b, a]] on every pair (i, i + d/2), with a + ib = scale e^(i turn)."""
    scale, turn = scale.double(), turn.double()
    a, b = torch.diag_embed(scale * turn.cos()), torch.diag_embed(scale * turn.sin())
    return Insert("rotary", HeadMaps(torch.cat([torch.cat([a, b], 2), torch.cat([-b, a], 2)], 1)))
