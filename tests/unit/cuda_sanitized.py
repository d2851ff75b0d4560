"""Run under a sanitizer by test_cuda_emulated.py and test_cuda_ops.py: small shapes through every kernel.

Arguments: an emulated library, or nothing for the CUDA device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cuda_cases as cases
import torch

from qexp.kernels.cuda_abi import Library
from qexp.kernels.cuda_ops import Kernels


def main() -> None:
    if len(sys.argv) > 1:
        kernels, device = Kernels(Library(Path(sys.argv[1])), 90), "cpu"
    else:
        from qexp.kernels import cuda

        assert cuda.load(), cuda.reason()
        kernels, device = cuda._kernels(0), "cuda"
    for kernel in ("tile", "decode", *(["wgmma"] if kernels.capability == 90 else [])):
        kernels.forced = kernel
        cases.check_integers(kernels, device, 70, 33, 352)
        cases.check_product(kernels, device, (70, 130, 256, 128, True), torch.bfloat16)
        cases.check_two_level(kernels, device, 20)
    kernels.forced = ""
    for case in cases.PRODUCTS[:8]:
        cases.check_float_product(kernels, device, case, torch.bfloat16)
        cases.check_product(kernels, device, case, torch.float32)
    for rotation in cases.ROTATIONS[:8] + cases.ROTATIONS[9:11]:
        cases.check_rotation(kernels, device, rotation, torch.bfloat16)
    sys.stdout.write("checked\n")


main()
