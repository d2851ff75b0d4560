"""What code that torch.compile traces must say of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of constants: a compiled graph takes its answer and does not look inside.

    A cache goes around it, not inside: tracing looks through ``functools.cache``.
    """
    marked: Callable[P, R] = torch.compiler.assume_constant_result(function)
    return marked
