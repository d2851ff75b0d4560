"""What a recipe learns block by block, and which streams that reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qexp.core.decoding import BlockDecoder
from qexp.core.learned import BlockTuner, LearnedSolver, ModelTuner, NormFactors, RangeTuner, Trained
from qexp.core.method import Method
from qexp.core.training import Training


@dataclass(frozen=True)
class Wants:
    """Which streams a recipe reads: behind quantized and behind float blocks, and the float block's answers to them."""

    quantized: bool
    float: bool
    t1: bool
    t2: bool

    def answers_float(self, last: bool) -> bool:
        """Return whether the float block's answer to its float input is read: as a target, or by the next block."""
        return self.t1 or (self.float and not last)

    @property
    def streams(self) -> int:
        """Return how many streams are kept at once."""
        return 2 * self.quantized + 2 * self.float + self.t2


def trainings(method: Method) -> dict[str, Training]:
    """Return the settings of everything that is learned block by block, by the key of its member."""
    found = {f"transform.{n}": t.training for n, t in method.transform.items() if isinstance(t, Trained)}
    found |= {"solver": method.solver.training} if isinstance(method.solver, LearnedSolver) else {}
    tuners = {n: t for n, t in method.tuner.items() if isinstance(t, RangeTuner | BlockTuner | BlockDecoder)}
    return found | {f"tuner.{n}": t.training for n, t in tuners.items()}


def changes_norms(method: Method) -> bool:
    """Return whether norms change behind the moment at which inputs are calibrated."""
    solver = method.solver
    tuned = any(isinstance(tuner, BlockTuner | NormFactors) for tuner in method.tuner.values())
    tuned |= any(isinstance(tuner, BlockDecoder) and tuner.norm_rate > 0 for tuner in method.tuner.values())
    return tuned or (isinstance(solver, LearnedSolver) and solver.norms_rate(method.grid.bits) > 0)


def needs_fisher(method: Method) -> list[str]:
    """Return which members of a recipe read squared gradients."""
    members: dict[str, Any] = {"grid": method.grid}
    members |= {f"transform {name}": transform for name, transform in method.transform.items()}
    return [name for name, member in members.items() if "fisher" in member.needs]


def model_trainings(method: Method) -> dict[str, Training]:
    """Return the settings of what is learned end to end after rounding, by the key of its member."""
    return {f"tuner.{n}": t.training for n, t in method.tuner.items() if isinstance(t, ModelTuner)}


def wants_of(method: Method) -> Wants:
    """Return the streams that statistics and learning read."""
    learning = trainings(method).values()
    t1, t2 = any(t.t1 for t in learning), any(t.t2 for t in learning)
    reads_quantized = method.inputs != "float" or t2 or any(t.student != "fp" for t in learning)
    reads_float = method.inputs == "float" or t1 or any(t.student != "q" for t in learning)
    return Wants(reads_quantized, reads_float, t1, t2)
