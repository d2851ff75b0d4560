"""Speed of the CUDA kernels against the ceilings and cuBLAS of the same run: G1 to G8 of kernels.md section 9.

Every number is the median (and the least) of interleaved graph replays; a graph calls a kernel once on each of several
copies of its data, more than three times the L2 cache in all, so that nothing is read from the cache of the run before.
Inputs are random. Usage: python benchmarks/gpu_kernels.py [--json FILE] [--only G3,G6]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.core.hadamard_matrices import small_hadamard
from qexp.kernels import cuda, cuda_weight, int4
from qexp.kernels.had_quant import had_quant, hadamard
from qexp.kernels.pack import pack_int4

Call = Callable[[int], object]  # works on copy number i
REPLAYS, LEAST_MS = 11, 0.5
WIDTHS = (64, 128, 256, 1024, 4096, 8192, 14336, 11008)
PREFILL = tuple((m, 4096, n) for m in (2048, 8192) for n in (4096, 14336))  # (M, K, N)
DECODE = ((4096, 4096, ">=2.0"), (4096, 14336, ">=2.7"), (8192, 28672, ">=3.2"))  # (K, N, target of M = 1)
ORDERS = {14336: 28, 11008: 172}
OPS: Any = torch.ops.qexp
DEVICE, BF16 = "cuda", torch.bfloat16
rows: list[dict[str, Any]] = []


def copies(bytes_each: float) -> int:
    """Return how many copies of the data exceed three times the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, math.ceil(3 * cache / bytes_each) + 1))


def noise(*shape: int) -> Tensor:
    """Return random bf16 numbers."""
    return torch.randn(*shape, device=DEVICE, dtype=BF16)


def capture(call: Call, count: int) -> Callable[[], float]:
    """Return a function that replays ``count`` calls, more often if they are short, and says what one took, in us."""
    for i in range(count):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    timed(1)
    times = max(1, math.ceil(LEAST_MS / max(timed(1), 1e-3)))
    return lambda: timed(times) / times / count * 1000


