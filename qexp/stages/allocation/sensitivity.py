"""More bits where they matter: the least total damage under a budget of stored bits, as an integer program.

Each layer is quantized alone at each of ``options`` bits and what that does to the model is measured by ``metric``
(engine/sensitivity.py): kl, the divergence of next-token distributions; trace, half the mean Hessian trace times the
squared change of weights; fisher, the same with squared gradients, weight by weight; output, the relative output error.
Damages of a unit (a layer, the layers that read one input, a block) are sums, made non-negative and non-increasing.

Source: arXiv:2112.11438 (KL, Hessian, integer program; its training by ADMM and its architecture search are not here);
arXiv:1911.03852 (mean trace); methods/mixed_precision_lm.md section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from qexp.core.errors import UserError, choose
from qexp.core.measures import Measures
from qexp.core.words import Layer
from qexp.stages.allocation import _shared_knapsack as knapsack

METRICS = ("kl", "trace", "fisher", "output")
UNITS = ("layer", "input", "block")
SOLVERS = ("exact", "greedy")
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


@dataclass(frozen=True, kw_only=True)
class SensitivityAllocation:
    """``budget`` is in stored bits per weight, scales and tables included; 0: what ``bits`` everywhere would take.

    What transforms of block scope keep out of quantization (outliers) comes on top: it is not known before the walk.
    ``sequences`` of the calibration data are measured on, where the metric is kl or trace.
    """

    bits: int
    metric: str
    options: Sequence[int]
    budget: float
    unit: str
    solver: str
    sequences: int

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Raise UserError for settings that mean nothing."""
        choose("allocation.metric", self.metric, METRICS, "method.allocation.metric")
        choose("allocation.unit", self.unit, UNITS, "method.allocation.unit")
        choose("allocation.solver", self.solver, SOLVERS, "method.allocation.solver")
        if not self.options or any(not 2 <= bits <= 16 for bits in self.options):
            got = f"allocation.options={list(self.options)}"
            raise UserError(got, "widths from 2 to 8, or 16", "method.allocation.options=[2,3,4,6,8]")
        if self.sequences < 1:
            raise UserError(f"allocation.sequences={self.sequences}", "1 or more", "method.allocation.sequences=8")

    def assign(self, layers: Iterable[Layer], measures: Measures) -> dict[str, int]:
        """Return bits by layer name. Raises: UserError for a budget below the fewest bits."""
        layers, options = list(layers), sorted(set(self.options))
        units = [list(unit) for _, unit in groupby(sorted(layers, key=self._place), key=self._place)]
        cost = [[sum(measures.cost(a, bits) * a.weights for a in unit) for bits in options] for unit in units]
        damage = [_repaired([sum(measures.damage(a, bits) for a in unit) for bits in options]) for unit in units]
        weights = sum(layer.weights for layer in layers)
        plain = sum(measures.cost(layer, self.bits) * layer.weights for layer in layers)
        budget = self.budget * weights if self.budget else plain
        least = sum(row[0] for row in cost)
        if least > budget * (1 + 1e-9):
            got = f"allocation.budget={budget / weights:.3f} stored bits per weight"
            need = f"{least / weights:.3f} or more, what {options[0]} bits everywhere take"
            raise UserError(got, need, f"method.allocation.budget={least / weights + 0.5:.2f}")
        found = {name: solve(damage, cost, budget * (1 + 1e-9)) for name, solve in SOLVE.items()}
        for name, chosen in found.items():
            measures.tell(f"predicted/{name}", knapsack.total(damage, chosen))
            measures.tell(f"bits_per_weight/{name}", knapsack.total(cost, chosen) / weights)
        if self.bits in options:
            measures.tell("predicted/uniform", sum(row[options.index(self.bits)] for row in damage))
        pairs = zip(units, found[self.solver], strict=True)
        bits = {layer.name: options[option] for unit, option in pairs for layer in unit}
        return {layer.name: bits[layer.name] for layer in layers}

    def act_bits(self, layer: Layer, bits: int) -> int:
        """Return the bits of a layer's input: what all others have."""
        return bits

    def _place(self, layer: Layer) -> tuple[int, str]:
        """Return what the layers of a unit have in common."""
        names = {"layer": layer.name, "input": FUSED.get(layer.role, layer.name), "block": ""}
        return layer.block, names[self.unit]


SOLVE = {"exact": knapsack.exact, "greedy": knapsack.greedy}


def _repaired(damage: list[float]) -> list[float]:
    """Return damages by rising bits, none negative, none above that of fewer bits."""
    least, repaired = float("inf"), []
    for value in damage:
        least = min(least, max(value, 0.0))
        repaired.append(least)
    return repaired
