"""Sums of codewords: D neighbouring weights of a row are s Σ_k C_k[code_k], one word from each of K codebooks.

``Beams`` searches codes: of every row it holds the best few sums z, and replaces their words one book at a time down
    a z̃ G z̃ᵀ + 2 p z̃ᵀ,    z̃ = z minus the sum at the start, G the metric of the D columns, a and p of the row,
which is the change of any quadratic loss in these columns while all others stay. One beam is coordinate descent.

Source: arXiv:2401.06118 section 3.2; methods/aqlm.md section 3.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qexp.core.words import Params

LEAST_CHUNK = 64  # vectors, also where codebooks are large


@runtime_checkable
class Codebooks(Protocol):
    """A grid of sums of codewords: codes [O, J/D, K]."""

    def books(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return the codebooks [K, C, D] and the scale of every row [O]."""
        ...

    def of_books(self, books: Tensor, scale: Tensor) -> Params:
        """Return the parameters that keep codebooks and scales, rounded as they are stored."""
        ...


def summed(books_KCD: Tensor, codes: Tensor) -> Tensor:
    """Return the sums of codewords [..., D] that codes [..., K] stand for; differentiable in the codebooks."""
    total = books_KCD[0][codes[..., 0].long()]
    for book, own in zip(books_KCD[1:], codes.unbind(-1)[1:], strict=True):
        total = total + book[own.long()]
    return total


class Beams:
    """The best M sums of each of N rows, in no order: ``codes`` int64 [N, M, K] and ``loss`` [N, M].

    ``moved`` [N, M, D] is z̃, ``pull`` [N, M, D] p, ``curve`` [N] a, ``origin`` [N, M] which of the first beams it was.
    """

    def __init__(self, codes: Tensor, pull: Tensor, loss: Tensor, curve: Tensor, metric_DD: Tensor) -> None:
        self.codes, self.pull, self.loss = codes, pull, loss
        self.moved = torch.zeros_like(pull)
        self.origin = torch.arange(codes.shape[1], device=codes.device).expand(codes.shape[:2])
        self.curve, self.metric_DD = curve, metric_DD  # a [N], G

    def replace(self, k: int, book_CD: Tensor, width: int, fresh: bool = False) -> None:
        """Replace the word of codebook ``k`` in every sum by the best ones, and keep the best ``width`` sums of a row.

        ``fresh``: the sums have no word of this codebook yet.
        """
        curve = self.curve[:, None, None]
        left = self.moved if fresh else self.moved - book_CD[self.codes[..., k]]
        bent = left @ self.metric_DD
        settled = self.loss - self._change(self.moved) + self._change(left)
        own = ((book_CD @ self.metric_DD) * book_CD).sum(-1)
        losses = 2 * (curve * bent + self.pull) @ book_CD.T + (curve * own + settled[..., None])
        self.loss, chosen = self._least(losses.flatten(1), width)
        beam, word = chosen // len(book_CD), chosen % len(book_CD)
        self.moved = of_beams(left, beam) + book_CD[word]
        self.pull, self.codes = of_beams(self.pull, beam), of_beams(self.codes, beam)
        self.origin = self.origin.gather(1, beam)
        self.codes[..., k] = word

    def _change(self, moved: Tensor) -> Tensor:
        """Return what a sum's distance from its start adds to the loss [N, M]."""
        return ((self.curve[:, None, None] * (moved @ self.metric_DD) + 2 * self.pull) * moved).sum(-1)

    @staticmethod
    def _least(losses: Tensor, width: int) -> tuple[Tensor, Tensor]:
        if width == 1:
            return losses.min(1, keepdim=True)
        return losses.topk(min(width, losses.shape[1]), dim=1, largest=False)


def of_beams(value: Tensor, beam: Tensor) -> Tensor:
    """Return the entries [N, m, ...] of chosen beams of a value [N, M, ...]; a copy."""
    return value.gather(1, beam[..., None].expand(*beam.shape, value.shape[-1]))


def nearest_sums(X_ND: Tensor, books_KCD: Tensor, width: int, rounds: int, chunk: int) -> Tensor:
    """Return codes int64 [N, K] of the nearest sums found: word after word with ``width`` beams, then one at a time.

    ``rounds`` of the latter; ``chunk`` bounds the numbers held at once. Exact for one codebook, and for two from as
    many beams as a codebook has words.
    """
    books, size = len(books_KCD), books_KCD.shape[1]
    metric = torch.eye(X_ND.shape[1], dtype=X_ND.dtype, device=X_ND.device)
    found = []
    for X in torch.split(X_ND, max(LEAST_CHUNK, chunk // (size * (width if books > 1 else 1)))):
        blank, ones = X.new_zeros(len(X), 1, books, dtype=torch.int64), X.new_ones(len(X))
        beams = Beams(blank, -X[:, None], X.new_zeros(len(X), 1), ones, metric)
        for k in range(books):
            beams.replace(k, books_KCD[k], 1 if k == books - 1 else width, fresh=True)
        for k in list(range(books)) * (rounds if books > 1 else 0):
            beams.replace(k, books_KCD[k], 1)
        found.append(beams.codes[:, 0])
    return torch.cat(found)
