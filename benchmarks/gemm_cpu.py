"""Products with 4-bit weights on the CPU against torch's own and against the machine's floors, in one thread.

    python benchmarks/gemm_cpu.py [--m 1 16 512] [--n 4096 11008] [--k 4096] [--group 128] [--rounds 7] [--isa avx2]

Every round runs each contestant once, in turn; times are the thread's CPU seconds, so that another busy process costs a
shared machine cache and bandwidth but not whole time slices; the table shows minimum and median. Weights are rotated
through more memory than the last-level cache where M is small. Speed on all threads: qexp-bench kernels.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qexp.kernels import build, floors, int4, matmul

ROTATED_BYTES = 400 << 20


def seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread for one call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def contestants(m: int, n: int, k: int, group: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; each call uses the next copy of its weight."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = torch.rand(n, k // group if group else 1) * 0.01 + 0.001
    packed = int4.prepack_w4(int4.pack_int4(codes), scale, None, group)
    ours = [matmul.W4(*part, n, group) for part in rotate(packed, m)]
    a, x = torch.randint(-128, 128, (m, k), dtype=torch.int8), torch.randn(m, k, dtype=torch.bfloat16)
    a4, a_scale = int4.pack_int4(a >> 4), torch.rand(m) * 0.01
    found = {
        "w4a8": cycle(ours, lambda w: matmul.w4a8(a, a_scale, None, w, None, torch.bfloat16)),
        "w4a4": cycle(ours, lambda w: matmul.w4a4(a4, a_scale, None, w, None, torch.bfloat16)),
        "w4a16": cycle(ours, lambda w: matmul.w4a16(x, w, None)),
        "read floor": cycle(ours, lambda w: (floors.read_seconds(w.w_p), floors.read_seconds(w.w_s))),
    }
    weight = torch.randn(n, k, dtype=torch.bfloat16)
    found["torch bf16"] = cycle(list(rotate((weight,), m)), lambda w: torch.nn.functional.linear(x, w[0]))
    x32 = x.float()
    found["torch fp32"] = cycle(list(rotate((weight.float(),), m)), lambda w: torch.nn.functional.linear(x32, w[0]))
    if group:
        found["torch int4pack"] = torch_int4(codes, x, group, m)
    found["torch w8a8 onednn"] = torch_w8a8(x32, n, k, m)
    return found


def torch_int4(codes: Tensor, x: Tensor, group: int, m: int) -> Callable[[], object]:
    """Return torch's own 4-bit product."""
    n, k = codes.shape
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    scales = torch.randn(k // group, n, 2, dtype=torch.bfloat16)
    copies = list(rotate((packed, scales), m))
    return cycle(copies, lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w[0], group, w[1]))


def torch_w8a8(x: Tensor, n: int, k: int, m: int) -> Callable[[], object]:
    """Return torch's dynamically quantized linear layer on oneDNN, with its quantization of x."""
    torch.backends.quantized.engine = "onednn"
    count = copies_of(n * k, m)
    linear = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False))
    models = [torch.ao.quantization.quantize_dynamic(linear, dtype=torch.qint8) for _ in range(count)]
    return cycle(models, lambda model: model(x))


def copies_of(size: int, m: int) -> int:
    """Return how many copies keep a weight of ``size`` bytes out of the caches; with many rows that does not matter."""
    return max(1, ROTATED_BYTES // size) if m <= 16 else 1


def rotate(parts: tuple[Tensor, ...], m: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield copies of a weight."""
    for _ in range(copies_of(sum(part.numel() * part.element_size() for part in parts), m)):
        yield tuple(part.clone() for part in parts)


def cycle(copies: list[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """Return a call that takes the next copy every time."""
    forever = itertools.cycle(copies)
    return lambda: call(next(forever))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in (("m", [1, 16, 512]), ("n", [4096]), ("k", [4096])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa")
    parser.add_argument("--only", nargs="+", default=[], help="names of contestants, e.g. w4a8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build.force_isa(options.isa)
    with torch.no_grad():
        for m, n, k in itertools.product(options.m, options.n, options.k):
            table(m, n, k, options)


def table(m: int, n: int, k: int, options: argparse.Namespace) -> None:
    """Time one shape and print its table."""
    calls = contestants(m, n, k, options.group)
    calls = {name: call for name, call in calls.items() if not options.only or name in options.only}
    repeats = {1: 24, 16: 8}.get(m, 1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    rates = []
    for call in calls.values():
        call()
    for _ in range(options.rounds):
        rates.append(dot_rate())
        for name, call in calls.items():
            times[name].append(min(seconds(call) for _ in range(repeats)))
    floor = 2 * m * n * k / max(rates)
    ours = min(times["w4a8"])
    print(f"M={m} N={n} K={k} group={options.group} isa={build.isa()} dot {max(rates) / 1e9:.0f} Gop/s")
    for name, taken in times.items():
        low, middle = min(taken), statistics.median(taken)
        ratios = f"over w4a8 {low / ours:6.2f}   {floor / low:5.2f} of dot"
        print(f"  {name:18} {low * 1e3:9.3f} {middle * 1e3:9.3f} ms   {ratios}")


def dot_rate(steps: int = 400_000) -> float:
    """Return the best of five: a floor that a neighbour disturbed would flatter the kernels."""
    taken = [seconds(lambda: torch.ops.qexp.floor_dot(torch.empty(0), steps)) for _ in range(5)]
    return int(torch.ops.qexp.floor_dot(torch.empty(0), steps)[0]) / min(taken)


if __name__ == "__main__":
    main()
