"""What a quantized layer is as bytes: packed codes, and parameters as their grid stores them; and back, exactly.

Codes lie dense, row after row, without a gap between rows. A grid whose codes are more than one small number packs them
itself (``PacksCodes``); the parameters of any grid are packed by its ``formats``. Sizes are counted from these bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qexp.core.linear import QuantLinear
from qexp.core.sparse import Sparse
from qexp.core.stages import Grid
from qexp.core.words import Format, Quantized
from qexp.kernels.pack import pack_codes, unpack_codes

Tensors = dict[str, Tensor]


@runtime_checkable
class PacksCodes(Protocol):
    """A grid whose codes are not simply numbers of ``bits`` bits."""

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes [O, J/D, ...] as bytes, uint8 [n]."""
        ...

    def unpack(self, packed: Tensor, outputs: int, columns: int) -> Tensor:
        """Undo ``pack``; ``columns`` are J/D."""
        ...


def pack_linear(linear: QuantLinear) -> tuple[Tensors, dict[str, Any]]:
    """Return a quantized layer as tensors of bytes, and the facts that :func:`unpack_linear` reads."""
    grid, codes = linear.grid, linear.codes
    assert grid is not None and codes is not None, "a layer without codes"
    packed = grid.pack(codes) if isinstance(grid, PacksCodes) else pack_codes(codes.flatten(), grid.bits)
    tensors, about = {"codes": packed.cpu()}, {}
    for name, value in linear.params.items():
        once = value[:1, :1] if name in grid.shared else value
        tensors[f"params.{name}"] = _stored(once, grid.formats[name]).cpu()
        about[name] = {"shape": list(value.shape), "dtype": str(value.dtype).split(".")[1]}
    if linear.kept is not None:
        tensors["kept"] = linear.kept.half().cpu().contiguous()
    if linear.sparse is not None:
        tensors |= {f"sparse.{name}": value.cpu() for name, value in linear.sparse.packed().items()}
    return tensors, {"bits": grid.bits, "columns": codes.shape[1], "params": about}


def unpack_linear(linear: QuantLinear, grid: Grid, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put what :func:`pack_linear` packed into a layer."""
    device, outputs, columns = linear.weight.device, linear.out_features, facts["columns"]
    if isinstance(grid, PacksCodes):
        codes = grid.unpack(tensors["codes"], outputs, columns)
    else:
        codes = unpack_codes(tensors["codes"], grid.bits, outputs * columns).view(outputs, columns)
    params = {}
    for name, about in facts["params"].items():
        shape, dtype = about["shape"], getattr(torch, about["dtype"])
        kept = [1, 1, *shape[2:]] if name in grid.shared else shape
        value = _restored(tensors[f"params.{name}"], grid.formats[name], kept).to(device, dtype)
        params[name] = value.expand(shape)  # one in memory where all rows share it: codebooks are large
    sparse = {name.removeprefix("sparse."): t for name, t in tensors.items() if name.startswith("sparse.")}
    linear.sparse = Sparse.unpacked(sparse, linear.in_features).to(device) if sparse else None
    kept_columns = tensors["kept"].to(linear.weight) if "kept" in tensors else None
    linear.install(grid, Quantized(codes.to(device), params, kept_columns))


def packed_bytes(linear: QuantLinear) -> int:
    """Return how many bytes a quantized layer is."""
    return sum(tensor.nbytes for tensor in pack_linear(linear)[0].values())


def _stored(value: Tensor, format: Format) -> Tensor:
    """Return a parameter as it is stored: integers of so many bits, or a dtype, which must hold it exactly."""
    if isinstance(format, int):
        return pack_codes(value.to(torch.uint8).flatten(), format)
    kept = value.to(getattr(torch, format)).contiguous()
    return kept.view(torch.uint8) if format.startswith("float8") else kept  # safetensors lacks some of them


def _restored(stored: Tensor, format: Format, shape: list[int]) -> Tensor:
    if isinstance(format, int):
        return unpack_codes(stored, format, math.prod(shape)).view(shape)
    return stored.view(getattr(torch, format)).view(shape)
