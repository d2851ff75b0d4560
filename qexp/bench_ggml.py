"""ggml's 4-bit products through the package ggml-python, as llama.cpp runs them: repacked for this CPU where it can.

A graph of one node, y = x Wᵀ, with W quantized by ggml itself and float32 x, which ggml quantizes inside the product.
Build the package for this machine (``CMAKE_ARGS=-DGGML_NATIVE=ON pip install ggml-python``), or it measures an old one.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qexp.bench_timing import Call

GRAPH_BYTES = 4 << 20  # for the descriptions of a few tensors, not their data


class Product:
    """One prepared product. It owns what C points to, so it must outlive every call."""

    def __init__(self, kind: str, weight: Tensor, x: Tensor) -> None:
        lib, self.backend = library(), _backend(torch.get_num_threads())
        (rows, columns), tokens = weight.shape, len(x)
        holder = lib.ggml_init(lib.ggml_init_params(mem_size=GRAPH_BYTES, mem_buffer=None, no_alloc=True))
        code = getattr(lib, f"GGML_TYPE_{kind}")
        w = lib.ggml_new_tensor_2d(holder, code, columns, rows)
        self.kept = [holder, lib.ggml_backend_alloc_ctx_tensors_from_buft(holder, _buffer_type(self.backend))]
        size = lib.ggml_nbytes(w)
        lib.ggml_backend_tensor_set(w, _quantized(code, weight, size), 0, size)
        work = lib.ggml_init(lib.ggml_init_params(mem_size=GRAPH_BYTES, mem_buffer=None, no_alloc=True))
        given = lib.ggml_new_tensor_2d(work, lib.GGML_TYPE_F32, columns, tokens)
        self.graph = lib.ggml_new_graph(work)
        self.out, self.shape = lib.ggml_mul_mat(work, w, given), (tokens, rows)
        lib.ggml_build_forward_expand(self.graph, self.out)
        self.kept += [work, lib.ggml_backend_alloc_ctx_tensors(work, self.backend)]
        lib.ggml_backend_tensor_set(given, ctypes.c_void_p(x.data_ptr()), 0, x.nbytes)

    def __call__(self) -> None:
        """Compute."""
        library().ggml_backend_graph_compute(self.backend, self.graph)

    def answer(self) -> Tensor:
        """Return the product [M, N] float32."""
        made = torch.empty(self.shape)
        library().ggml_backend_tensor_get(self.out, ctypes.c_void_p(made.data_ptr()), 0, made.nbytes)
        return made


def prepared(kind: str, weight: Tensor, x: Tensor) -> Call:
    """Return the product of x [M, K] and a weight [N, K] in a ggml type, Q4_0 or Q4_K say."""
    return Product(kind, weight.contiguous(), x.contiguous())


@cache
def library() -> Any:
    """Return the package. Raises: ImportError where it is not installed."""
    return importlib.import_module("ggml")


@cache
def _backend(threads: int) -> Any:
    backend = library().ggml_backend_cpu_init()
    library().ggml_backend_cpu_set_n_threads(backend, threads)
    return backend


def _buffer_type(backend: Any) -> Any:
    """Return the kind of memory in which ggml repacks weights for this CPU, or its usual kind."""
    lib = library()
    device = lib.ggml_backend_get_device(backend)
    registry = lib.ggml_backend_dev_backend_reg(device)
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        if extra[0]:
            return extra[0]
    return lib.ggml_backend_get_default_buffer_type(backend)


def _quantized(code: int, weight: Tensor, size: int) -> Any:
    """Return ggml's bytes of the weight."""
    made, values = ctypes.create_string_buffer(size), ctypes.cast(weight.data_ptr(), ctypes.POINTER(ctypes.c_float))
    library().ggml_quantize_chunk(code, values, made, 0, *weight.shape, None)
    return made
