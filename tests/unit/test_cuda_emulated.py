"""The CUDA kernels' own source, run lane by lane on the host: index arithmetic, barriers and copies without a GPU.

csrc/cuda/emulator.h says what this shows and what it cannot show (timing, memory order, the chip itself).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_cases as cases
import pytest
import torch

from qexp.kernels.cuda_ops import Kernels

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not cases.has_compiler(), reason="no g++ to compile the emulation")]
KERNELS = ("tile", "decode", "wgmma")


@pytest.fixture(params=["forwards", "backwards"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The emulated library; lanes run in both orders, so that what depends on their order shows."""
    monkeypatch.setenv("QEXP_EMULATOR_ORDER", str(int(request.param == "backwards")))
    return Kernels(cases.emulated().library, 90)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 2), (7, 15, 31 * 2), (33, 129, 352), (129, 17, 1000), (260, 130, 200)]
)
def test_integers_are_exact(kernels: Kernels, kernel: str, m: int, n: int, k: int) -> None:
    kernels.forced = kernel
    cases.check_integers(kernels, "cpu", m, n, k)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_largest_sums_fit(kernels: Kernels, kernel: str) -> None:
    kernels.forced = kernel
    cases.check_integers(kernels, "cpu", 2, 3, 28672, extreme=True)


def test_inputs_that_could_overflow_are_refused(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match=r"K: got 131072, expected less than 131072"):
        a = torch.zeros(1, 131072, dtype=torch.int8)
        w_s = torch.zeros(1, 1, 128)
        kernels.w4a8(a, torch.ones(1), None, torch.zeros(64, dtype=torch.uint8), w_s, None, 1, 0, None, torch.float32)


@pytest.mark.parametrize("case", cases.PRODUCTS, ids=str)
def test_products_match_the_reference(kernels: Kernels, case: tuple[int, int, int, int, bool]) -> None:
    for dtype in cases.BOUND:
        cases.check_product(kernels, "cpu", case, dtype)
        cases.check_float_product(kernels, "cpu", case, dtype)
    kernels.capability = 80  # the native 4-bit path
    cases.check_product(kernels, "cpu", case, torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case", [(33, 129, 384, 128, True), (140, 72, 256, 0, True), (70, 130, 384, 192, False)], ids=str
)
def test_every_kernel_computes_the_same(kernels: Kernels, kernel: str, case: tuple[int, int, int, int, bool]) -> None:
    kernels.forced = kernel
    for dtype in cases.BOUND:
        cases.check_product(kernels, "cpu", case, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", [3, 70, 200])
def test_two_level_groups(kernels: Kernels, kernel: str, m: int) -> None:
    kernels.forced = kernel
    cases.check_two_level(kernels, "cpu", m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", cases.ROTATIONS, ids=str)
def test_rotations_match_the_reference(kernels: Kernels, case: tuple[int, ...], dtype: torch.dtype) -> None:
    cases.check_rotation(kernels, "cpu", case, dtype)  # type: ignore[arg-type]


def test_special_rows(kernels: Kernels) -> None:
    cases.check_special_rows(kernels, "cpu")


def test_no_access_outside_under_address_sanitizer(tmp_path: Path) -> None:
    """What compute-sanitizer's memcheck would say of global and shared memory, by the host's sanitizer."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(runtime.stdout.strip()).is_file():
        pytest.skip("no libasan")
    library = tmp_path / "emulated.so"
    sources = sorted((cases.ROOT / "csrc/cuda").glob("*.cu"))
    cases.compile_emulated(sources, library, ["-O1", "-g", "-fsanitize=address", "-fno-sanitize-recover"])
    script = Path(__file__).with_name("cuda_sanitized.py")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(cases.ROOT), str(cases.ROOT / "tests/unit")]),
    }
    done = subprocess.run(
        [sys.executable, str(script), str(library)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "checked" in done.stdout, done.stdout[-500:] + done.stderr[-3000:]
