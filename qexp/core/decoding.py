"""What of a grid can be learned while codes stay, and who learns it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from qexp.core.learned import Rounding
from qexp.core.stages import Grid
from qexp.core.training import Training
from qexp.core.words import Quantized


@runtime_checkable
class Settled(Protocol):
    """A grid whose floats may have a form that learning would not keep."""

    @property
    def settled(self) -> bool:
        """Return whether they have."""
        ...


FLOATS = ("float16", "bfloat16", "float32")


def learnable(grid: Grid) -> tuple[str, ...]:
    """Return the parameters of a grid that can be learned while codes stay: all that are stored as such floats.

    None where they have a form of their own. ``decode`` passes gradients to them; what all rows and groups have in
    common it takes also as one, [1, 1, ...].
    """
    if isinstance(grid, Settled) and grid.settled:
        return ()
    return tuple(name for name, kept in grid.formats.items() if kept in FLOATS)


@runtime_checkable
class BlockDecoder(Protocol):
    """A tuner of what decodes the codes of a finished block, and of its norms: codes stay."""

    @property
    def training(self) -> Training:
        """Return how it is learned."""
        ...

    @property
    def norm_rate(self) -> float:
        """Return the rate at which norms are learned along, 0 for not."""
        ...

    def check(self, grid: Grid) -> None:
        """Raise UserError for a grid that has nothing to learn."""

    def values(self, quantized: Quantized, grid: Grid) -> Rounding:
        """Return the rounding of one weight whose codes stay."""
        ...
