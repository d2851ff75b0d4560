"""Builds a test program of csrc/tests with parts of csrc/cpu, without torch, and runs it to its end."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from qexp.kernels import build

ROOT = Path(__file__).resolve().parents[1] / "csrc"
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"],
    "thread": ["-fsanitize=thread", "-O1"],
}
UNCHECKED = ["-O1", "-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"]


def address(path: Path) -> list[str]:
    """Return the sanitizers of one source; the vector tiers, pure intrinsics, would take minutes with UBSan."""
    return UNCHECKED if path.stem.rpartition("_")[2] in build.X86 else SANITIZERS["address"]


def link_alone(
    target: Path, compiler: Sequence[str], sources: Sequence[Path], flags: Callable[[Path], list[str]], link: list[str]
) -> None:
    """Compile ``sources`` beside ``target``, with the flags of the library and then those of ``flags``, and link."""
    objects = []
    for path in sources:
        objects.append(target.parent / f"{path.stem}.o")
        words = [*build.flags(path), *flags(path), "-g1", f"-I{ROOT / 'cpu'}"]
        subprocess.run([*compiler, *words, "-c", path, "-o", objects[-1]], check=True)
    subprocess.run([*compiler, *link, *objects, "-pthread", "-o", target], check=True)


def run_alone(
    folder: Path,
    program: str,
    core: Sequence[Path],
    mode: str,
    extra: Callable[[Path], list[str]] | None = None,
    words: Sequence[str] = (),
) -> str:
    """Compile ``core`` and csrc/tests/``program``*.cpp by a mode of SANITIZERS, link and run; return what it printed.

    ``extra`` gives the flags of a source in place of the mode's. Fails with the program's output if it does.
    """
    sources = [*core, *sorted((ROOT / "tests").glob(f"{program}*.cpp"))]
    linked = folder / program
    link_alone(linked, build.compiler(), sources, extra or (lambda _: SANITIZERS[mode]), SANITIZERS[mode])
    done = subprocess.run([linked, *words], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout
    return done.stdout
