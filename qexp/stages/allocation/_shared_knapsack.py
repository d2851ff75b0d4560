"""One option for each unit, the least total damage, at most so much cost: the multiple-choice knapsack.

As an integer program (HiGHS, by scipy), exact to 1e-6 of what greedy leaves; and greedy for comparison: from the
cheapest options on, always the step that takes off most damage for its cost, of any length, so that options which no
hull point is do not stop it.

Source: methods/mixed_precision_lm.md section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

from qexp.core.errors import NumericalError

Table = Sequence[Sequence[float]]
"""A number for each unit and option; options are in the order of rising cost."""


def exact(damage: Table, cost: Table, budget: float) -> list[int]:
    """Return the option of each unit. Raises: NumericalError if the solver finds none."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    units, options = len(damage), len(damage[0])
    start = greedy(damage, cost, budget)
    scale = total(damage, start) or 1.0  # the solver's tolerances are absolute: one is what is to be improved
    values = np.asarray(damage, dtype=float).ravel() / scale
    fits = values <= 1 + 1e-9  # an option worse than all that greedy leaves is in no better answer
    prices = np.asarray(cost, dtype=float).ravel() / (budget or 1.0)
    one = csr_matrix(np.kron(np.eye(units), np.ones(options)))
    limits = [LinearConstraint(one, 1, 1), LinearConstraint(prices[None], -np.inf, 1.0)]
    found = milp(
        np.where(fits, values, 0), constraints=limits, integrality=np.ones(len(values)), bounds=Bounds(0, fits),
        options={"mip_rel_gap": 1e-6},
    )  # fmt: skip
    if found.x is None:
        raise NumericalError(f"the integer program of the allocation failed: {found.message}")
    best = [int(row.argmax()) for row in found.x.reshape(units, options)]
    better = total(damage, best) < total(damage, start) and total(cost, best) <= budget
    return best if better else start


def greedy(damage: Table, cost: Table, budget: float) -> list[int]:
    """Return the option of each unit."""
    chosen, spent = [0] * len(damage), sum(row[0] for row in cost)
    while True:
        steps = [
            ((damage[u][now] - damage[u][o]) / (cost[u][o] - cost[u][now]), u, o)
            for u, now in enumerate(chosen)
            for o in range(now + 1, len(damage[u]))
            if spent + cost[u][o] - cost[u][now] <= budget and damage[u][o] < damage[u][now]
        ]
        if not steps:
            return chosen
        _, unit, option = max(steps, key=lambda step: (step[0], -step[1], -step[2]))
        spent += cost[unit][option] - cost[unit][chosen[unit]]
        chosen[unit] = option


def total(table: Table, chosen: Sequence[int]) -> float:
    """Return the sum of the chosen options."""
    return sum(row[option] for row, option in zip(table, chosen, strict=True))
