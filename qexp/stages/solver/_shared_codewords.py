"""One sweep over the codes of a weight whose values are sums of codewords, down tr(D H Dᵀ), D = Ŵ - W.

The change of the loss by another word needs D H at the columns of its group alone. The sweep keeps D H up to date: one
product of D columns with H for each group, in place of a new weight for every word.

Source: arXiv:2401.06118 section 3.2, its code e79a896; methods/aqlm.md sections 3 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.core.codebooks import Beams, of_beams


@dataclass(frozen=True)
class Search:
    """A sweep with fixed codebooks [K, C, D].

    ``visits`` are the groups of columns in their order, with the order of the codebooks in each; ``beams`` sums of a
    row are followed from group to group.
    """

    books: Tensor
    H_II: Tensor
    visits: Sequence[tuple[int, Sequence[int]]]
    beams: int

    def __call__(self, codes: Tensor, D_OI: Tensor, scale_O: Tensor) -> Tensor:
        """Return the best codes [O, I/D, K] found from ``codes``, whose error is D."""
        width, s = self.books.shape[-1], scale_O[:, None, None]
        DH_OMI = (D_OI @ self.H_II)[:, None]
        loss = (DH_OMI[:, 0] * D_OI).sum(1, keepdim=True)
        held = codes.long()[:, None].clone()  # [O, M, I/D, K]
        for group, order in self.visits:
            here = slice(group * width, (group + 1) * width)
            own, pull = held[:, :, group].clone(), s * DH_OMI[..., here]
            found = Beams(own, pull, loss, scale_O.square(), self.H_II[here, here])
            for k in order:
                found.replace(k, self.books[k], self.beams)
            if self.beams > 1:
                held = of_beams(held.flatten(2), found.origin).unflatten(2, held.shape[2:])
                DH_OMI = of_beams(DH_OMI, found.origin)
            held[:, :, group], loss = found.codes, found.loss
            DH_OMI += (s * found.moved) @ self.H_II[here]
        best = loss.argmin(1)
        return held[torch.arange(len(held), device=held.device), best].to(codes.dtype)
