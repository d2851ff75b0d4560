"""The CUDA kernels compile for every architecture, and their machine code is what was meant (kernels.md section 8).

Needs nvcc, cuobjdump and nvdisasm (pip packages nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm), no GPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_cases import ROOT

from qexp.kernels import build, cuda_build

ARCHS = ("80", "86", "89", "90a")
# Registers a thread, by which as many blocks fit on a multiprocessor as the kernels were designed for.
CAPS = {"W4Tile": 255, "W4Decode": 255, "W4Wgmma": 168, "RotationKernel": 64}
CHANNEL_TILE_CAP = 128  # two blocks of 256 threads


@functools.cache
def tool(name: str) -> str | None:
    """Return where cuobjdump, or the nvdisasm that it calls, is found: the PATH, CUDA's folder, or its pip package."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found is None:
        try:
            files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
        except importlib.metadata.PackageNotFoundError:
            return None
        found = next((str(file.locate()) for file in files if file.name == name), None)
    return found


def missing() -> str:
    try:
        cuda_build.nvcc()
    except build.BuildError as error:
        return str(error)
    lacking = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return " and ".join(f"no {name} (pip install nvidia-cuda-{name})" for name in lacking)


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.fixture(scope="module")
def library() -> Path:
    return cuda_build.compiled(ARCHS, build.cache_folder())


def functions(library: Path, arch: str, *options: str) -> dict[str, str]:
    """Return what cuobjdump prints of each kernel of one architecture, by its readable name."""
    command = [tool("cuobjdump") or "", *options, "-arch", f"sm_{arch}", str(library)]
    beside = {**os.environ, "NVDISASM_PATH": str(Path(tool("nvdisasm") or "").parent)}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=beside).stdout
    parts = re.split(r"\n\s*Function\s*:?\s*", text)[1:]
    named = {part.splitlines()[0].strip().rstrip(":"): part for part in parts}
    readable = subprocess.run(["c++filt", *named], capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(readable, named.values(), strict=True))


def test_the_library_names_its_architectures(library: Path) -> None:
    from qexp.kernels.cuda_abi import Library

    assert Library(library).archs == list(ARCHS)


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_uses_local_memory(library: Path, arch: str) -> None:
    kernels = functions(library, arch, "-sass")
    assert sum("W4" in name for name in kernels) > 30
    spilling = [name for name, code in kernels.items() if re.search(r"\b(LDL|STL)\b", code)]
    assert not spilling, spilling


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_stay_below_the_caps(library: Path, arch: str) -> None:
    for name, usage in functions(library, arch, "-res-usage").items():
        registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
        cap = next((cap for kernel, cap in CAPS.items() if kernel in name), 255)
        if "W4Tile" in name and "(qexp::cuda::Scales)0" in name:
            cap = CHANNEL_TILE_CAP
        assert registers <= cap, f"{name}: {registers} registers on sm_{arch}, cap {cap}"
        assert "STACK:0" in usage, f"{name} has a stack frame on sm_{arch}"


@pytest.mark.parametrize("arch", ARCHS)
def test_products_run_on_tensor_cores(library: Path, arch: str) -> None:
    kernels = functions(library, arch, "-sass")
    for name, code in kernels.items():
        native_s4 = "W4Tile" in name and "true>" in name.split("::Args")[0].split("(qexp::cuda::W4Tile")[0]
        if native_s4:
            assert ("IMMA.16864.S4.S4" in code) == (arch != "90a"), name
        elif "W4Tile" in name or "OperandS8" in name:
            assert "IMMA.16832.S8.S8" in code, name
        elif "Operand16" in name or "RotationKernel<1" in name or "RotationKernel<2" in name:
            assert "HMMA.16816.F32" in code, name
        elif "W4Wgmma" in name:
            assert "IGMMA.64x" in code, name
    assert any("W4Wgmma" in name for name in kernels) == (arch == "90a")


def test_hopper_never_emulates_four_bits(library: Path) -> None:
    """There, mma.sync with s4 operands becomes a routine of 140 instructions: no call, no S4 may be left."""
    for name, code in functions(library, "90a", "-sass").items():
        assert ".S4" not in code, name
        if "W4" in name:
            assert not re.search(r"\bCALL\b", code), name


@pytest.mark.parametrize("tokens", [128, 256])
def test_wgmma_is_issued_back_to_back(library: Path, tokens: int) -> None:
    """Four products a stage, nothing but addresses between them, from two sets of registers, unpacked beside."""
    kernels = functions(library, "90a", "-sass")
    code = next(c for n, c in kernels.items() if f"W4Wgmma<{tokens}, (qexp::cuda::WgmmaScales)0>" in n)
    lines = [line for line in code.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    issued = [i for i, line in enumerate(lines) if "IGMMA" in line]
    assert len(issued) == 12  # two stages unrolled, and the odd last one
    assert all(later - first <= 16 for first, later in itertools.pairwise(issued[:4]))
    loop = "\n".join(lines[issued[0] : issued[7] + 1])
    assert "LOP3" in loop and "LDS.128" in loop and "I2F" not in loop and "F2I" not in loop
    operands = [re.search(r"IGMMA\S+ R\d+, (R\d+)", lines[i]).group(1) for i in issued[:8]]  # type: ignore[union-attr]
    assert len(set(operands)) == 8, operands


def test_decoding_weights_takes_few_instructions(library: Path) -> None:
    """Three integer instructions for eight weights (x16): no byte shuffles and no conversions in the tile loop."""
    kernels = functions(library, "80", "-sass")
    code = next(c for n, c in kernels.items() if "W4Tile<128, (qexp::cuda::Scales)0, false>" in n)
    between = code[code.index("IMMA") : code.rindex("IMMA")]
    assert "PRMT" not in between and "I2F" not in between and "LDSM.16.M88.4" in between


def test_loads_are_wide(library: Path) -> None:
    for arch in ARCHS:
        for name, code in functions(library, arch, "-sass").items():
            if "W4Decode" in name:
                assert re.search(r"LDG\.E\.\S*128", code), name
            if "W4Tile" in name:
                assert "LDGSTS.E.BYPASS.128" in code or re.search(r"LDGSTS\.E\.\S*128", code), name


def test_the_sources_include_no_torch_header() -> None:
    for path in (ROOT / "csrc/cuda").iterdir():
        assert not re.search(r"#include <(torch|ATen|c10)", path.read_text()), path
