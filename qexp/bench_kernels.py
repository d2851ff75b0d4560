"""Each kernel by shape, beside its peers and its floor: the tables of kernels.md sections 2 and 9.

Products: M tokens, K inputs, N outputs, one scale per group of 128 columns; ``w4a8`` is given int8 activations,
``linear_w4a8`` starts from bfloat16 and quantizes them first. ``had_quant``: M rows of n columns, bfloat16 to int4.
Floors are measured in the same run: the time to read the packed weight, or of the integer multiplications alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qexp.bench_peers import Peer, available
from qexp.bench_timing import Call, Pace, Row, in_turn, interleaved, row
from qexp.core.packed import odd_part
from qexp.kernels import floors as _floors  # noqa: F401 -- defines its operators
from qexp.kernels import int4, matmul
from qexp.kernels.build import force_isa
from qexp.kernels.had_quant import had_quant
from qexp.kernels.ops import kernel_info

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]
STEPS = 20_000  # of the multiplying loop: about a millisecond
LOWER_TIER, BETTER_TIERS = "avx2", ("avxvnni", "avx512bw", "avx512vnni")
FEW = 16  # tokens up to which a product is limited by reading the weight


@dataclass(frozen=True)
class Suite:
    """What is measured: products of every M with every (K, N), and Hadamard rows of every width."""

    tokens: Sequence[int]
    layers: Sequence[tuple[int, int]]
    widths: Sequence[int]
    group: int = 128
    had_elements: int = 1 << 26  # 128 MB of bfloat16: no cache holds it


FULL_SUITE = Suite((1, 16, 512), ((4096, 4096), (4096, 11008)), (128, 1024, 4096, 8192, 14336, 11008))
QUICK_SUITE = Suite((1, 16), ((256, 128),), (128, 768), 128, 1 << 16)


def rows(suite: Suite, pace: Pace, progress: Progress) -> tuple[list[Row], dict[str, str]]:
    """Return one row per case, and the peers that are missing with the reason."""
    peers, missing = available()
    backend, measured = kernel_info()["isa"], list[Row]()
    cases = [(k, n, m) for k, n in suite.layers for m in suite.tokens]
    for k, n, m in progress("measure products", cases):
        measured += _products(Product(m, k, n, suite.group, backend), peers, pace)
    for width in progress("measure Hadamard rows", suite.widths):
        measured.append(_had_quant(width, max(1, suite.had_elements // width), backend, pace))
    return measured, missing


@dataclass(frozen=True)
class Product:
    """One product: M x K times K x N, and which kernels compute it."""

    m: int
    k: int
    n: int
    group: int
    backend: str

    def about(self, op: str) -> dict[str, Any]:
        """Return the first columns of its row."""
        return {"op": op, "backend": self.backend, "m": self.m, "k": self.k, "n": self.n, "group": self.group}


class Floor:
    """The least time of one case, measured in turns with it: one pass over its weight, or its multiplications alone."""

    def __init__(self, case: Product, w_p: Tensor) -> None:
        self.operations = 2 * case.m * case.k * case.n
        self.done = int(torch.ops.qexp.floor_dot(torch.empty(0), STEPS)[0])

        def make() -> Call:
            own = w_p.clone()
            return lambda: torch.ops.qexp.floor_read(own)

        self.calls: dict[str, Call] = {}
        if kernel_info()["compiled"]:  # else they are no floors
            self.calls["read"] = in_turn(make, w_p.nbytes, case.m <= FEW)
            self.calls["dot"] = lambda: torch.ops.qexp.floor_dot(torch.empty(0), STEPS)

    def taken_from(self, times: dict[str, list[float]]) -> float | None:
        """Return the floor in milliseconds (None: not known) and take its measurements out of ``times``."""
        if not self.calls:
            return None
        read, dot = (median(times.pop(name)) for name in self.calls)
        return max(read, dot * self.operations / self.done)


def _products(case: Product, peers: Sequence[Peer], pace: Pace) -> Iterator[Row]:
    """Measure every operator on one shape; the peers and the floor are measured beside each."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(case.n, case.k, generator=rng) / case.k**0.5
    x = torch.randn(case.m, case.k, generator=rng)
    packed = _packed(weight, case.group)
    size, few = packed.w_p.nbytes + packed.w_s.nbytes, case.m <= FEW
    others = {
        peer.name: in_turn(peer.prepare(weight, x, case.group), int(peer.bytes_per_weight * weight.numel()), few)
        for peer in peers
    }
    floor = Floor(case, packed.w_p)
    for op, make in _ours(packed, x).items():
        ours = in_turn(make, size, few)
        lower = _lower_tier(ours) if op == "w4a8" else {}
        times = interleaved({"ours": ours, **lower, **others, **floor.calls}, pace)
        least = floor.taken_from(times)
        yield row(case.about(op), times, least)


