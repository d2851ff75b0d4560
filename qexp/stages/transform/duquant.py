"""Rotate blocks of channels so that outliers spread, deal the channels anew, and rotate again (DuQuant).

x <- x R1 P R2 online. R (one matrix for all blocks of n channels) is grown greedily: swap the channel of the largest
magnitude to the front, multiply by an orthogonal matrix whose first row is flat, swap back; of all products so far the
one with the smallest peak is kept, the identity included. P deals channels, sorted by magnitude, to the blocks in
zigzag, so that every block gets its share of outliers.

Source: arXiv:2406.01721 section 3, Alg. 1; code 62c5844; methods/duquant.md.
Differs: the search sees the loudest tokens of the calibration in place of one average sequence; its blocks share R as
in the code. ``side: right`` and ``index: row`` are the code's (the flat row is lost, the swapped position is that of a
token: methods/duquant.md section 5), ``left`` and ``channel`` what the paper describes. ``rotation: hadamard`` is the
deterministic baseline in place of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.compound_maps import Chain, PerHead
from qexp.core.errors import UserError, choose
from qexp.core.hadamard import Hadamard
from qexp.core.maps import Dense, LinearMap, Permutation
from qexp.core.stages import Sites, Surroundings
from qexp.core.words import Insert, Site
from qexp.stages.transform._shared import check_places, random_orthogonal


@dataclass(frozen=True, kw_only=True)
class DuQuant:
    """``block`` channels share a rotation (the largest power of two up to it that divides); ``steps`` are greedy.

    The search ends after ``patience`` steps without a lower peak (0: never).
    """

    block: int
    steps: int
    patience: int
    rotation: str
    permute: bool
    side: str
    index: str
    peak: str
    places: Sequence[str]

    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"activations", "rows"})
    after: ClassVar[tuple[str, ...]] = ()
    inserts: ClassVar[str] = "orthogonal"
    scope: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        """Raise UserError for an unknown choice, and for numbers that mean nothing."""
        check_places("duquant", self.places)
        if self.block < 2 or self.steps < 0 or self.patience < 0:
            got = f"duquant.block={self.block}, steps={self.steps}, patience={self.patience}"
            raise UserError(got, "blocks of at least 2, nothing negative", "method.transform.duquant.block=128")
        for name, choices in {
            "rotation": ("greedy", "hadamard"),
            "side": ("left", "right"),
            "index": ("channel", "row"),
            "peak": ("absmax", "range"),
        }.items():
            key = f"method.transform.duquant.{name}"
            choose(key.removeprefix("method."), getattr(self, name), choices, key)

    def sites(self, model: Sites) -> list[Site]:
        """Return the configured sites."""
        return model.sites(*self.places)

    def edit(self, site: Site, around: Surroundings, rng: torch.Generator) -> Insert:
        """Return R1 P R2, or R1 alone without the permutation."""
        X_TI = around.stats.rows_TI.cpu().double()
        size = next(n for n in (2**k for k in range(self.block.bit_length() - 1, -1, -1)) if site.size % n == 0)
        first = self._rotation(X_TI, size, rng)
        if not self.permute:
            return Insert("orthogonal", first)
        X_TI = first.apply(X_TI)
        deal = Permutation(zigzag(X_TI.abs().amax(0), size))
        return Insert("orthogonal", Chain((first, deal, self._rotation(deal.apply(X_TI), size, rng))))

    def _rotation(self, X_TI: Tensor, size: int, rng: torch.Generator) -> LinearMap:
        """Return one matrix on every block of ``size`` channels."""
        heads = X_TI.shape[1] // size
        if self.rotation == "hadamard" or size == 1:
            return PerHead(Hadamard(size, None), heads)
        R = self._search(X_TI.reshape(-1, size), _spreading(size, self.side, rng))
        return PerHead(Dense(R.float()), heads)  # stored in float32, with the exact inverse of that

    def _search(self, X_Tn: Tensor, base: Tensor) -> Tensor:
        """Return the product of swapped copies of ``base`` under which the rows of X peak lowest, float64 [n, n]."""
        product = best = torch.eye(len(base), dtype=torch.float64)
        least, since = self._peak(X_Tn), 0
        for _ in range(self.steps):
            where = int(X_Tn.abs().argmax())
            swap = torch.arange(len(base))
            front = (where % len(base)) if self.index == "channel" else (where // len(base)) % len(base)
            swap[0], swap[front] = front, 0
            step = base[swap][:, swap]
            X_Tn, product, since = X_Tn @ step, product @ step, since + 1
            peak = self._peak(X_Tn)
            if peak < least:
                best, least, since = product, peak, 0
            if self.patience and since >= self.patience:
                break
        return best

    def _peak(self, X_Tn: Tensor) -> float:
        return float(X_Tn.abs().max() if self.peak == "absmax" else X_Tn.max() - X_Tn.min())


def _spreading(size: int, side: str, rng: torch.Generator) -> Tensor:
    """Return an orthogonal matrix, random but for a flat first row (left) or the code's first column (right), float64.

    That column is (1, 0 .. 0, -sqrt(n - 1), 0) / sqrt(n): one channel passes almost whole to the front at every step.
    """
    first = torch.full((size,), size**-0.5, dtype=torch.float64)
    if side == "right":
        first[1:] = 0
        first[max(size - 2, 1)] = -((1 - 1 / size) ** 0.5)
    normal = first.clone()
    normal[0] -= 1  # the reflection that takes the first axis to that direction
    mirror = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.dot(normal)
    random = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random_orthogonal(size - 1, rng))
    spreading: Tensor = random @ mirror if side == "left" else mirror @ random
    return spreading


def zigzag(magnitude_I: Tensor, size: int) -> Tensor:
    """Return the order int32 [I] that deals channels to blocks of ``size``: forth and back by falling magnitude."""
    blocks = len(magnitude_I) // size
    falling = torch.argsort(magnitude_I, descending=True, stable=True).view(size, blocks)
    falling[1::2] = falling[1::2].flip(1)
    return falling.T.reshape(-1).int()
