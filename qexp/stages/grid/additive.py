"""Sums of codewords: g neighbouring weights of a row are s Σ_k C_k[code_k], from K codebooks of 2^B words (AQLM).

The codebooks belong to the whole weight, the scale s to a row; all are float16. K = bits g / B, so that codes take
``bits`` a weight; codebooks and scales add K 2^B g 16 / (O I) + 16 / I, which for a small weight is the larger part.
Rows of norm 1 are fitted: k-means, then k-means of what is left of it, K times. Codes are the nearest sum that a beam
search finds, word after word, and then word by word.

Source: arXiv:2401.06118 section 3 (initialization); methods/aqlm.md section 3.
Differs: each codebook is fitted to what is left by beams over the stored ones before it, not by single words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qexp.core.codebooks import nearest_sums, summed
from qexp.core.errors import NumericalError, UserError
from qexp.core.rng import generator
from qexp.core.words import FULL_BITS, Format, Layer, Params
from qexp.kernels.pack import pack_codes, unpack_codes
from qexp.stages.grid._shared import check_finite
from qexp.stages.grid._shared_search import CHUNK_ELEMENTS
from qexp.stages.grid._shared_words import clusters

BYTE = 8
LEAST_USE = 4  # vectors of a weight for each word of a codebook, or the codebook is larger than what it says
ROUNDS = 2  # over all words, one at a time, behind the beams


@dataclass(frozen=True, kw_only=True)
class Additive:
    """The grid. Params: ``codebooks`` [O, 1, K, 2^B, g], one for all rows, and ``scale`` [O, 1]; 0 for rows of zeros.

    ``dim`` is g, ``codebook_bits`` B. ``iterations`` of k-means over at most ``points_per_word`` 2^B vectors (0: all);
    ``beam`` sums of a vector are followed while it is encoded.
    """

    bits: int
    dim: int
    codebook_bits: int
    iterations: int
    points_per_word: int
    beam: int

    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[int] = 0
    shared: ClassVar[frozenset[str]] = frozenset({"codebooks"})
    formats: ClassVar[Mapping[str, Format]] = {"codebooks": "float16", "scale": "float16"}

    def for_layer(self, layer: Layer, bits: int) -> Additive:
        """Return this grid at ``bits``: more or fewer codebooks."""
        return replace(self, bits=bits)

    def check(self, layer: Layer) -> None:
        """Raise UserError for codebooks that do not add up to the bits, or are too large for the layer."""
        if self.bits == FULL_BITS:
            return
        if self.beam < 1:
            raise UserError(f"grid.beam={self.beam}", "one sum at least", "method.grid.beam=1")
        if self.dim < 1 or layer.inputs % self.dim:
            fits = max(d for d in range(1, 9) if layer.inputs % d == 0)
            got = f"grid.dim={self.dim} does not divide in_features={layer.inputs} of {layer.name}"
            raise UserError(got, f"a divisor of {layer.inputs}", f"method.grid.dim={fits}")
        total, vectors = self.bits * self.dim, layer.weights // self.dim
        fits = max(b for b in range(1, 17) if total % b == 0 and (b == 1 or LEAST_USE << b <= vectors))
        key = f"method.grid.codebook_bits={fits}"
        if not 1 <= self.codebook_bits <= 16 or total % self.codebook_bits:
            got = f"grid.codebook_bits={self.codebook_bits} for vectors of {self.bits} x {self.dim} = {total} bits"
            raise UserError(got, f"a divisor of {total}, at most 16", key)
        if LEAST_USE << self.codebook_bits > vectors:
            got = f"codebooks of 2^{self.codebook_bits} words for the {vectors} vectors of {layer.name}"
            raise UserError(got, f"{LEAST_USE} vectors for each word", key)

    def fit(self, W_OJ: Tensor, H_JJ: Tensor | None) -> Params:
        """Return codebooks and row norms. Raises: NumericalError for weights that are not finite."""
        check_finite(W_OJ)
        scale, rng = W_OJ.norm(dim=1).half().to(W_OJ), generator(0, "codebooks")
        if not scale.isfinite().all():
            raise NumericalError("a row's norm does not fit into float16")
        vectors = self._vectors(W_OJ, scale)
        most = (self.points_per_word << self.codebook_bits) or len(vectors)
        vectors = vectors[torch.randperm(len(vectors), generator=rng)[:most].to(vectors.device)]
        books = vectors.new_zeros(0, 1 << self.codebook_bits, self.dim)
        for _ in range(self._books):
            left = vectors - summed(books, self._nearest(vectors, books)) if len(books) else vectors
            own = clusters(left, 1 << self.codebook_bits, self.iterations, rng)
            books = torch.cat([books, own[None].half().to(books)])
        return self.of_books(books, scale)

    def encode(self, W_OJ: Tensor, params: Params) -> Tensor:
        """Return codes [O, J/g, K] of the nearest sums found: uint8, or int32 for codebooks of more than 8 bits."""
        books, scale = self.books(params)
        codes = self._nearest(self._vectors(W_OJ, scale), books).view(len(W_OJ), -1, len(books))
        return codes.to(torch.uint8 if self.codebook_bits <= BYTE else torch.int32)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """Return s Σ_k C_k[code_k] [O, J] in the dtype of the codebooks; differentiable in both."""
        books, scale = self.books(params)
        return (summed(books, codes) * scale[:, None, None]).flatten(1)

    def books(self, params: Params) -> tuple[Tensor, Tensor]:
        """Return the codebooks [K, 2^B, g] and the scales [O]."""
        return params["codebooks"][0, 0], params["scale"][:, 0]

    def of_books(self, books: Tensor, scale: Tensor) -> Params:
        """Return the parameters that keep codebooks and scales, in float16; all rows look at one set of codebooks."""
        books, scale = (t.detach().half().to(t.dtype) for t in (books, scale))
        return {"codebooks": books.expand(len(scale), 1, *books.shape), "scale": scale[:, None]}

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes as bytes: the low 8 bits of all, then the others."""
        flat, high = codes.flatten(), self.codebook_bits - BYTE
        if high <= 0:
            return pack_codes(flat, self.codebook_bits)
        parts = pack_codes((flat & 0xFF).to(torch.uint8), BYTE), pack_codes((flat >> BYTE).to(torch.uint8), high)
        return torch.cat(parts)

    def unpack(self, packed: Tensor, outputs: int, columns: int) -> Tensor:
        """Undo ``pack``."""
        shape, high = (outputs, columns, self._books), self.codebook_bits - BYTE
        count = outputs * columns * self._books
        if high <= 0:
            return unpack_codes(packed, self.codebook_bits, count).view(shape)
        low = -(-count // BYTE) * BYTE
        rest = unpack_codes(packed[low:], high, count).int() << BYTE
        return (unpack_codes(packed[:low], BYTE, count).int() | rest).view(shape)

    def cost(self, outputs: int, inputs: int) -> float:
        """Return bits per weight: codes, codebooks and the scales of rows."""
        return self.bits + 16 * (self._books << self.codebook_bits) * self.dim / (outputs * inputs) + 16 / inputs

    @property
    def _books(self) -> int:
        return self.bits * self.dim // self.codebook_bits

    def _vectors(self, W_OJ: Tensor, scale: Tensor) -> Tensor:
        """Return the weight over its scales, as vectors [O J/g, g]."""
        return (W_OJ / torch.where(scale == 0, 1, scale)[:, None]).reshape(-1, self.dim)

    def _nearest(self, vectors: Tensor, books: Tensor) -> Tensor:
        return nearest_sums(vectors, books, self.beam, ROUNDS, CHUNK_ELEMENTS.get(vectors.device.type, 1 << 18))
