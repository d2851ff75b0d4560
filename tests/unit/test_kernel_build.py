"""The builder: flags by file name, a cache that sees every change, two processes at once, no compiler at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from int4_cases import TIERS

from qexp.kernels import build

ROOT = Path(__file__).resolve().parents[2]
COMPILER = pytest.mark.skipif(not (shutil.which("g++") or os.environ.get("CXX")), reason="no C++ compiler here")

SOURCE = """
#include "answer.h"
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cpp").write_text(SOURCE)
    return [folder / "answer.cpp"]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_flags_follow_the_name() -> None:
    assert "-mavx512vnni" in build.flags(Path("gemm_avx512vnni.cpp"))
    assert not any("512" in flag for flag in build.flags(Path("gemm_avx2.cpp")))
    assert not any(
        flag.startswith("-m") for name in ("gemm", "gemm_scalar") for flag in build.flags(Path(f"{name}.cpp"))
    )
    binding = build.flags(Path("binding_gemm.cpp"))
    assert "-std=c++20" in binding and any(flag.endswith("torch/include") for flag in binding)
    assert not any(
        "fast-math" in flag or flag in ("-Ofast", "-march=native") for tier in build.X86.values() for flag in tier
    )


def test_the_core_knows_no_torch() -> None:
    files = [path for path in (ROOT / "csrc" / "cpu").iterdir() if not path.name.startswith("binding")]
    assert len(files) > 20
    assert [path.name for path in files if "ATen" in path.read_text() or "torch/" in path.read_text()] == []


@COMPILER
def test_a_library_is_built_once_and_again_when_a_header_changes(sources: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = build.build(sources, cache)
    stamp = first.stat().st_mtime_ns
    assert build.build(sources, cache) == first and first.stat().st_mtime_ns == stamp
    (sources[0].parent / "answer.h").write_text("#define ANSWER 43\n")
    second = build.build(sources, cache)
    assert second != first and first.exists()
    assert [path for path in cache.iterdir() if path.is_dir() and path.name != "objects"] == [], "scratch is left"


@COMPILER
def test_builders_at_once_agree(sources: list[Path], tmp_path: Path) -> None:
    found: list[Path] = []
    crew = [threading.Thread(target=lambda: found.append(build.build(sources, tmp_path / "c"))) for _ in range(4)]
    for one in crew:
        one.start()
    for one in crew:
        one.join()
    assert len(found) == 4 and len(set(found)) == 1 and found[0].exists()


@COMPILER
def test_a_failed_compilation_says_why(sources: list[Path], tmp_path: Path) -> None:
    sources[0].write_text("int f() { return nothing_here; }")
    with pytest.raises(build.BuildError, match="nothing_here"):
        build.build(sources, tmp_path / "c")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler-7")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found \(tried no-such-compiler-7; set CXX\)"):
        build.compiler()


USE = """
import torch
from qexp.kernels import build, int4, matmul, ops
w = matmul.W4(*int4.prepack_w4(torch.full((16, 8), 17, dtype=torch.uint8), torch.ones(16), None, 0), 16, 0)
a = torch.ones(2, 16, dtype=torch.int8)
print(matmul.w4a8(a, torch.ones(2), None, w, None, torch.float32).sum().item(), build.info())
"""


def test_without_a_compiler_the_references_compute(tmp_path: Path) -> None:
    done = run(USE, CXX="no-such-compiler-7", QEXP_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("512.0 ") and "'compiled': False" in done.stdout and "no C++ compiler" in done.stdout
    assert done.stderr.count("CPU kernels are not compiled") == 1, "warned once"


@pytest.mark.skipif(not build.load(), reason="no compiled kernels here")
def test_an_unknown_tier_is_refused() -> None:
    done = run(USE, QEXP_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert "QEXP_CPU_ISA=avx1024: this CPU offers scalar" in done.stderr
    with pytest.raises(ValueError, match="this CPU offers"):
        build.force_isa("avx1024")


@pytest.mark.skipif(not build.load(), reason="no compiled kernels here")
def test_the_environment_chooses_the_tier() -> None:
    done = run(USE, QEXP_CPU_ISA="scalar")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("512.0 ") and "'isa': 'scalar'" in done.stdout
    assert build.isa() in TIERS
