"""What the machine can do at best, to judge a kernel by: loops that only read, or only multiply, on its threads.

A kernel that must move B bytes and do P operations needs at least max(B / read rate, P / dot rate) seconds; measure the
rates in the same run, between the kernel's own repetitions.

Source: kernels.md section 1.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from qexp.kernels import ops, shapes


def read_seconds(x: Tensor) -> float:
    """Return the seconds of one pass over x, a contiguous tensor on the CPU; nothing is written."""
    start = time.perf_counter()
    torch.ops.qexp.floor_read(x)
    return time.perf_counter() - start


def dot_rate(steps: int = 100_000) -> float:
    """Return int8 operations a second of the tier's byte dot product on all threads (a product and a sum are two)."""
    start = time.perf_counter()
    done = torch.ops.qexp.floor_dot(torch.empty(0), steps)
    return int(done[0]) / (time.perf_counter() - start)


def floor_read_reference(x: Tensor) -> Tensor:
    """Read by torch's sum: not a floor, only something that runs."""
    shapes.floor_read(x)
    return x.contiguous().view(torch.uint8).sum()


def floor_dot_reference(x: Tensor, steps: int) -> Tensor:
    """Multiply 8-bit matrices of order 64: not a floor, only something that runs."""
    a = torch.ones(64, 64, dtype=torch.int8, device=x.device)
    for _ in range(steps // 1000):
        a.float() @ a.float()
    return torch.tensor([steps // 1000 * 2 * 64**3, 0], device=x.device)


assert ops.OPS["floor_read"] == "floors"  # importing this module defines the operators
