"""The CUDA operators on a device: the same cases as their emulation, and what only a device can show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cuda_cases as cases
import pytest
import torch
from torch import Tensor

from qexp.kernels import cuda, int4, matmul
from qexp.kernels.cuda_ops import Kernels
from qexp.kernels.had_quant import had_quant, hadamard

pytestmark = pytest.mark.gpu


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    assert cuda.load(), cuda.reason()
    found = cuda._kernels(torch.cuda.current_device())
    yield found
    found.forced = ""


def names(kernels: Kernels) -> list[str]:
    return ["tile", "decode", *(["wgmma"] if kernels.capability == 90 else [])]


@pytest.mark.parametrize("kernel", ["tile", "decode", "wgmma"])
@pytest.mark.parametrize("k", [2, 62, 352, 1000, 4096])
def test_integers_are_exact(kernels: Kernels, kernel: str, k: int) -> None:
    if kernel not in names(kernels):
        pytest.skip(f"no {kernel} on compute capability {kernels.capability / 10}")
    kernels.forced = kernel
    for m in (1, 2, 7, 8, 15, 16, 17, 31, 33, 127, 129, 300):
        for n in (1, 8, 17, 127, 129, 1000):
            cases.check_integers(kernels, "cuda", m, n, k)


@pytest.mark.parametrize("k", [28672, 131064])
def test_the_largest_sums_fit(kernels: Kernels, k: int) -> None:
    for kernel in names(kernels):
        kernels.forced = kernel
        cases.check_integers(kernels, "cuda", 70, 40, k, extreme=True)


@pytest.mark.parametrize("case", cases.PRODUCTS, ids=str)
def test_products_match_the_reference(kernels: Kernels, case: tuple[int, int, int, int, bool]) -> None:
    for dtype in cases.BOUND:
        cases.check_product(kernels, "cuda", case, dtype)
        cases.check_float_product(kernels, "cuda", case, dtype)


@pytest.mark.parametrize(
    "case", [(33, 129, 384, 128, True), (140, 72, 256, 0, True), (70, 130, 384, 192, False)], ids=str
)
def test_every_kernel_computes_the_same(kernels: Kernels, case: tuple[int, int, int, int, bool]) -> None:
    for kernel in names(kernels):
        kernels.forced = kernel
        for dtype in cases.BOUND:
            cases.check_product(kernels, "cuda", case, dtype)


@pytest.mark.parametrize("m", [3, 70, 200])
def test_two_level_groups(kernels: Kernels, m: int) -> None:
    for kernel in names(kernels):
        kernels.forced = kernel
        cases.check_two_level(kernels, "cuda", m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases.ROTATIONS, ids=str)
def test_rotations_match_the_reference(kernels: Kernels, case: tuple[int, ...], dtype: torch.dtype) -> None:
    cases.check_rotation(kernels, "cuda", case, dtype)  # type: ignore[arg-type]


def test_special_rows(kernels: Kernels) -> None:
    cases.check_special_rows(kernels, "cuda")


def test_the_emulation_and_the_device_agree_bit_for_bit(kernels: Kernels) -> None:
    """Where no order of additions is free: quantization without rotation, and integer products with channel scales."""
    if not cases.has_compiler():
        pytest.skip("no g++ to compile the emulation")
    host = Kernels(cases.emulated().library, 90)
    x = torch.randn(9, 512, generator=cases.draw(0)).bfloat16()
    arguments = (4, 0, False, 0.9, 64, None, False, 64)
    for ours, theirs in zip(kernels.had_quant(x.cuda(), *arguments), host.had_quant(x, *arguments), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def a_layer(m: int, n: int = 512, k: int = 1024, group: int = 128) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
    w_q, scale, _ = cases.make_weight(n, k, group, False, seed=0)
    weight = int4.prepack_w4(w_q.cuda(), scale.cuda(), None, group)
    x = torch.randn(m, k, generator=cases.draw(m)).bfloat16().cuda()
    return (x,), (*weight, n, group)


@pytest.mark.parametrize("m", [1, 16, 100, 300])
def test_operators_through_torch_graphs_and_streams(m: int) -> None:
    """The dispatcher finds the kernels; a graph replays them; a side stream gives the same bits; so do two runs."""
    (x,), weight = a_layer(m)

    def layer(x: Tensor) -> Tensor:
        q, scale, sums = had_quant(x, 8, sum_group=128)
        return matmul.w4a8(q, scale, sums, matmul.W4(*weight), None, torch.bfloat16)  # type: ignore[arg-type]

    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = layer(x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(aside, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    x.mul_(-1)
    graph.replay()
    assert torch.equal(captured, layer(x))
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_opcheck_and_gradient() -> None:
    (x,), weight = a_layer(5)
    q, scale, sums = had_quant(x, 8, sum_group=128)
    torch.library.opcheck(torch.ops.qexp.w4a8, (q, scale, sums, *weight, None, torch.bfloat16))
    torch.library.opcheck(torch.ops.qexp.w4a16, (x, *weight, None))
    y = torch.randn(3, 256, device="cuda", dtype=torch.float64).float().requires_grad_()
    hadamard(y).sum().backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, hadamard(torch.ones_like(y).detach()), rtol=1e-5, atol=1e-5)


def test_other_layouts_and_wrong_arguments() -> None:
    """A reference layout on the device still computes; what does not fit is refused by name."""
    w_q, scale, _ = cases.make_weight(40, 128, 8, False, seed=0)
    weight = int4.prepack_w4(w_q.cuda(), scale.cuda(), None, 8)  # groups of 8: no kernel, the reference layout
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    expected = matmul.w4a16_reference(x.cpu(), *int4.prepack_w4(w_q, scale, None, 8, "reference"), 40, 8, None)
    assert cases.relative_error(torch.ops.qexp.w4a16(x, *weight, 40, 8, None), expected) < 4e-3
    ours = int4.prepack_w4(w_q.cuda(), scale[:, ::4].contiguous().cuda(), None, 32)
    with pytest.raises(RuntimeError, match="w_p: got"):
        torch.ops.qexp.w4a16(x[:, :64].contiguous(), *ours, 40, 32, None)
    with pytest.raises(RuntimeError, match="group: got 48"):
        torch.ops.qexp.w4a16(x, *ours, 40, 48, None)


@pytest.mark.timeout(900)
def test_native_four_bit_products_by_emulation(kernels: Kernels) -> None:
    """mma.sync s4 is emulated by ptxas on newer chips: slow, but the same results as the hardware of sm_80 to sm_89."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to build the library with QEXP_EMULATED_S4")
    code = (
        "import cuda_cases as c, torch; from qexp.kernels import cuda; assert cuda.load(), cuda.reason();"
        "k = cuda._kernels(0); k.forced = 'tile_s4';"
        "[c.check_product(k, 'cuda', case, torch.float32) for case in c.PRODUCTS if case[3] % 64 == 0]"
    )
    paths = [str(cases.ROOT), str(cases.ROOT / "tests/unit"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "NVCC_APPEND_FLAGS": "-DQEXP_EMULATED_S4", "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("QEXP_CUDA_LIBRARY", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).is_file():
        pytest.skip("no compute-sanitizer")
    paths = [str(cases.ROOT), str(cases.ROOT / "tests/unit"), os.environ.get("PYTHONPATH", "")]
    script = Path(__file__).with_name("cuda_sanitized.py")
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0 and "checked" in done.stdout, done.stdout[-3000:]
