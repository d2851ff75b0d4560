"""What the CUDA kernels must compute, for a GPU and for their emulation on the host alike."""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qexp.core.hadamard_matrices import small_hadamard
from qexp.kernels import build, int4, matmul
from qexp.kernels import cuda_weight as packed
from qexp.kernels.cuda_abi import Library
from qexp.kernels.cuda_ops import Kernels
from qexp.kernels.had_quant import had_quant_reference, hadamard_reference
from qexp.kernels.pack import pack_int4, unpack_int4

ROOT = Path(__file__).resolve().parents[2]
BOUND = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# (M, N, K, group, zero points): every tail of every kernel, each way to scale.
PRODUCTS = [
    (1, 40, 70, 0, False),
    (1, 1, 2, 0, True),
    (8, 129, 128, 64, True),
    (5, 130, 96, 32, False),
    (9, 20, 288, 96, True),
    (17, 33, 256, 128, True),
    (40, 33, 256, 256, False),
    (64, 64, 130, 0, True),
    (65, 128, 352, 0, False),
    (70, 130, 384, 192, True),
    (130, 129, 512, 128, False),
    (257, 15, 640, 128, True),
]
# (rows, n, block, order, group, sum_group): butterflies of every depth, factors, several rows a block.
ROTATIONS = [
    (130, 32, 0, 1, 0, 0),
    (37, 64, 0, 1, 32, 0),
    (33, 128, 0, 1, 0, 32),
    (5, 256, 64, 1, 64, 128),
    (3, 512, 0, 1, 0, 0),
    (3, 1024, 0, 1, 128, 128),
    (2, 4096, 128, 1, 0, 0),
    (2, 8192, 0, 1, 0, 0),
    (1, 16384, 0, 1, 2048, 0),
    (7, 768, 0, 12, 64, 0),
    (4, 768, 96, 12, 0, 0),
    (1, 5120, 0, 20, 0, 0),
    (1, 14336, 0, 28, 0, 128),
    (1, 11008, 0, 172, 0, 0),
]


@functools.cache
def emulated() -> Kernels:
    """The kernels compiled for the host (csrc/cuda/emulator.h), kept in the cache folder."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    texts = [path.read_bytes() for path in sorted((ROOT / "csrc/cuda").iterdir())]
    name = hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
    target = build.cache_folder() / f"cuda-emulated-{name}.so"
    if not target.exists():
        compile_emulated(sources, target, ["-O1"])
    return Kernels(Library(target), 90)


def compile_emulated(sources: Sequence[Path], target: Path, flags: Sequence[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{id(target)}.tmp")
    base = ["g++", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-x", "c++", *flags]
    done = subprocess.run([*base, *map(str, sources), "-o", str(scratch)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    scratch.replace(target)


def has_compiler() -> bool:
    return shutil.which("g++") is not None


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a row: one bad row must not hide among good ones."""
    got, expected = got.cpu().double(), expected.cpu().double()
    norms = expected.norm(dim=1)
    return float(((got - expected).norm(dim=1) / norms.where(norms > 0, 1)).max()) if len(got) else 0.0


