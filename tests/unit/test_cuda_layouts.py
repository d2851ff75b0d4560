"""The layout of the CUDA kernels: bijections, bank conflicts, bit tricks; fragments in the words of the PTX ISA."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import ROOT, has_compiler
from numpy.typing import NDArray

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no g++ to compile the maps for the host")
LANES = np.arange(32)
GROUP, THREAD = LANES // 4, LANES % 4  # "groupID" and "threadID_in_group" of the PTX ISA


def run(source: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    program = folder / "program"
    here = Path(__file__).with_name(source)
    command = ["g++", "-std=c++17", "-O1", f"-I{ROOT}/csrc/cuda", *flags, str(here), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


@needs_compiler
def test_maps_are_bijections_and_tricks_are_exact(tmp_path: Path) -> None:
    done = run("cuda_layouts.cpp", tmp_path, "-Wall", "-Wextra", "-Werror")
    assert done.returncode == 0, done.stdout[:2000]


@pytest.mark.slow
@needs_compiler
def test_fragments_are_those_of_nvidias_headers(tmp_path: Path) -> None:
    """An independent source for the lane maps that the emulation of the kernels rests on."""
    spec = importlib.util.find_spec("cutlass_library")
    include = Path(spec.origin).parent / "source/include" if spec and spec.origin else None
    homes = [os.environ.get("CUDA_HOME"), shutil.which("nvcc") and str(Path(shutil.which("nvcc") or "").parents[1])]
    roots = [Path(home) / "include" for home in [*homes, "/usr/local/cuda"] if home]
    toolkit = next((root for root in roots if (root / "cuda_fp16.h").is_file()), None)
    if include is None or not include.is_dir() or toolkit is None:
        pytest.skip("needs the headers of nvidia-cutlass (pip install --no-deps nvidia-cutlass==4.2.0.0) and of CUDA")
    done = run("cuda_cute.cpp", tmp_path, "-w", f"-I{include}", f"-I{toolkit}", f"-I{toolkit}/cccl")
    assert done.returncode == 0 and done.stdout.count("ok") == 15, done.stdout


def prepacked(q: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The layout by its description: [rows / 16][columns / 64][lane][16 bytes], canonical int4 nibbles."""
    rows, columns = q.shape
    out = np.zeros((rows // 16, columns // 64, 32, 16), np.uint8)
    for word in range(4):
        for i in range(4):
            row = GROUP + 8 * (word & 1)
            low = 32 * (word >> 1) + 4 * THREAD + i
            for r in range(rows // 16):
                for c in range(columns // 64):
                    tile = q[16 * r : 16 * r + 16, 64 * c : 64 * c + 64]
                    out[r, c, :, 4 * word + i] = (tile[row, low] & 15) | (tile[row, low + 16] & 15) << 4
    return out


def signed_bytes(words: NDArray[np.uint32]) -> NDArray[np.int64]:
    return words.astype("<u4")[..., None].view(np.int8).astype(np.int64)


def mma_m16n8k32(a: list[NDArray[np.uint32]], b: list[NDArray[np.uint32]]) -> NDArray[np.int64]:
    """C[16, 8] of the s8 instruction, gathered from registers as the PTX ISA words it."""
    A, B = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    for register, words in enumerate(a):
        row = GROUP if register in (0, 2) else GROUP + 8  # "row = groupID for ai where 0 <= i < 4 || 8 <= i < 12"
        for i in range(4):
            column = THREAD * 4 + i + (16 if register >= 2 else 0)
            A[row, column] = signed_bytes(words)[:, i]
    for register, words in enumerate(b):
        for i in range(4):
            B[THREAD * 4 + i + 16 * register, GROUP] = signed_bytes(words)[:, i]
    return A @ B


def test_prepacked_weights_are_the_operands_of_mma() -> None:
    """Weights through the layout and the x16 unpacking, activations through ldmatrix: 16 times the integer product."""
    rng = np.random.default_rng(0)
    q, activations = rng.integers(-8, 8, (16, 128)), rng.integers(-128, 128, (8, 128))
    packed, total = prepacked(q), np.zeros((16, 8), np.int64)
    for tile in range(2):
        words = np.ascontiguousarray(packed[0, tile]).view("<u4")  # [lane, 4]
        rows = activations[:, 64 * tile : 64 * tile + 64].astype(np.int8)
        # ldmatrix: lane 4 g + t of 8 x 8 matrix j receives bytes 4 t .. 4 t + 3 of its row g.
        x = [rows[GROUP[:, None], 16 * j + 4 * THREAD[:, None] + np.arange(4)].view("<u4")[:, 0] for j in range(4)]
        mask = np.uint32(0xF0F0F0F0)
        for half in range(2):
            upper, lower = words[:, 2 * half], words[:, 2 * half + 1]
            a = [(upper << np.uint32(4)) & mask, (lower << np.uint32(4)) & mask, upper & mask, lower & mask]
            total += mma_m16n8k32(a, x[2 * half : 2 * half + 2])
    assert np.array_equal(total, 16 * (q @ activations.T))


def test_prepacked_weights_are_the_operands_of_wgmma() -> None:
    """A warpgroup's A registers are four stacked tiles; B is read from swizzled shared memory through a descriptor."""
    rng = np.random.default_rng(1)
    q, activations = rng.integers(-8, 8, (64, 128)), rng.integers(-128, 128, (16, 128))
    packed, total = prepacked(q), np.zeros((64, 16), np.int64)
    memory = np.zeros(16 * 128, np.int8)  # rows of 128 bytes, 16-byte chunks permuted by the row within its 8
    for row in range(16):
        for byte in range(128):
            memory[row * 128 + ((byte // 16) ^ (row % 8)) * 16 + byte % 16] = activations[row, byte]
    for step in range(4):
        start = 32 * step  # what the descriptor's address advances by
        B = np.zeros((16, 32), np.int64)
        for row in range(16):
            for k in range(32):
                linear = start + row // 8 * 1024 + row % 8 * 128 + k
                B[row, k] = memory[linear ^ ((linear >> 7 & 7) << 4)]
        for warp in range(4):
            words = np.ascontiguousarray(packed[warp, step // 2]).view("<u4")
            upper, lower = words[:, 2 * (step % 2)], words[:, 2 * (step % 2) + 1]
            mask, A = np.uint32(0xF0F0F0F0), np.zeros((16, 32), np.int64)
            registers = [(upper << np.uint32(4)) & mask, (lower << np.uint32(4)) & mask, upper & mask, lower & mask]
            for register, values in enumerate(registers):
                for i in range(4):
                    column = 4 * THREAD + i + 16 * (register // 2)
                    A[GROUP + 8 * (register % 2), column] = signed_bytes(values)[:, i]
            total[16 * warp : 16 * warp + 16] += A @ B.T
    assert np.array_equal(total, 16 * (q @ activations.T))
