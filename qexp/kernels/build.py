"""Builds csrc/cpu with the system's C++ compiler on first use and loads it into torch.

No build system: every source is one compiler process, one more links. Flags follow the file's name: ``*_avx2.cpp`` is
compiled for AVX2, ``bindings.cpp`` against torch, the rest as plain C++17; which of the tiers runs is decided by the
CPU at run time (csrc/cpu/dispatch.h). The library is <cache>/kernels/<hash>.so, hashed over sources, flags, compiler
and torch, and appears by rename, so that two processes cannot see half a file; objects are kept the same way, so that
an edit recompiles only what it touches. <cache> is $QEXP_CACHE, else ~/.cache/qexp; $QEXP_KERNEL_CACHE, where it is
set, is that folder itself.

Without a compiler, or when it fails, the pure-torch references compute: warned once, the reason is in ``info()``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

# -ffp-contract=off: a*b+c is one rounding only where the source says fma; sums apart, tiers compute the same floats.
BASE = ("-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-DNDEBUG")
X86 = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avxvnni": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    # gcc 12 warns about its own AVX-512 headers (bug 105593)
    "avx512bw": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ),
}
X86["avx512vnni"] = (*X86["avx512bw"], "-mavx512vnni")
X86["avx512bf16"] = (*X86["avx512vnni"], "-mavx512bf16")
SECONDS = 600  # for one compiler process


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why."""


@dataclass(frozen=True)
class Library:
    """A loaded library, or the reason why there is none."""

    path: Path | None
    reason: str


def load() -> bool:
    """Return whether the compiled CPU kernels are in place, building and loading them on the first call.

    Raises: ValueError if QEXP_CPU_ISA names no tier of this CPU.
    """
    return _library().path is not None


def info() -> dict[str, Any]:
    """Return ``compiled``, ``reason`` (why not), ``isa``, ``library`` and ``hash``; raises as :func:`load`."""
    library = _library()
    path = library.path
    return {
        "compiled": path is not None,
        "reason": library.reason,
        "isa": isa() if path else "torch",
        "library": str(path) if path else "",
        "hash": path.stem if path else "",
    }


def isa(path: Path | None = None) -> str:
    """Return the tier that the compiled kernels use; raises ValueError if QEXP_CPU_ISA names none of this CPU."""
    answer: str = _symbol(path or _path(), "qexp_cpu_isa")().decode()
    if answer.startswith("error: "):
        raise ValueError(answer.removeprefix("error: "))
    return answer


def force_isa(name: str | None) -> None:
    """For tests, benchmarks: use this tier from now on, None for the usual one. Raises: ValueError as :func:`isa`."""
    complaint: str = _symbol(_path(), "qexp_force_isa")(name.encode() if name else None).decode()
    if complaint:
        raise ValueError(complaint)


@functools.cache
def _symbol(path: Path, name: str) -> Any:
    """Return a C function of the library that answers a string."""
    function = getattr(ctypes.CDLL(str(path)), name)
    function.restype = ctypes.c_char_p
    return function


def _path() -> Path:
    library = _library()
    if library.path is None:
        raise BuildError(f"no compiled kernels: {library.reason}")
    return library.path


@functools.cache
def _library() -> Library:
    if os.environ.get("QEXP_KERNELS") == "reference":
        return Library(None, "QEXP_KERNELS=reference")
    try:
        path = build(sources(), cache_folder())
        torch.ops.load_library(str(path))
    except (BuildError, OSError) as error:
        log.warning("CPU kernels are not compiled, pure torch computes instead (slower): %s", error)
        return Library(None, str(error))
    isa(path)  # a bad QEXP_CPU_ISA is told now, not by the first kernel
    return Library(path, "")


def cache_folder() -> Path:
    """Return where libraries are kept: $QEXP_KERNEL_CACHE, else kernels/ in the cache of runs (engine.context)."""
    if own := os.environ.get("QEXP_KERNEL_CACHE"):
        return Path(own)
    return Path(os.environ.get("QEXP_CACHE") or Path.home() / ".cache" / "qexp") / "kernels"


def source_folder(part: str) -> Path:
    """Return csrc/``part`` of the checkout or of the installed package; raises BuildError if it is not there."""
    spec = importlib.util.find_spec("qexp.csrc")
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in [*map(Path, roots), Path(__file__).resolve().parents[2] / "csrc"]:
        if (root / part).is_dir():
            return root / part
    raise BuildError(f"the sources csrc/{part} are not installed")


def sources() -> list[Path]:
    """Return what this machine compiles of csrc/cpu: away from x86 only the portable files."""
    found = sorted(path for path in source_folder("cpu").glob("*.cpp") if not path.stem.startswith("binding_"))
    return found if platform.machine() in ("x86_64", "AMD64") else [path for path in found if _tier(path) not in X86]


def compiler() -> list[str]:
    """Return the C++ compiler's command, $CXX or the first of g++, clang++, c++; raises BuildError without one."""
    words = shlex.split(os.environ.get("CXX", ""))
    for command in [words] if words else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found (tried {' '.join(words) or 'g++, clang++, c++'}; set CXX)")


def flags(source: Path) -> list[str]:
    """Return the compiler flags of one source, decided by its name."""
    if source.stem.startswith("binding"):  # torch's headers want C++20 and are full of warnings
        root = Path(torch.__file__).parent / "include"
        abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
        return ["-std=c++20", *BASE, "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-I{root}"]
    return ["-std=c++17", *BASE, *X86.get(_tier(source), ())]


def build(files: Sequence[Path], folder: Path) -> Path:
    """Compile and link ``files`` into a torch library below ``folder`` unless it is there; raises BuildError."""
    command = compiler()
    identity = f"{_run([*command, '--version'])} {platform.machine()} torch {torch.__version__}"
    jobs = {path: _digest(_text(path), identity, *flags(path)) for path in files}
    target = folder / f"{_digest(identity, *jobs.values())}.so"
    if target.exists():
        return target
    (folder / "objects").mkdir(parents=True, exist_ok=True)
    with _alone(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not target.exists():
            log.info("compiling the CPU kernels (%d files, once) into %s", len(jobs), folder)
            with ThreadPoolExecutor(_processors()) as pool:
                objects = list(
                    pool.map(lambda job: _object(command, job[0], job[1], folder, Path(scratch)), jobs.items())
                )
            torch_lib = Path(torch.__file__).parent / "lib"
            linked = Path(scratch) / target.name
            libraries = [f"-L{torch_lib}", "-ltorch_cpu", "-lc10", "-pthread"]
            _run([*command, "-shared", "-o", str(linked), *map(str, objects), *libraries])
            linked.replace(target)
    return target


def _object(command: Sequence[str], source: Path, digest: str, folder: Path, scratch: Path) -> Path:
    """Compile one source, unless its object is kept from another build."""
    target = folder / "objects" / f"{source.stem}.{digest}.o"
    if not target.exists():
        compiled = scratch / target.name
        _run([*command, *flags(source), "-c", str(source), "-o", str(compiled)])
        compiled.replace(target)
    return target


def _run(command: Sequence[str]) -> str:
    """Run a compiler and return what it printed; raises BuildError with the end of its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _tier(source: Path) -> str:
    """Return what follows the last underscore of the file's name: its tier, if it has one."""
    return source.stem.rpartition("_")[2]


def _text(source: Path) -> str:
    """Return a source together with the headers of csrc/ that it includes, directly or not."""
    seen: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in seen and path.exists():
            seen[path] = path.read_text()
            waiting += [path.parent / name for name in re.findall(r'#include "([^"]+)"', seen[path])]
    return "\0".join(seen[path] for path in sorted(seen))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process of this machine build at a time; a lock that cannot be had only costs a second compilation."""
    with path.open("w") as handle:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # the lock dies with its holder, so none can be left behind

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
