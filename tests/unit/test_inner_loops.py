"""What only a disassembler can show: the loops that compute keep their vectors in registers."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from core_alone import ROOT

from qexp.kernels import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="disassembles x86 code"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump (binutils) on this machine"),
]

COMPUTES = re.compile(r"\tv(add|sub|mul|fn?m(add|sub)\d+|dpbf16)ps .*%[yz]mm")

# Source, loops it must have at least (else the check looks at nothing), vectors that one loop may store on the stack.
# Not none: gcc 12 moves one or two of the 16 rows of a strided pass out of the way in AVX-512, and in AVX2 sends some
# of a block's vectors, even bf16 it has just loaded, through memory. An array that lives on the stack has 8 or more.
ROWS = [
    ("hadamard_avx512bw", 50, 2),
    ("hadamard_avx2", 50, 4),
    ("codes_avx512bw", 12, 0),
    ("codes_avx2", 12, 0),
    ("gram_avx512bf16", 1, 0),
    ("gram_avx512bw", 1, 0),
    ("gram_avx2", 1, 0),
    ("sweep_avx512bw", 1, 0),
    ("sweep_avx2", 1, 0),
]


@pytest.mark.parametrize("tier", ["avxvnni", "avx512vnni"])
def test_products_stay_in_registers(tier: str, tmp_path: Path) -> None:
    """No loop that multiplies touches the stack, and the AVX-VNNI tier uses the VEX form alone."""
    listing = disassembled(f"gemm_{tier}", tmp_path)
    bodies = [body for function in functions(listing) for body in innermost_loops(function)]
    loops = [body for body in bodies if any("vpdpbusd" in line for line in body)]
    assert len(loops) >= 10  # one for each count of rows, direct and panel
    assert [body for body in loops if any("rsp" in line or "rbp" in line for line in body)] == []
    if tier == "avxvnni":
        assert "zmm" not in listing and "{vex} vpdpbusd" in listing


@pytest.mark.parametrize(("name", "least", "most"), ROWS)
def test_rows_and_sums_stay_in_registers(name: str, least: int, most: int, tmp_path: Path) -> None:
    """Whole vectors, in loops that add or multiply: counters and pointers may lie on the stack, they cost little."""
    spills = []
    for function in functions(disassembled(name, tmp_path)):
        stack = r"\(%(rsp|rbp)" if any(re.search(r"mov +%rsp,%rbp", line) for line in function) else r"\(%rsp"
        store = re.compile(rf"%{'zmm' if '512' in name else 'ymm'}\d+,[-0-9a-fx]*{stack}")
        loops = [body for body in innermost_loops(function) if any(map(COMPUTES.search, body))]
        spills += [[line for line in body if store.search(line)] for body in loops]
    assert len(spills) >= least
    assert [lines for lines in spills if len(lines) > most] == []


def disassembled(name: str, folder: Path) -> str:
    source, target = ROOT / "cpu" / f"{name}.cpp", folder / "tile.o"
    subprocess.run([*build.compiler(), *build.flags(source), "-c", source, "-o", target], check=True)
    command = ["objdump", "-d", "--no-show-raw-insn", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(listing: str) -> Iterator[list[str]]:
    """Yield the instructions of each function."""
    for function in listing.split("\n\n"):
        yield [line for line in function.splitlines() if line.startswith(" ")]


def innermost_loops(lines: list[str]) -> Iterator[list[str]]:
    """Yield the lines between each backward jump and its target that contain no other such stretch."""
    at = {line.split(":")[0].strip(): i for i, line in enumerate(lines)}
    jumps = [(line.split()[-2], i) for i, line in enumerate(lines) if "\tj" in line and "<" in line]
    spans = [(at[to], i) for to, i in jumps if to in at and at[to] <= i]
    for first, last in spans:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            yield lines[first : last + 1]
