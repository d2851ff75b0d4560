"""Loads the CUDA kernels on first use and registers them for torch's dispatch key CUDA.

Weight layout "w4_tile" (csrc/cuda/layout.h), one for all chips; "cuda_mma" and "cuda_sm90" name it. w_p is the header
of ``int4.write_header`` and [N'/16][K'/64][512] bytes, N' = N rounded up to 128, K' = K to 64. w_s is fp32
[1, groups, N'], w_z the same; two-level scales (``cuda_weight.prepack_two_level``) put the row scales in front:
[1, 1 + groups, N']. The kernels tell the layout by the shape of w_s, never by the header, whose
reading would wait for the device.

Source: kernels.md sections 5 and 7.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from qexp.kernels import build, cuda_build, ops
from qexp.kernels.cuda_abi import KERNELS, Library
from qexp.kernels.cuda_ops import Kernels
from qexp.kernels.cuda_weight import SMALLEST_GROUP, prepack, prepack_shapes

log = logging.getLogger(__name__)

_REGISTERED = torch.library.Library("qexp", "IMPL", "CUDA")
OPERATORS = ("w4a8", "w4a4", "w4a8_i32", "w4a16", "hadamard", "had_quant")


def load() -> bool:
    """Return whether the CUDA kernels are in place, building and registering them on the first call."""
    return isinstance(_library(), Library)


def built_archs() -> list[str]:
    """Return the architectures of the library that is loaded, none if there is none."""
    library = _library()
    return library.archs if isinstance(library, Library) else []


def reason() -> str:
    """Return why there are no CUDA kernels, empty if there are."""
    library = _library()
    return library if isinstance(library, str) else ""


def best_layout(group: int) -> str:
    """Return the layout that ``prepack_w4`` makes for a CUDA tensor with groups of this size."""
    return "cuda_mma" if group % SMALLEST_GROUP == 0 and load() else "reference"


def prepack_w4(
    w_q: Tensor, scale: Tensor, zero: Tensor | None, group: int, target: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the packed weight for a CUDA tensor; raises RuntimeError where the layout cannot serve it."""
    library = _library()
    if isinstance(library, str) or not w_q.is_cuda:
        raise RuntimeError(f"target: got {target!r} for {w_q.device}, expected a CUDA tensor and kernels ({library})")
    with torch.cuda.device(w_q.device):
        return prepack(library, w_q, scale, zero, group, target)


def prepack_w4_shapes(
    w_q: Tensor, scale: Tensor, zero: Tensor | None, group: int, target: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shapes of what :func:`prepack_w4` returns, for tracing."""
    del group, target  # the layout is the same for all
    return prepack_shapes(w_q, scale, zero)


def force_kernel(name: str) -> None:
    """For tests and measurements: make integer products use this kernel of KERNELS, "" for the usual choice."""
    if name and name not in KERNELS:
        raise ValueError(f"kernel: got {name!r}, expected one of {', '.join(KERNELS)}")
    for device in range(torch.cuda.device_count()):
        _kernels(device).forced = name


@functools.cache
def _kernels(device: int) -> Kernels:
    """Return the operators for a device; raises RuntimeError naming the architectures if it is none of them."""
    library, capability = _library(), torch.cuda.get_device_capability(device)
    assert isinstance(library, Library)
    if not cuda_build.runs_on(library.archs, capability):
        built = ", ".join(f"sm_{arch}" for arch in library.archs)
        raise RuntimeError(
            f"device: got compute capability {capability[0]}.{capability[1]}, expected one of {built}, for which the"
            " CUDA kernels were built; set QEXP_CUDA_ARCHS to build for others"
        )
    return Kernels(library, 10 * capability[0] + capability[1])


@functools.cache
def _library() -> Library | str:
    """Return the library, its operators registered, or why there is none."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        library = Library(cuda_build.library())
    except (build.BuildError, OSError) as error:
        log.warning("CUDA kernels are not compiled, pure torch computes instead (slower): %s", error)
        return str(error)
    for name in OPERATORS:
        _REGISTERED.impl(name, _on_device(name))
    return library


def _on_device(name: str) -> Any:
    """Return the operator as torch calls it: on the device of its first argument, without gradients."""

    def run(*arguments: Any) -> Any:
        ops._refuse_grad(name, arguments)
        device = arguments[0].device.index
        with torch.cuda.device(device):
            return getattr(_kernels(device), name)(*arguments)

    return run
