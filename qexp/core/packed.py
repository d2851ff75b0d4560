"""Linear layers that compute on packed integers what ``QuantLinear`` simulates.

The layers that read one input share a ``PackedInput``: the online maps and the activation quantizer run once, and one
product with the stacked weights serves them all (q, k and v; gate and up). The first reader computes, the others take
their slice. The modeling code does not notice: each ``PackedLinear`` stands where an ``nn.Linear`` stood.

Input, by what the activation quantizer is:
    none, or one without an integer form      fake-quantized x with integer weights (w4a16)
    per token, symmetric, 4 or 8 bits         had_quant, which also does a last Hadamard of the maps, then w4a4 or w4a8
    per token, asymmetric or other widths     codes by torch, then w4a8 and a rank-one term for the zero points
Source: kernels.md sections 6 and 7.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qexp.core.hadamard import Hadamard
from qexp.core.hadamard_matrices import factorize, small_hadamard
from qexp.core.linear import InputPath
from qexp.core.maps import Diagonal, LinearMap
from qexp.core.packed_weight import Activations, PackedWeight
from qexp.core.words import FULL_BITS
from qexp.kernels.quantize import fake_quantize_per_token
from qexp.kernels.token_codes import token_codes

FUSED_BITS = (4, 8)  # what had_quant writes
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read


@dataclass(frozen=True)
class TokenQuantizer:
    """The integer form of an activation quantizer; ``clip`` is a fraction of a token's range."""

    bits: int
    symmetric: bool
    clip: float

    @property
    def is_fused(self) -> bool:
        """Return whether ``had_quant`` does it."""
        return self.symmetric and self.bits in FUSED_BITS

    def codes(self, x: Tensor, had_k: Tensor | None, rotate: bool, sum_group: int) -> Activations:
        """Return the codes of x [M, K], rotated first by a whole-row Hadamard where asked (only if fused)."""
        if self.is_fused:
            wide = self.bits == 8 or x.device.type == "cpu" or _prefers_bytes(x.device)
            made = torch.ops.qexp.had_quant(x, self.bits, 0, rotate, self.clip, 0, had_k, wide, sum_group)
            q, scale, sums = made
            return Activations(q, scale, sums, zero=None, bits=self.bits)
        assert not rotate
        q, scale, zero = token_codes(x, self.bits, self.symmetric, self.clip)
        width = sum_group or x.shape[1]
        sums = q.view(x.shape[0], -1, width).sum(-1, dtype=torch.int32)
        return Activations(q, scale, sums, zero=zero, bits=8)


def quantizer_of(act: Callable[[Tensor], Tensor] | None) -> TokenQuantizer | None:
    """Return the integer form of an input path's quantizer, or None where it has none.

    A per-token quantizer is a partial application of :func:`fake_quantize_per_token`: what it computes is what is read.
    """
    if isinstance(act, functools.partial) and act.func is fake_quantize_per_token and not act.args:
        return TokenQuantizer(**{**act.keywords, "clip": float(act.keywords["clip"])})
    return None