def compare(calls: dict[str, Call], bytes_each: float) -> dict[str, list[float]]:
    """Return the sorted times of each call in us, measured in turns."""
    graphs = {name: capture(call, copies(bytes_each)) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, replay in graphs.items():
            times[name].append(replay())
    return {name: sorted(values) for name, values in times.items()}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each call."""
    return {name: statistics.median(values) for name, values in times.items()}


def report(goal: str, what: str, times: dict[str, list[float]], ours: str, ratio: float, target: str) -> None:
    """Print one line of the table and keep it for the JSON file."""
    median, spread = medians(times), times[ours][-1] / times[ours][0] - 1
    least = {name: values[0] for name, values in times.items()}
    rows.append({"goal": goal, "what": what, "us": median, "min_us": least, "ratio": ratio, "target": target})
    listed = "  ".join(f"{name} {value:.1f}" for name, value in median.items())
    print(f"{goal:4}{what:44}{ratio:7.2f}  (target {target:12}) spread {spread:4.0%}  us: {listed}", flush=True)


def ceilings(size: int = 8192, gigabyte: int = 1 << 30) -> float:
    """Print the rates of the machine, measured; return the copy bandwidth in bytes per us."""
    source = [torch.randint(0, 256, (gigabyte,), dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    target = torch.empty_like(source[0])
    a, b = noise(size, size), noise(size, size)
    qa, qb = (torch.randint(-128, 128, (size, size), device=DEVICE, dtype=torch.int8) for _ in range(2))
    calls: dict[str, Call] = {
        "copy": lambda i: target.copy_(source[i % 2]),
        "bf16": lambda _: a @ b,
        "int8": lambda _: torch._int_mm(qa, qb.T),
    }
    median, work = medians(compare(calls, gigabyte)), 2 * size**3 / 1e6
    bandwidth = 2 * gigabyte / median["copy"]
    print(f"copy {bandwidth / 1e6:.2f} TB/s", end=", ")
    print(f"bf16 {work / median['bf16']:.0f} TFLOP/s, torch._int_mm {work / median['int8']:.0f} TOP/s", flush=True)
    rows.append({"goal": "ceilings", "us": median})
    return bandwidth


def rotation(n: int, bandwidth: float, elements: int = 1 << 25) -> None:
    """G1 and G2: rotate, quantize to 4 bits and pack rows of n."""
    m, order = max(1, elements // n), ORDERS.get(n, 1)
    had_k = small_hadamard(order).to(DEVICE, torch.int8) if order > 1 else None
    xs = [noise(m, n) for _ in range(copies(2.5 * m * n))]

    def eager(i: int) -> object:
        y = hadamard(xs[i], had_k=had_k)
        scale = y.abs().amax(1, keepdim=True).float() / 7
        q = (y * scale.reciprocal()).round_().clamp_(-8, 7).to(torch.int8).view(torch.uint8) & 15
        return q[:, 0::2] | (q[:, 1::2] << 4)

    calls: dict[str, Call] = {
        "fused": lambda i: had_quant(xs[i], 4, had_k=had_k),
        "two kernels": lambda i: had_quant(hadamard(xs[i], had_k=had_k), 4, rotate=False),
        "eager": eager,
    }
    times = compare(calls, 2.5 * m * n)
    median = medians(times)
    target = ">=0.80" if n <= 256 else ">=0.65 (0.8)" if n <= 4096 else ">=0.5"
    share = (2.5 * m * n + 8 * m) / median["fused"] / bandwidth
    report("G1", f"had_quant q4 {m}x{n}: useful bytes / copy", times, "fused", share, target)
    report("G2", f"  over transform, amax, quantize {n}", times, "fused", median["eager"] / median["fused"], ">=3")


def weights(n: int, k: int, group: int, scheme: str = "") -> list[tuple[Any, ...]]:
    """Return copies of packed weights with n and group behind them, as the operators take them."""
    made = []
    for _ in range(copies(n * k / 2)):
        w_q = torch.randint(0, 256, (n, k // 2), device=DEVICE, dtype=torch.uint8)
        scale = torch.rand((n, k // group) if group else (n,), device=DEVICE) * 0.01 + 0.01
        if scheme == "two-level":
            library = cuda._library()
            assert not isinstance(library, str)
            packed = cuda_weight.prepack_two_level(library, w_q, *cuda_weight.two_level(scale), group)
        else:
            packed = int4.prepack_w4(w_q, scale, None, group, "cuda_mma")
        made.append((*packed, n, group))
    return made


def exact(m: int, n: int, k: int) -> None:
    """Fail unless the integers of the usual kernel are those of torch's int8 product at a full-size shape."""
    w = torch.randint(-8, 8, (n, k), device=DEVICE, dtype=torch.int8)
    a = torch.randint(-128, 128, (m, k), device=DEVICE, dtype=torch.int8)
    w_p = int4.prepack_w4(pack_int4(w), torch.ones(n, device=DEVICE), None, 0, "cuda_mma")[0]
    assert torch.equal(OPS.w4a8_i32(a, w_p, n), torch._int_mm(a, w.T)), f"wrong integers at {m}x{k}x{n}"


def prefill(m: int, k: int, n: int) -> None:
    """G3, G4, G5 and G8: many tokens."""
    exact(m, n, k)
    x = noise(m, k)
    dense = [noise(n, k) for _ in range(copies(2.0 * n * k))]
    channel, fp, two = weights(n, k, 0), weights(n, k, 128), weights(n, k, 128, "two-level")
    (q8, s8, _), (q4, s4, _), (p4, _, _) = had_quant(x, 8), had_quant(x, 4, container8=True), had_quant(x, 4)
    calls: dict[str, Call] = {
        "cublas": lambda i: torch.nn.functional.linear(x, dense[i % len(dense)]),
        "w4a8": lambda i: OPS.w4a8(q8, s8, None, *channel[i], None, BF16),
        "w4a4": lambda i: OPS.w4a4(q4, s4, None, *channel[i], None, BF16),
        "w4a4 packed": lambda i: OPS.w4a4(p4, s4, None, *channel[i], None, BF16),
        "+had": lambda i: OPS.w4a8(*had_quant(x, 8)[:2], None, *channel[i], None, BF16),
        "two-level": lambda i: OPS.w4a8(q8, s8, None, *two[i], None, BF16),
        "fp group": lambda i: OPS.w4a8(q8, s8, None, *fp[i], None, BF16),
    }
    times = compare(calls, n * k / 2)
    cuda.force_kernel("tile")
    times |= compare({"mma.sync": calls["w4a8"]}, n * k / 2)
    cuda.force_kernel("")
    median, shape = medians(times), f"{m}x{k}x{n}"
    goals = (">=1.35 (1.6)", ">=1.25") if m <= 2048 else (">=1.5 (1.75)", ">=1.4")
    for name in ("w4a8", "w4a4"):
        report("G3", f"{name} {shape} over cuBLAS bf16", times, name, median["cublas"] / median[name], goals[0])
    report("G4", f"w4a8 + had_quant {shape}", times, "+had", median["cublas"] / median["+had"], goals[1])
    report("G5", f"two-level g128 / channel {shape}", times, "two-level", median["w4a8"] / median["two-level"], ">=0.9")
    report("G5", f"fp g128 / channel {shape}", times, "fp group", median["w4a8"] / median["fp group"], ">=0.65")
    report("G8", f"mma.sync w4a8 {shape}", times, "mma.sync", median["cublas"] / median["mma.sync"], ">=1.0")


def decode(k: int, n: int, target: str) -> None:
    """G6 and G7: few tokens."""
    dense = [noise(n, k) for _ in range(copies(2.0 * n * k))]
    group, channel, first = weights(n, k, 128), weights(n, k, 0), 1.0

    def measured(m: int) -> dict[str, list[float]]:
        x = noise(m, k)
        q, s, _ = had_quant(x, 8)
        calls: dict[str, Call] = {
            "cublas": lambda i: torch.nn.functional.linear(x, dense[i % len(dense)]),
            "w4a16": lambda i: OPS.w4a16(x, *group[i], None),
            "w4a8": lambda i: OPS.w4a8(q, s, None, *channel[i], None, BF16),
        }
        return compare(calls, n * k / 2)

    for m in (1, 16, 64, 256):
        times = measured(m)
        median = medians(times)
        ratio = median["cublas"] / median["w4a16"]
        first = ratio if m == 1 else first
        goal = {1: target, 16: f">={0.9 * first:.2f}", 64: ">=1.2", 256: ">=0.9"}[m]
        report("G6" if m == 1 else "G7", f"w4a16 g128 {m}x{k}x{n} over cuBLAS", times, "w4a16", ratio, goal)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="G1,G3,G6", help="G1 (with G2), G3 (G4, G5, G8), G6 (G7)")
    options = parser.parse_args()
    assert cuda.load(), cuda.reason()
    torch.manual_seed(0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit.strip()}
    print(machine)
    bandwidth, goals = ceilings(), options.only.split(",")
    for n in WIDTHS if "G1" in goals else ():
        rotation(n, bandwidth)
    for m, k, n in PREFILL if "G3" in goals else ():
        prefill(m, k, n)
    for k, n, target in DECODE if "G6" in goals else ():
        decode(k, n, target)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
