"""Statistics of the inputs of a block's layers over a stream: one ``Stats`` per input group.

On the device; products in float32 (TF32 off), sums of some hundred tokens each in float64. A forward is cut short
as soon as the groups asked for have been seen, where their order is known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.core.errors import UserError
from qexp.core.words import Group, Stats
from qexp.engine.shared import shared_stats
from qexp.engine.streams import Kwargs, StopForward, Stream, answers
from qexp.kernels.gram import add_gram, mirrored
from qexp.models.view import ModelView

ROWS = 512  # of the loudest tokens: peaks are what rotations are made for


@dataclass(frozen=True)
class Look:
    """How inputs are seen: those of sites in ``raw`` in front of their online maps; ``loud``: the loudest rows too."""

    raw: Collection[str] = ()
    loud: bool = False


PLAIN = Look()


class _Sums:
    """Running sums of one input, and its ``loud`` rows if wanted; ``last`` stops the forward after this input."""

    def __init__(self, group: Group, last: bool, loud: bool, device: torch.device) -> None:
        self.group, self.last, self.loud, self.tokens = group, last, loud, 0
        size = group.layers[0].inputs
        self.H = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.low = torch.full((size,), torch.inf, device=device)
        self.high = -self.low
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.rows = torch.empty(0, size, device=device)

    def __call__(self, x: Tensor) -> None:
        """Add the rows of x [..., I]."""
        flat = x.flatten(0, -2)
        self.tokens += len(flat)
        add_gram(self.H, flat)
        self.low = torch.minimum(self.low, flat.amin(0).float())
        self.high = torch.maximum(self.high, flat.amax(0).float())
        self.total += flat.abs().float().sum(0)
        if self.loud:
            self._keep_largest(flat)
        if self.last:
            raise StopForward

    def _keep_largest(self, flat: Tensor) -> None:
        """Keep the rows of the largest magnitudes among those kept and the new ones."""
        some = flat[flat.abs().amax(1).topk(min(ROWS, len(flat))).indices].float()
        both = torch.cat([self.rows, some])
        self.rows = both[both.abs().amax(1).topk(min(ROWS, len(both))).indices]

    def stats(self) -> Stats:
        if not self.tokens:
            raise UserError(f"calibration never reaches {self.group.layers[0].name}", "text that uses every layer")
        if not bool(torch.isfinite(self.high - self.low).all()):
            raise UserError(
                f"calibration gives NaN or Inf at the input of {self.group.layers[0].name}",
                "finite activations",
                "another calibration, or model.dtype=float32",
            )
        H_II, mean = (mirrored(self.H) / self.tokens).float(), (self.total / self.tokens).float()
        return Stats(self.tokens, H_II, self.low, self.high, mean, self.rows)


@torch.no_grad()
def observe(
    view: ModelView,
    block: int,
    groups: Sequence[Group],
    stream: Stream,
    kwargs: Kwargs,
    look: Look = PLAIN,
) -> dict[str, Stats]:
    """Return the statistics of ``groups`` (in forward order, all of this block) by site name."""
    about = f"{sorted(look.raw)} {look.loud}"
    return shared_stats(
        view, block, groups, stream, about, lambda: _observed(view, block, groups, stream, kwargs, look)
    )


def _observed(
    view: ModelView, block: int, groups: Sequence[Group], stream: Stream, kwargs: Kwargs, look: Look
) -> dict[str, Stats]:
    last = groups[-1] if view.family else None  # of an unknown architecture any layer may come last
    sums = {group.site: _Sums(group, group is last, look.loud, view.model.device) for group in groups}
    first = {group.site: view.linear(group.layers[0].name) for group in groups}
    handles = [first[site].register_forward_pre_hook(_input_to(sums[site])) for site in sums if site in look.raw]
    try:
        for site in sums.keys() - set(look.raw):
            first[site].path.observer = sums[site]
        for _ in answers(view, block, stream, kwargs):
            pass
    finally:
        for handle in handles:
            handle.remove()
        for linear in first.values():
            linear.path.observer = None
    return {site: one.stats() for site, one in sums.items()}


def _input_to(sums: _Sums) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums(args[0])

    return hook
