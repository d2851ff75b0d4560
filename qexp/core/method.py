"""A recipe: one member of each stage kind, and which stream feeds statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qexp.core.stages import Act, Allocation, Grid, Kv, Solver, Transform, Tuner


@dataclass(frozen=True, kw_only=True)
class Method:
    """A recipe: members of the seven kinds. ``inputs`` is the stream that feeds statistics.

    ``inputs=quantized`` takes statistics behind all that is quantized already, ``block`` behind the quantized blocks
    but inside a block still float (one pass in place of four), ``float`` from the float model; ``quantize_stream``
    says whether activation and KV quantizers are on while the quantized stream is propagated to the next block.
    """

    name: str
    transform: Mapping[str, Transform]
    grid: Grid
    solver: Solver
    act: Act
    kv: Kv
    tuner: Mapping[str, Tuner]
    allocation: Allocation
    inputs: str
    quantize_stream: bool

    def stage(self, scope: str) -> list[tuple[str, Transform]]:
        """Return the (name, transform) pairs of one scope, in the order of the recipe."""
        return [(name, t) for name, t in self.transform.items() if t.scope == scope]

    def versions(self) -> dict[str, int]:
        """Return every member's version, for the fingerprint."""
        members: dict[str, Any] = {"grid": self.grid, "solver": self.solver, "act": self.act, "kv": self.kv}
        members |= {"allocation": self.allocation}
        members |= {f"transform.{name}": member for name, member in self.transform.items()}
        members |= {f"tuner.{name}": member for name, member in self.tuner.items()}
        return {name: member.version for name, member in members.items()}
