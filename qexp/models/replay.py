"""Answers of a block's finished modules, so that walking over the block again does not compute them again.

A block is walked over once per group of layers and once more for its output. From the moment q, k and v have their
final weights, each of these walks would multiply by them with the same input and the same result. A finished module is
computed once per micro-batch and then answers from memory, as far as the budget reaches: the same bits in less time
(a third of GPTQ's on Gemma 3 270M). The swap is undone after each forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

BUDGET_BYTES = 2**30  # of answers kept at a time; beyond it modules compute again


class Replays:
    """The finished modules of ``model`` and what they answered, by micro-batch."""

    def __init__(self, model: nn.Module, budget_bytes: int = BUDGET_BYTES) -> None:
        self._model, self._budget = model, budget_bytes
        self._kept: dict[str, dict[int, Any]] = {}

    def finish(self, name: str) -> None:
        """Let module ``name``, whose parameters and inputs will not change, answer from memory after its next call."""
        self._kept = {other: kept for other, kept in self._kept.items() if not other.startswith(f"{name}.")}
        self._kept[name] = {}

    def clear(self) -> None:
        """Forget everything: all modules compute again."""
        self._kept = {}

    @contextmanager
    def at(self, batch: int) -> Iterator[None]:
        """Have finished modules replay their answers to micro-batch ``batch`` while the block runs inside."""
        originals = {name: self._model.get_submodule(name) for name in self._kept}
        for name, module in originals.items():
            self._model.set_submodule(name, _Replay(module, self, name, batch))
        try:
            yield
        finally:
            for name, module in originals.items():
                self._model.set_submodule(name, module)

    def recall(self, name: str, batch: int) -> Any | None:
        """Return the kept answer or None."""
        return self._kept[name].get(batch)

    def keep(self, name: str, batch: int, answer: Any) -> None:
        """Keep an answer if the budget allows."""
        total = sum(_bytes(kept) for answers in self._kept.values() for kept in answers.values())
        if total + _bytes(answer) <= self._budget:
            self._kept[name][batch] = answer


class _Replay(nn.Module):
    """Stands in for a module during one forward of its block."""

    def __init__(self, module: nn.Module, replays: Replays, name: str, batch: int) -> None:
        super().__init__()
        self.module, self._replays, self._name, self._batch = module, replays, name, batch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the kept answer, or compute and keep it."""
        answer = self._replays.recall(self._name, self._batch)
        if answer is None:
            answer = self.module(*args, **kwargs)
            self._replays.keep(self._name, self._batch, answer)
        return answer


def _bytes(answer: Any) -> int:
    parts = answer if isinstance(answer, tuple) else (answer,)
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))
