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


def run_alone(
    folder: Path,
    program: str,
    core: Sequence[Path],
    mode: str,
    extra: Callable[[Path], list[str]] | None = None,
    words: Sequence[str] = (),
) -> None:
    """Compile ``core`` and csrc/tests/``program``*.cpp by a mode of SANITIZERS, link and run; fail with its output.

    ``extra`` gives the flags of a source in place of the mode's.
    """
    objects = []
    for path in [*core, *sorted((ROOT / "tests").glob(f"{program}_*.cpp"))]:
        objects.append(folder / f"{path.stem}.o")
        flags = [*build.flags(path), *(extra(path) if extra else SANITIZERS[mode]), "-g1", f"-I{ROOT / 'cpu'}"]
        subprocess.run([*build.compiler(), *flags, "-c", path, "-o", objects[-1]], check=True)
    linked = folder / program
    subprocess.run([*build.compiler(), *SANITIZERS[mode], *objects, "-pthread", "-o", linked], check=True)
    done = subprocess.run([linked, *words], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout
