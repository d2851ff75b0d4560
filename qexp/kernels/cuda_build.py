"""Builds csrc/cuda with nvcc on first use of a CUDA device, or takes the library that QEXP_CUDA_LIBRARY names.

The sources include no torch header, so a library fits any torch; it is kept as <cache>/kernels/<hash>.so, hashed over
sources, flags, architectures and compiler (build.py). Architectures are those of the devices that are there, or
QEXP_CUDA_ARCHS (a list as "80,86,89,90a"). nvcc is $NVCC, that of $CUDA_HOME, or the first on the PATH.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qexp.kernels import build

log = logging.getLogger(__name__)

FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")
HOPPER = "90a"  # wgmma exists in this target alone, so one file is compiled for nothing else
OLDEST = (8, 0)


def library() -> Path:
    """Return the library for the devices of this machine, compiled if need be; raises build.BuildError."""
    named = os.environ.get("QEXP_CUDA_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise build.BuildError(f"QEXP_CUDA_LIBRARY={named} is no file")
        return Path(named)
    return compiled(architectures(), build.cache_folder())


def architectures() -> list[str]:
    """Return QEXP_CUDA_ARCHS, or the architectures of the devices; raises build.BuildError for one that is too old."""
    asked = os.environ.get("QEXP_CUDA_ARCHS")
    if asked:
        return [arch.strip() for arch in asked.split(",")]
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    fit = sorted(capability for capability in found if capability >= OLDEST)
    if not fit:
        raise build.BuildError(
            f"the CUDA kernels need compute capability 8.0 or more, the devices have {sorted(found)}"
        )
    return [HOPPER if capability == (9, 0) else f"{capability[0]}{capability[1]}" for capability in fit]


def nvcc() -> str:
    """Return the CUDA compiler; raises build.BuildError without one."""
    home = os.environ.get("CUDA_HOME")
    for command in (os.environ.get("NVCC"), f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"):
        path = shutil.which(command) if command else None
        if path:
            return path
    raise build.BuildError("no nvcc found; set NVCC or CUDA_HOME, or name a prebuilt library by QEXP_CUDA_LIBRARY")


def flags(source: Path, archs: Sequence[str]) -> list[str]:
    """Return the flags of one source for a library of these architectures."""
    given = [*FLAGS, f'-DQEXP_CUDA_ARCHS="{",".join(archs)}"']
    if source.stem.endswith("_wgmma"):
        archs = [arch for arch in archs if arch == HOPPER] or archs
        given += [] if HOPPER in archs else ["-DQEXP_WITHOUT_SM90A"]
    return given + [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]


def compiled(archs: Sequence[str], folder: Path) -> Path:
    """Return <folder>/<hash>.so for these architectures, compiling what is missing; raises build.BuildError."""
    compiler = nvcc()
    identity = build._run([compiler, "--version"]) + os.environ.get("NVCC_APPEND_FLAGS", "")  # nvcc reads it itself
    sources = sorted(build.source_folder("cuda").glob("*.cu"))
    jobs = {path: build._digest(build._text(path), identity, *flags(path, archs)) for path in sources}
    target = folder / f"cuda-{build._digest(identity, *jobs.values())}.so"
    if target.exists():
        return target
    (folder / "objects").mkdir(parents=True, exist_ok=True)
    with build._alone(target.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not target.exists():
            log.info("compiling the CUDA kernels (%d files for %s, once) into %s", len(jobs), ",".join(archs), folder)

            def make(source: Path) -> Path:
                return _object(
                    compiler, source, flags(source, archs), folder / "objects" / f"{source.stem}.{jobs[source]}.o"
                )

            with ThreadPoolExecutor(build._processors()) as pool:
                objects = list(pool.map(make, jobs))
            linked = Path(scratch) / target.name
            build._run([compiler, "-shared", "-cudart=static", "-o", str(linked), *map(str, objects)])
            linked.replace(target)
    return target


def _object(compiler: str, source: Path, options: Sequence[str], target: Path) -> Path:
    """Compile one source, unless its object is kept from another build."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            build._run([compiler, *options, "-c", str(source), "-o", str(made)])
            made.replace(target)
    return target


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Return whether code for one of ``archs`` runs on a device: the same major version, a minor one not above."""
    for arch in archs:
        if arch == HOPPER:
            fits = capability == (9, 0)
        else:
            major, minor = divmod(int(arch), 10)
            fits = major == capability[0] and minor <= capability[1]
        if fits:
            return True
    return False