def make_weight(n: int, k: int, group: int, zeros: bool, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return canonical codes, scales and zero points."""
    g, shape = draw(seed), (n, k // group) if group else (n,)
    q = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
    zero = torch.randint(-8, 8, shape, generator=g, dtype=torch.int8) if zeros else None
    return pack_int4(q), torch.rand(shape, generator=g) * 0.02 + 0.01, zero


def exact_product(
    a: Tensor, a_scale: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], bias: Tensor | None
) -> Tensor:
    """Return the product of codes [M, K] and a canonical weight in float64."""
    w_q, scale, zero = weight
    n, k = w_q.shape[0], 2 * w_q.shape[1]
    scales = scale.double().reshape(n, -1, 1)
    shift = 0 if zero is None else (scale * zero).double().reshape(n, -1, 1)  # w_z is fp32
    w = (unpack_int4(w_q).double().reshape(n, scales.shape[1], -1) * scales - shift).reshape(n, k)
    out = a.double() @ w.T * a_scale.double()[:, None]
    return out if bias is None else out + bias.double()


def check_integers(kernels: Kernels, device: str, m: int, n: int, k: int, extreme: bool = False) -> None:
    """w4a8_i32 is the integer product, bit for bit."""
    w_q, scale, _ = make_weight(n, k, 0, False, seed=m + n + k)
    a = torch.randint(-128, 128, (m, k), generator=draw(k), dtype=torch.int8)
    if extreme:
        w_q, a = torch.full_like(w_q, 0x88), torch.full_like(a, -128)
    expected = (a.double() @ unpack_int4(w_q).double().T).to(torch.int32)
    ours = packed.prepack(kernels.library, w_q.to(device), scale.to(device), None, 0, "cuda_mma")
    got = kernels.w4a8_i32(a.to(device), ours[0], n)
    assert torch.equal(got.cpu(), expected), f"{kernels.forced or 'usual'} kernel, {m=} {n=} {k=}"


def check_product(kernels: Kernels, device: str, case: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    """w4a8 and w4a4 are the references' numbers within one rounding of the output."""
    m, n, k, group, zeros = case
    w_q, scale, zero = make_weight(n, k, group, zeros, seed=n)
    g = draw(m + k)
    a = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
    a_scale, bias = torch.rand(m, generator=g), torch.randn(n, generator=g).to(dtype)
    ours = packed.prepack(kernels.library, *(on(x, device) for x in (w_q, scale, zero)), group, "cuda_mma")
    for values, op in ((a, "w4a8"), (a >> 4, "w4a4"), (pack_int4(a >> 4), "w4a4")):
        codes = unpack_int4(values) if values.dtype == torch.uint8 else values
        sums = codes.reshape(m, k // group if group else 1, -1).sum(-1, dtype=torch.int32)
        expected = exact_product(codes, a_scale, (w_q, scale, zero), bias)
        inputs = [on(x, device) for x in (values, a_scale, sums)]
        got = getattr(kernels, op)(*inputs, *ours, n, group, bias.to(device), dtype)
        error = relative_error(got, expected)
        assert got.dtype == dtype and error <= BOUND[dtype], f"{op} {kernels.forced}: {error:.2e} for {case}"


def check_float_product(
    kernels: Kernels, device: str, case: tuple[int, int, int, int, bool], dtype: torch.dtype
) -> None:
    m, n, k, group, zeros = case
    w_q, scale, zero = make_weight(n, k, group, zeros, seed=n)
    x, bias = torch.randn(m, k, generator=draw(m)).to(dtype), torch.randn(n, generator=draw(k)).to(dtype)
    reference = int4.prepack_w4(w_q, scale, zero, group, "reference")
    ours = packed.prepack(kernels.library, *(on(t, device) for t in (w_q, scale, zero)), group, "cuda_mma")
    expected = matmul.w4a16_reference(x, *reference, n, group, bias)
    got = kernels.w4a16(x.to(device), *ours, n, group, bias.to(device))
    # Weights that were decoded to 16 bits carry a rounding of their own, and a row of few outputs may be small.
    bound = (3 if m > 64 else 1) * BOUND[dtype] if dtype != torch.float32 else 2e-6
    assert got.dtype == dtype and relative_error(got, expected) <= bound, f"{case}"


def check_two_level(kernels: Kernels, device: str, m: int) -> None:
    n, k, group = 130, 384, 128
    w_q, scale, _ = make_weight(n, k, group, False, seed=3)
    outer, inner = packed.two_level(scale)
    a = torch.randint(-128, 128, (m, k), generator=draw(m), dtype=torch.int8)
    a_scale = torch.rand(m, generator=draw(m))
    ours = packed.prepack_two_level(kernels.library, *(on(t, device) for t in (w_q, outer, inner)), group)
    expected = exact_product(a, a_scale, (w_q, outer[:, None].double() * inner, None), None)
    got = kernels.w4a8(a.to(device), a_scale.to(device), None, *ours, n, group, None, torch.float32)
    assert relative_error(got, expected) <= BOUND[torch.float32]


def check_rotation(
    kernels: Kernels, device: str, case: tuple[int, int, int, int, int, int], dtype: torch.dtype
) -> None:
    """hadamard to rounding; had_quant: codes differ by one at most and only near ties, sums are those of the codes."""
    rows, n, block, order, group, sum_group = case
    had_k = small_hadamard(order).to(torch.int8) if order > 1 else None
    x = torch.randn(rows, n, generator=draw(n)).to(dtype)
    on_device = on(x, device), on(had_k, device)
    turned = kernels.hadamard(on_device[0], block, 0.25, on_device[1]).cpu()
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}[dtype]  # 16 bits: few roundings flip
    assert relative_error(turned, hadamard_reference(x, block, 0.25, had_k)) <= bound
    for bits, container8, rotate in ((4, False, True), (4, True, True), (8, False, True), (4, False, False)):
        settings = (bits, block, rotate, 0.9, group)
        expected = had_quant_reference(x, *settings, had_k, container8, sum_group)
        q, scale, sums = (
            t.cpu() for t in kernels.had_quant(on_device[0], *settings, on_device[1], container8, sum_group)
        )
        codes, wanted = ((unpack_int4(t) if t.dtype == torch.uint8 else t).int() for t in (q, expected[0]))
        assert q.dtype == expected[0].dtype and scale.shape == expected[1].shape and sums.shape == expected[2].shape
        assert torch.equal(sums, codes.reshape(rows, sums.shape[1], -1).sum(-1, dtype=torch.int32))
        if rotate:
            assert int((codes - wanted).abs().max()) <= 1 and float((codes != wanted).double().mean()) < 1e-3
            torch.testing.assert_close(scale, expected[1], rtol=2e-6, atol=0)
        else:
            assert torch.equal(codes, wanted) and torch.equal(scale, expected[1])


def check_special_rows(kernels: Kernels, device: str) -> None:
    """NaN, Inf, zeros, subnormal maxima, ties, -8: bit for bit, row by row."""
    x = torch.randn(8, 128, generator=draw(0))
    x[1, 5], x[2, 7], x[3], x[4] = math.nan, -math.inf, 0, x[4] * 1e-42
    x[5] = torch.tensor([7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7]).repeat(16)
    x[6] = torch.tensor([-10.0, 9.9, 3.3, -4.95]).repeat(32)
    x[7] *= 1e37
    for clip in (1.0, 0.5):
        for group in (0, 32):
            arguments = (4, 0, False, clip, group, None, True, 0)
            expected = had_quant_reference(x, *arguments)
            got = kernels.had_quant(x.to(device), *arguments)
            for ours, wanted in zip(got, expected, strict=True):
                torch.testing.assert_close(ours.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    w_q, scale, _ = make_weight(16, 128, 0, False, seed=1)
    q, a_scale, _ = kernels.had_quant(x.to(device), 8, 0, True, 1.0, 0, None, False, 0)
    ours = packed.prepack(kernels.library, w_q.to(device), scale.to(device), None, 0, "cuda_mma")
    out = kernels.w4a8(q, a_scale, None, *ours, 16, 0, None, torch.float32).cpu()
    assert (
        out[1].isnan().all() and out[2].isnan().all() and (out[3] == 0).all() and out[[0, 4, 5, 6, 7]].isfinite().all()
    )


def on(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
