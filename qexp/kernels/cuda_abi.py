"""The C ABI of csrc/cuda/qexp_cuda.h for Python: structures, functions and error codes.

A :class:`Library` knows nothing of devices: the same class serves libqexp_cuda.so and the emulation of the kernels on
the host, which tests run on CPU tensors.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

UNSUPPORTED = -1  # no kernel covers the arguments
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}
KERNELS = {"tile": 0, "decode": 1, "wgmma": 2, "tile_s4": 3}

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Product(ctypes.Structure):
    """``struct QexpProduct``; the fields are explained there."""

    _fields_ = (
        *((name, _POINTER) for name in ("w", "scale", "inner", "zero", "a")),
        ("a_stride", _LONG),
        *((name, _POINTER) for name in ("a_scale", "a_sums", "bias", "out")),
        *((name, _INT) for name in ("m", "n", "k", "group", "a_type", "out_type", "bias_type")),
    )


class Rotation(ctypes.Structure):
    """``struct QexpRotation``; the fields are explained there."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "had_k", "out", "scale", "sums")),
        ("rows", _LONG),
        *((name, _INT) for name in ("n", "width", "order", "x_type", "bits", "packed", "group", "sum_group")),
        ("factor", _FLOAT),
        ("clip", _FLOAT),
    )


class CudaError(RuntimeError):
    """A kernel could not be started, or the runtime reports an earlier failure."""


class Library:
    """A loaded library; every method starts a kernel on a stream and raises CudaError if that fails."""

    def __init__(self, path: Path) -> None:
        self.path, self._c = path, ctypes.CDLL(str(path))
        self._c.qexp_cuda_archs.restype = ctypes.c_char_p
        self._c.qexp_cuda_error.restype = ctypes.c_char_p
        self.archs: list[str] = self._c.qexp_cuda_archs().decode().split(",")

    def repack(self, name: str, source: Tensor, rows: int, columns: int, target: Tensor) -> None:
        """Run ``qexp_<name>``, which reorders the nibbles of a matrix."""
        function = getattr(self._c, f"qexp_{name}")
        function.argtypes = [_POINTER, _INT, _INT, _POINTER, _POINTER]
        self._check(name, function(source.data_ptr(), rows, columns, target.data_ptr(), stream_of(source)))

    def dequantize(self, product: Product, like: Tensor) -> None:
        """Run ``qexp_dequantize_w4``."""
        code = self._c.qexp_dequantize_w4(ctypes.byref(product), _POINTER(stream_of(like)))
        self._check("dequantize_w4", code)

    def w4a8(self, product: Product, kernel: str, like: Tensor) -> bool:
        """Run ``qexp_w4a8`` by this kernel; return whether it covers the arguments."""
        code = self._c.qexp_w4a8(ctypes.byref(product), KERNELS[kernel], _POINTER(stream_of(like)))
        return self._check(f"w4a8 ({kernel})", code)

    def w4a16(self, product: Product, like: Tensor) -> bool:
        """Run ``qexp_w4a16``; return whether it covers the arguments."""
        return self._check("w4a16", self._c.qexp_w4a16(ctypes.byref(product), _POINTER(stream_of(like))))

    def rotate(self, rotation: Rotation, quantize: bool, like: Tensor) -> bool:
        """Run ``qexp_had_quant`` or ``qexp_hadamard``; return whether the kernel covers the arguments."""
        function = self._c.qexp_had_quant if quantize else self._c.qexp_hadamard
        return self._check("had_quant", function(ctypes.byref(rotation), _POINTER(stream_of(like))))

    def _check(self, name: str, code: int) -> bool:
        if code > 0:
            raise CudaError(f"qexp {name}: CUDA error {code}, {self._c.qexp_cuda_error(code).decode()}")
        return code != UNSUPPORTED


def stream_of(tensor: Tensor) -> int:
    """Return torch's current stream of the tensor's device, as the address that the C ABI takes."""
    if not tensor.is_cuda:
        return 0
    stream: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's elements are, None for none or an empty one."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None