class PackedInput(nn.Module):
    """One input and the stacked weights of all layers that read it; ``rows`` are each reader's outputs.

    ``beside`` [N, K] are the weights of the last K columns, which stay in floating point with what they read.
    """

    beside: Tensor | None

    def __init__(
        self, path: InputPath, weight: PackedWeight, outputs: Sequence[int], beside: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("beside", beside)
        self.rows = _slices(outputs)
        self.act, self.quantizer = path.act, quantizer_of(path.act)
        self.maps, self.rotation = _split(path.maps, self.quantizer)
        self.had_k = None if self.rotation is None else odd_part(self.rotation.size)
        self._source: Tensor | None = None
        self._kept: Tensor | None = None
        self._version, self._served = 0, set[int]()

    @property
    def kind(self) -> str:
        """Return the kernel: weight bits as they are stored, activation bits as they are multiplied."""
        act = FULL_BITS if self.quantizer is None else 4 if self.quantizer.bits == 4 and self.quantizer.is_fused else 8
        return f"{self.weight.kind}a{act}" + ("+hadamard" if self.rotation is not None else "")

    def answer(self, x: Tensor, reader: int) -> Tensor:
        """Return reader's outputs [..., O] for x [..., I], in the dtype of x; the others' are kept until they ask."""
        if self._kept is None or not self._is_kept(x) or reader in self._served:
            self._kept, self._served = self._compute(x), set()
            self._source, self._version = x, _version(x)
        kept = self._kept
        self._served.add(reader)
        if len(self._served) == len(self.rows):
            self._forget()
        return kept[..., self.rows[reader]]

    def _forget(self) -> None:
        self._source, self._kept, self._version, self._served = None, None, 0, set()

    def _is_kept(self, x: Tensor) -> bool:
        return self._source is x and self._version == _version(x)

    def _compute(self, x: Tensor) -> Tensor:
        given = x if x.dtype in FLOATS else x.float()
        for step in self.maps:
            given = step.apply(given)
        if self.beside is not None:
            kept = self.beside.shape[1]
            exact = given[..., -kept:] @ self.beside.T.to(given.dtype)
            y = self._product(given[..., :-kept]) + exact.flatten(0, -2)
        else:
            y = self._product(given)
        return y.to(x.dtype).view(*x.shape[:-1], self.weight.outputs)

    def _product(self, x: Tensor) -> Tensor:
        """Return what the integers say to x [..., K], as rows."""
        if self.quantizer is None:
            simulated = x if self.act is None else self.act(x)  # on sequences: it may compare their tokens
            return self.weight.times(simulated.reshape(-1, x.shape[-1]).contiguous())
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        codes = self.quantizer.codes(rows, self.had_k, self.rotation is not None, self.weight.group)
        return self.weight.times_codes(codes, rows.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedInput:
        super()._apply(fn, recurse)
        if self.had_k is not None:
            self.had_k = self.had_k.to(self.weight.device)
        self._forget()
        return self


class PackedLinear(nn.Module):
    """One reader of a ``PackedInput``, in the place of a linear layer. The first reader owns the input."""

    def __init__(self, source: PackedInput, reader: int, unmap: LinearMap | None = None) -> None:
        super().__init__()
        self.unmap = unmap
        rows = source.rows[reader]
        self.in_features, self.out_features = source.weight.inputs, rows.stop - rows.start
        self.reader = reader
        if reader == 0:
            self.source = source
        self._shared = (source,)  # in a tuple: not a submodule, so that memory is counted and moved once

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b [..., O] for x [..., I]."""
        y = self._shared[0].answer(x, self.reader)
        return y if self.unmap is None else self.unmap.undual(y)

    @property
    def kind(self) -> str:
        """Return which kernel computes it, e.g. w4a8+hadamard."""
        return self._shared[0].kind

    def extra_repr(self) -> str:
        """Return shape and kernel for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def _split(maps: Sequence[LinearMap], quantizer: TokenQuantizer | None) -> tuple[list[LinearMap], Hadamard | None]:
    """Return the maps to apply and the Hadamard, last of them, that ``had_quant`` does with the quantization.

    Its random signs stay a map of their own: the kernel has none.
    """
    last = maps[-1] if maps else None
    fits = isinstance(last, Hadamard) and factorize(last.size).odd == 1
    if quantizer is None or not quantizer.is_fused or not isinstance(last, Hadamard) or not fits:
        return list(maps), None
    signs = [] if last.signs is None else [Diagonal(last.signs.float())]
    return [*maps[:-1], *signs], last


def odd_part(size: int) -> Tensor | None:
    """Return the +-1 matrix [K', K'] of size = K' 2^p, int8, or None where K' is 1."""
    orders = factorize(size).orders
    if not orders:
        return None
    return functools.reduce(torch.kron, (small_hadamard(order) for order in orders)).contiguous()


def _slices(outputs: Sequence[int]) -> list[slice]:
    ends = [sum(outputs[: i + 1]) for i in range(len(outputs))]
    return [slice(end - size, end) for end, size in zip(ends, outputs, strict=True)]


def _version(x: Tensor) -> int:
    """Return the count of in-place changes; an inference tensor has none, and is taken to stay as it is.

    So is one in a compiled graph, which cannot ask.
    """
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _prefers_bytes(device: torch.device) -> bool:
    """Return whether int4 activations go in bytes: from sm_90 on there is no 4-bit tensor-core instruction."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
