"""Fuzzes the CPU core: ``python tests/core_fuzz.py SECONDS``, or ``make fuzz``, goes on where it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from core_alone import ROOT, link_alone

from qexp.kernels import build

INSTRUMENTED = ["-O1", "-fno-sanitize-recover=all", "-Wno-unknown-warning-option"]
# What a program is linked with decides whether it holds libFuzzer's main.
LINKED = "-fsanitize=fuzzer,address,undefined"
OPTIONS = ["-max_len=512", "-len_control=0", "-print_final_stats=1"]


def core() -> list[Path]:
    """Return what this machine compiles of csrc/cpu, without torch's part and without what only measures."""
    names = [path.name for path in build.sources() if not path.name.startswith(("binding", "floors"))]
    return [ROOT / "cpu" / name for name in names]


def clang() -> str | None:
    """Return the name of a clang++, if there is one."""
    names = ("clang++", *(f"clang++-{version}" for version in range(22, 12, -1)))
    return next((name for name in names if shutil.which(name)), None)


def flags(path: Path) -> list[str]:
    """Return the sanitizers of one source; UBSan has nothing to say about the intrinsics of the vector tiers."""
    vectors = path.stem.rpartition("_")[2] in build.X86
    return [*INSTRUMENTED, "-fsanitize=fuzzer-no-link,address" + ("" if vectors else ",undefined")]


def has_runtime(compiler: str, folder: Path) -> bool:
    """Return whether the compiler comes with libFuzzer, which Debian packs apart."""
    source = folder / "nothing.cpp"
    source.write_text('extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }')
    command = [compiler, LINKED, str(source), "-o", str(folder / "nothing")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fuzzer(folder: Path, compiler: str) -> Path:
    """Build the fuzzer in a folder."""
    tests = [path for path in sorted((ROOT / "tests").glob("fuzz*.cpp")) if path.stem != "fuzz_main"]
    link_alone(folder / "fuzzer", [compiler], [*core(), *tests], flags, [LINKED])
    return folder / "fuzzer"


def main(seconds: str) -> None:
    """Build, then become the fuzzer; inputs that reach something new stay in outputs/fuzz, crashes too."""
    compiler = clang()
    if compiler is None:
        sys.exit("no clang++ on this machine; Debian: apt-get install clang libclang-rt-14-dev")
    kept = ROOT.parent / "outputs" / "fuzz"
    (kept / "corpus").mkdir(parents=True, exist_ok=True)
    program = fuzzer(Path(tempfile.mkdtemp(prefix="qexp-fuzz-")), compiler)
    options = [f"-max_total_time={seconds}", *OPTIONS, f"-artifact_prefix={kept}/"]
    os.execv(program, [str(program), *options, str(kept / "corpus")])


if __name__ == "__main__":
    main(sys.argv[1])
