"""Rows times a Kronecker product of small +-1 matrices: x <- x H^T / sqrt(n), and back.

H = K_1 (x) K_2 (x) ... (x) S_{2^power}. A row is viewed as [K_1, K_2, .., 2^power] and each axis is multiplied by its
own matrix: n (sum K_i + ..) work in place of n^2. The power-of-two axis is cut into axes of 2 to 64, each one dense
matmul: measured on a CPU, four to eight times faster than torch's butterfly, which passes over memory ``power`` times.
The compiled kernel (csrc/cpu/hadamard.h), where it was built, does that axis and the last K in one pass; on CUDA the
optional package ``fast_hadamard_transform`` takes the axis when it is installed.

Matrices need not be symmetric: the inverse multiplies by H, and autograd differentiates the plain operations.

Source: methods/hadamard.md sections 1 and 2.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from qexp.kernels import build, ops
from qexp.kernels.graphs import constant

assert "hadamard" in ops.OPS  # importing it is what defines torch.ops.qexp
LARGEST_FAST_POWER = 15  # what fast_hadamard_transform accepts


def hadamard_transform(x: Tensor, factors: Sequence[Tensor], power: int) -> Tensor:
    """Return x H^T / sqrt(n).

    Shapes: x [..., n], factors [K_i, K_i] with K K^T = K_i I and n = prod(K_i) 2^power -> [..., n], dtype of x.
    Arithmetic in float32 for 16-bit x, else in the dtype of x. Raises: ValueError if the sizes do not multiply to n.
    """
    return _transform(x, list(factors), power)


def inverse_hadamard_transform(x: Tensor, factors: Sequence[Tensor], power: int) -> Tensor:
    """Return x H / sqrt(n), which undoes :func:`hadamard_transform`; shapes, arithmetic and errors as there."""
    return _transform(x, [factor.T.contiguous() for factor in factors], power)


def sylvester(power: int) -> Tensor:
    """Return the symmetric Sylvester matrix of order 2^power, int8."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    block = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    for _ in range(power):
        matrix = torch.kron(block, matrix)
    return matrix


def digits(power: int) -> list[int]:
    """Cut 2^power into near-equal axes, given as exponents: one up to 64, else as many as keep each at 32 or less."""
    if power <= 6:
        return [power] if power else []
    count = math.ceil(power / 5)
    return [power // count + (i < power % count) for i in range(count)]


def _transform(x: Tensor, factors: list[Tensor], power: int) -> Tensor:
    n = math.prod(factor.shape[0] for factor in factors) << power
    if x.shape[-1] != n:
        raise ValueError(f"x has {x.shape[-1]} columns; the factors and 2^{power} multiply to {n}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):  # autocast would run the matmuls in 16 bits
        if _compiled(x, factors, power):
            return _by_kernel(x, factors, power)
        y = _along_axes(x.to(dtype).reshape(-1, n), _orthonormal(factors, x.device, dtype), power)
    return y.reshape(x.shape).to(x.dtype)


def _compiled(x: Tensor, factors: list[Tensor], power: int) -> bool:
    """Return whether the compiled kernel takes 2^power and the last factor: decided by the machine, not by values.

    It has no float64 and no float factor (a DCT); below 32 columns it loses to the matmuls.
    """
    fits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and (power >= 5 or not factors)
    learns = x.requires_grad and torch.is_grad_enabled()
    return fits and x.device.type == "cpu" and x.numel() > 0 and not learns and _is_built()


def _by_kernel(x: Tensor, factors: list[Tensor], power: int) -> Tensor:
    """Return the transform with its fastest axes by ``torch.ops.qexp.hadamard``, what is left by matmuls."""
    last = factors[-1].to(x.device) if factors and factors[-1].dtype == torch.int8 else None
    rest = factors if last is None else factors[:-1]
    block = (1 if last is None else last.shape[0]) << power
    y: Tensor = torch.ops.qexp.hadamard(x.float() if rest else x, block, block**-0.5, last)
    if rest:
        y = _multiply(y.reshape(-1, x.shape[-1]), _orthonormal(rest, x.device, torch.float32), block)
    return y.reshape(x.shape).to(x.dtype)


def _orthonormal(factors: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [factor.to(device, dtype) / math.sqrt(factor.shape[0]) for factor in factors]


def _along_axes(rows: Tensor, small: list[Tensor], power: int) -> Tensor:
    """Multiply each axis of rows [R, n] by its orthonormal matrix, fastest axis first."""
    fast = _fast_kernel() if rows.is_cuda and 0 < power <= LARGEST_FAST_POWER else None
    if fast is None:
        return _multiply(rows, _axes(small, power, rows), 1)
    return _multiply(fast(rows.reshape(-1, 1 << power), 2.0 ** (-power / 2)), small, 1 << power)


def _multiply(y: Tensor, matrices: list[Tensor], inner: int) -> Tensor:
    """Multiply the axes of y, slowest first in ``matrices``; the last of them is ``inner`` elements apart."""
    for matrix in reversed(matrices):
        size = matrix.shape[0]
        y = matrix @ y.reshape(-1, size, inner) if inner > 1 else y.reshape(-1, size) @ matrix.T
        inner *= size
    return y


def _axes(small: list[Tensor], power: int, like: Tensor) -> list[Tensor]:
    """Return the orthonormal matrices of all axes, slowest first, those of 2^power cut by :func:`digits`."""
    rest = digits(power)
    if power == 6 and small and small[-1].shape[0] <= 32:  # 12 x 64 as 24 x 32: a quarter faster, measured
        small, rest = [*small[:-1], torch.kron(small[-1], _orthonormal_sylvester(1, like.dtype, like.device))], [5]
    return small + [_orthonormal_sylvester(digit, like.dtype, like.device) for digit in rest]


@cache
@constant
def _orthonormal_sylvester(power: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # cached: a later caller may need gradients through it
        return sylvester(power).to(device, dtype) / math.sqrt(1 << power)


@constant
def _is_built() -> bool:
    return build.load()


@cache
def _fast_kernel() -> Callable[[Tensor, float], Tensor] | None:
    """Return the CUDA butterfly of the optional package (power-of-two rows, differentiable), or None."""
    if importlib.util.find_spec("fast_hadamard_transform") is None:
        return None
    kernel: Callable[[Tensor, float], Tensor] = importlib.import_module("fast_hadamard_transform").hadamard_transform
    return kernel