def _lower_tier(ours: Call) -> dict[str, Call]:
    """Return our call on the tier that every x86 machine has, where this one uses a better."""
    if kernel_info()["isa"] not in BETTER_TIERS:
        return {}

    def forced() -> None:
        force_isa(LOWER_TIER)
        try:
            ours()
        finally:
            force_isa(None)

    return {f"own {LOWER_TIER}": forced}


def _packed(weight: Tensor, group: int) -> matmul.W4:
    """Return the weight rounded to int4, symmetric, one scale per group."""
    slices = weight.view(len(weight), -1, group)
    scale = slices.abs().amax(-1) / 7
    codes = (slices / scale[..., None]).round().to(torch.int8).view(weight.shape)
    w_p, w_s, _ = int4.prepack_w4(int4.pack_int4(codes), scale, None, group)
    return matmul.W4(w_p, w_s, None, len(weight), group)


def _ours(packed: matmul.W4, x: Tensor) -> dict[str, Callable[[], Call]]:
    """Return how to make the calls of each operator, with a copy of the weight of their own."""
    a, half = had_quant(x, 8, rotate=False, sum_group=packed.group), x.bfloat16()
    small = had_quant(x, 4, rotate=False, container8=True, sum_group=packed.group)

    def copy() -> matmul.W4:
        return packed._replace(w_p=packed.w_p.clone(), w_s=packed.w_s.clone())

    def whole_layer(own: matmul.W4) -> Tensor:
        codes = had_quant(half, 8, rotate=False, sum_group=own.group)
        return matmul.w4a8(codes.q, codes.scale, codes.sums, own, None, torch.bfloat16)

    def w4a8() -> Call:
        own = copy()
        return lambda: matmul.w4a8(a.q, a.scale, a.sums, own, None, torch.bfloat16)

    def w4a4() -> Call:
        own = copy()
        return lambda: matmul.w4a4(small.q, small.scale, small.sums, own, None, torch.bfloat16)

    def w4a16() -> Call:
        own = copy()
        return lambda: matmul.w4a16(half, own, None)

    def layer() -> Call:
        own = copy()
        return lambda: whole_layer(own)

    return {"w4a8": w4a8, "linear_w4a8": layer, "w4a4": w4a4, "w4a16": w4a16}


def _had_quant(width: int, count: int, backend: str, pace: Pace) -> Row:
    """Measure the fused rotation and quantization to int4; the peer is a copy of the input."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    into, had_k = torch.empty_like(x), odd_part(width)
    calls: dict[str, Call] = {
        "ours": lambda: had_quant(x, 4, had_k=had_k),
        "memcpy": lambda: into.copy_(x),
    }
    about = {"op": "had_quant", "backend": backend, "m": count, "k": width, "n": width, "group": 0}
    measured = row(about, interleaved(calls, pace), None)
    copied = measured["peers"]["memcpy"]  # moves 4 bytes an element; this kernel must move 2.5
    return measured | {"floor_ms": copied * 2.5 / 4}
