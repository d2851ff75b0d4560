"""K-means of vectors: the words of a codebook.

Source: Lloyd's algorithm, started from random distinct vectors; methods/aqlm.md section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.stages.grid._shared_search import CHUNK_ELEMENTS

CHECK_EVERY = 10  # iterations
LEAST_CHUNK = 64  # vectors, also where there are many centroids


def clusters(X_ND: Tensor, count: int, iterations: int, rng: torch.Generator) -> Tensor:
    """Return ``count`` centroids [C, D]; one that no vector is nearest to stays where it was."""
    distinct = torch.unique(X_ND, dim=0)
    drawn = torch.randperm(len(distinct), generator=rng)[:count].to(X_ND.device)
    centroids: Tensor = distinct[drawn.repeat(-(-count // len(drawn)))[:count]]  # fewer vectors than words: some twice
    for i in range(iterations):
        found = _nearest(X_ND, centroids)
        sums = torch.zeros_like(centroids).index_put_((found,), X_ND, accumulate=True)  # the same sums on every GPU
        sizes = torch.bincount(found, minlength=count)[:, None]
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
        settled = i % CHECK_EVERY == 0 and torch.allclose(moved, centroids, rtol=1e-6)
        centroids = moved
        if settled:
            break
    return centroids


def _nearest(X_ND: Tensor, centroids_CD: Tensor) -> Tensor:
    """Return the nearest centroid [N] of every vector."""
    squares, rows = centroids_CD.square().sum(1), CHUNK_ELEMENTS.get(X_ND.device.type, 1 << 18) // len(centroids_CD)
    parts = torch.split(X_ND, max(LEAST_CHUNK, rows))
    return torch.cat([torch.addmm(squares, X, centroids_CD.T, alpha=-2).argmin(1) for X in parts])
