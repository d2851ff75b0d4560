"""The operators ``torch.ops.qexp.*``: schemas, shapes for tracing, pure-torch references, and the compiled kernels.

Importing this file defines every operator with its reference, which runs on any device and needs no compiler. The first
call of any of them builds and loads the compiled CPU library (``build.load``), which then takes over for CPU tensors;
QEXP_KERNELS=reference keeps the references. The functions with documentation are in the modules beside this one:
``int4``, ``matmul``, ``had_quant``, ``kv_codes``, ``quantize``, ``gram`` and ``sweep``, with the references as
``<op>_reference``; ``shapes`` holds the shape functions. Both are called with the operator's arguments in order.

Source: kernels.md section 7.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qexp.kernels import build

SCHEMAS: dict[str, dict[str, str]] = {
    "had_quant": {
        "hadamard": "(Tensor x, int block, float scale, Tensor? had_k) -> Tensor",
        "had_quant": (
            "(Tensor x, int bits, int block, bool rotate, float clip, int group, Tensor? had_k, bool container8,"
            " int sum_group) -> (Tensor q, Tensor scale, Tensor sums)"
        ),
    },
    "kv_codes": {
        "quantize_codes": (
            "(Tensor x, int bits, int group, bool symmetric, float clip, bool half=False)"
            " -> (Tensor packed, Tensor scale, Tensor zero)"
        ),
        "dequantize_codes": (
            "(Tensor packed, Tensor scale, Tensor zero, int bits, int group, ScalarType dtype) -> Tensor"
        ),
    },
    "quantize": {
        "fake_quantize": (
            "(Tensor x, int bits, int group, bool symmetric, bool widen, float clip, bool half=False) -> Tensor"
        ),
    },
    "gram": {"gram_": "(Tensor(a!) sum, Tensor x) -> ()"},
    "sweep": {
        "sweep_columns": (
            "(Tensor(a!) target, Tensor(b!) error, Tensor mix, Tensor scale, Tensor zero, int top) -> Tensor"
        ),
    },
    "int4": {
        "pack_int4": "(Tensor q) -> Tensor",
        "unpack_int4": "(Tensor packed) -> Tensor",
        "prepack_w4": (
            "(Tensor w_q, Tensor scale, Tensor? zero, int group, str target) -> (Tensor w_p, Tensor w_s, Tensor w_z)"
        ),
        "p16k8": "(Tensor w_q, int group) -> Tensor",
    },
    "matmul": {
        "w4a8": (
            "(Tensor a_q, Tensor a_scale, Tensor? a_sums, Tensor w_p, Tensor w_s, Tensor? w_z, int n, int group,"
            " Tensor? bias, ScalarType out_dtype) -> Tensor"
        ),
        "w4a4": (
            "(Tensor a_q, Tensor a_scale, Tensor? a_sums, Tensor w_p, Tensor w_s, Tensor? w_z, int n, int group,"
            " Tensor? bias, ScalarType out_dtype) -> Tensor"
        ),
        "w4a16": "(Tensor x, Tensor w_p, Tensor w_s, Tensor? w_z, int n, int group, Tensor? bias) -> Tensor",
        "w4a8_i32": "(Tensor a_q, Tensor w_p, int n) -> Tensor",
    },
    "floors": {
        "floor_read": "(Tensor x) -> Tensor",
        "floor_dot": "(Tensor x, int steps) -> Tensor",
    },
}
OPS = {op: module for module, schemas in SCHEMAS.items() for op in schemas}

_LIBRARY = torch.library.Library("qexp", "DEF")


def _had_quant() -> Any:
    """Return the module of ``hadamard``'s derivative, imported on first use."""
    return importlib.import_module("qexp.kernels.had_quant")


def _refuse_grad(op: str, arguments: tuple[Any, ...]) -> None:
    """Raise RuntimeError for an input that wants a gradient: only ``hadamard`` has a derivative."""
    if op == "hadamard" or not torch.is_grad_enabled():
        return
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.requires_grad:
            raise RuntimeError(
                f"qexp::{op}: got argument {i} that requires a gradient, expected none: this op has no derivative;"
                " call it under torch.no_grad()"
            )


def _is_compiled(name: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether there is a compiled kernel for the device of the arguments; the first call loads what there is."""
    devices = {a.device.type for a in arguments if isinstance(a, Tensor)}
    if devices == {"cpu"}:
        return build.load() and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    if devices == {"cuda"}:
        loaded: bool = importlib.import_module("qexp.kernels.cuda").load()
        return loaded and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    return False


def _reference(op: str) -> Callable[..., Any]:
    """Return the operator's default kernel: hand over to the compiled one if there is one, else run the reference."""
    name = f"qexp::{op}"

    def run(*arguments: Any) -> Any:
        if _is_compiled(name, arguments):
            return getattr(torch.ops.qexp, op)(*arguments)
        _refuse_grad(op, arguments)
        module = importlib.import_module(f"qexp.kernels.{OPS[op]}")  # late: that module imports this one
        return getattr(module, f"{op}_reference")(*arguments)

    return run


def _shapes(op: str) -> Callable[..., Any]:
    """Return the operator's kernel for tracing."""

    def run(*arguments: Any) -> Any:
        _refuse_grad(op, arguments)
        if op == "prepack_w4":  # its shapes depend on the layout, which int4 decides
            return importlib.import_module("qexp.kernels.int4").prepack_w4_shapes(*arguments)
        return getattr(importlib.import_module("qexp.kernels.shapes"), op)(*arguments)

    return run


for _op, _module in OPS.items():
    _LIBRARY.define(_op + SCHEMAS[_module][_op], tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_op, _reference(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"qexp::{_op}", _shapes(_op), lib=_LIBRARY)


torch.library.register_autograd(
    "qexp::hadamard",
    lambda ctx, grad: _had_quant().hadamard_backward(ctx, grad),
    setup_context=lambda ctx, inputs, output: _had_quant().keep_for_backward(ctx, inputs, output),
    lib=_LIBRARY,
)


def kernel_info() -> dict[str, Any]:
    """Return what computes: compiled or why not, the ISA tier, CUDA architectures, layout ids, threads, the library.

    Builds and loads the CPU library if that has not happened yet. Raises: ValueError if QEXP_CPU_ISA names no tier of
    this CPU.
    """
    from qexp.kernels.int4 import LAYOUTS

    return {**build.info(), "cuda_archs": _cuda_archs(), "layouts": dict(LAYOUTS), "threads": torch.get_num_threads()}


def _cuda_archs() -> list[str]:
    """Return the architectures of the CUDA library that is loaded, none without a device."""
    if not torch.cuda.is_available():
        return []
    archs: list[str] = importlib.import_module("qexp.kernels.cuda").built_archs()
    return archs
