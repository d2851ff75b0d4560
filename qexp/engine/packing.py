"""From a simulated model to one that computes on integers: every layer with a uniform grid becomes a ``PackedLinear``.

Layers that read one input and have equal grids share one product. What cannot be packed stays as it is, and the report
says so by layer: 16-bit layers, grids that are not uniform, shapes the kernels do not take.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qexp.core.errors import UserError
from qexp.core.kv_forms import early
from qexp.core.linear import InputPath, QuantLinear
from qexp.core.method import Method
from qexp.core.packed import PackedInput, PackedLinear
from qexp.core.packed_head import PackedEmbedding, packed_head, rounded_rows
from qexp.core.packed_kv import KvCodec, codec_of
from qexp.core.packed_residual import ResidualCodec, residual_codec_of
from qexp.core.packed_weight import IntegerWeight, PackedWeight, integer_weight, is_aligned
from qexp.core.rng import generator
from qexp.core.stages import Grid
from qexp.core.words import FULL_BITS, Group, Layer

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from qexp.models.attention import Door
    from qexp.models.view import ModelView  # transformers: seconds that a mistake in the config need not wait for

log = logging.getLogger(__name__)

PLAIN = "float"  # the kernel of a layer that is not packed: torch's own product
Member = tuple[str, QuantLinear, IntegerWeight]


@dataclass(frozen=True)
class PackedModel:
    """A transformers model on packed integers. ``kernels`` says what computes each layer."""

    model: PreTrainedModel
    kernels: dict[str, str]
    codec: KvCodec | ResidualCodec | None
    doors: list[Door]

    def new_cache(self) -> Cache:
        """Return an empty KV cache: packed codes if the recipe quantizes keys and values, else transformers' own."""
        from transformers import DynamicCache

        from qexp.models.packed_cache import PackedKvCache, PackedKvLayer
        from qexp.models.residual_cache import ResidualKvLayer

        codec = self.codec
        if codec is None:
            return DynamicCache(config=self.model.config)
        if isinstance(codec, ResidualCodec):
            return PackedKvCache([ResidualKvLayer(codec, door) for door in self.doors])
        return PackedKvCache([PackedKvLayer(codec, door) for door in self.doors])

    def counts(self) -> dict[str, int]:
        """Return how many layers each kernel computes, most first."""
        return dict(Counter(self.kernels.values()).most_common())


@torch.no_grad()
def pack_model(view: ModelView, method: Method) -> PackedModel:
    """Replace the quantized layers of ``view`` in place; the view is spent, its model lives on in the answer.

    The quantizers must be on (``engine.blocks.activate``). Raises: UserError if the keys are quantized before RoPE.
    """
    check_cacheable(method)
    kernels: dict[str, str] = {}
    for block in range(len(view.blocks)):
        for group in view.groups(block):
            kernels |= _pack_group(view, group)
    if not any(kernel != PLAIN for kernel in kernels.values()):
        log.warning("%s leaves nothing to pack: every layer stays in floating point", method.name)
    doors = [door for block in range(len(view.blocks)) if (door := view.door(block)) is not None]
    quantizes = bool(doors) and method.kv.bits < FULL_BITS
    codec = _codec(method, view.head_size) if quantizes else None
    if quantizes and codec is None:
        log.warning("KV cache of %d bits has no packed form: it is fake-quantized, in floating point", method.kv.bits)
    packed = PackedModel(view.model, kernels, codec, doors)
    log.info("packed: %s", ", ".join(f"{kernel} x{count}" for kernel, count in packed.counts().items()))
    return packed


@torch.no_grad()
def pack_head(packed: PackedModel, act_bits: int = FULL_BITS) -> None:
    """Round the output head to 8 bits, and with it the embedding if the two are one: more than the recipe simulates.

    ``act_bits`` 8 also rounds its input, per token: integer products, and another small deviation.
    Raises: UserError if the head is no plain linear layer, or the embedding it is tied to no plain embedding.
    """
    model: Any = packed.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(head, "weight", None) is embedding.weight
    if type(head) is not nn.Linear or (tied and type(embedding) is not nn.Embedding):
        raise UserError(f"an 8-bit head on {type(head).__name__} and {type(embedding).__name__}", "plain ones")
    codes, scale = rounded_rows(head.weight)
    model.set_output_embeddings(packed_head(codes, scale, head.bias, act_bits))
    if tied:
        model.set_input_embeddings(PackedEmbedding(codes, scale, head.weight.dtype))


def check_packable(method: Method) -> None:
    """Raise UserError, before anything heavy, for a grid of no uniform integers, or keys that no cache can hold."""
    check_cacheable(method)
    columns = 2 * method.grid.group if method.grid.group > 0 else 64
    if method.grid.bits < FULL_BITS and not is_uniform(method.grid):
        raise UserError(
            f"eval.speed on {type(method.grid).__name__}, which is no uniform integer grid",
            "an integer grid",
            "eval.speed=false or method/grid=integer",
        )
    method.grid.check(Layer("a probe", "up", 0, 4, columns))


def check_cacheable(method: Method) -> None:
    """Raise UserError if the keys are quantized before RoPE, so that codes of them cannot be what attention reads."""
    if method.kv.bits < FULL_BITS and early(method.kv):
        raise UserError(
            "kv.pre_rope=true with a packed KV cache",
            "keys quantized behind RoPE",
            "method.kv.pre_rope=false or eval.speed=false",
        )


def is_uniform(grid: Grid) -> bool:
    """Return whether codes decode to scale (code - zero): tried on a small random weight."""
    columns = 2 * grid.group if grid.group > 0 else 64
    weight = torch.randn(4, columns, generator=generator(0, "uniform grid"))
    params = grid.fit(weight, None)
    probe = QuantLinear(nn.Linear(columns, 4, bias=False), InputPath(1))
    probe.grid, probe.params, probe.codes = grid, params, grid.encode(weight, params)
    return integer_weight(probe) is not None


def _pack_group(view: ModelView, group: Group) -> dict[str, str]:
    """Pack the layers of one input; return each layer's kernel."""
    names = [layer.name for layer in group.layers]
    path = view.linear(names[0]).path
    whole = [(name, view.linear(name), integer_weight(view.linear(name))) for name in names]
    members = [(name, linear, weight) for name, linear, weight in whole if weight is not None and is_aligned(weight)]
    for stack in _stacks(members):
        _install(view.model, stack, path)
    packed = {name for name, *_ in members}
    rest = [name for name in names if name not in packed]
    for name in rest:
        if view.linear(name).grid is not None:
            log.warning("%s stays in floating point: its grid or shape has no integer kernel", name)
    path.readers = max(1, len(rest))
    return {name: kernel_of(view.model.get_submodule(name)) for name in names}


def kernel_of(layer: nn.Module) -> str:
    """Return what computes a layer of a packed model."""
    return layer.kind if isinstance(layer, PackedLinear) else PLAIN


def _codec(method: Method, head_size: int) -> KvCodec | ResidualCodec | None:
    return codec_of(method.kv, head_size) or residual_codec_of(method.kv, head_size)


def _stacks(members: list[Member]) -> Iterator[list[Member]]:
    """Yield the layers whose weights can be stacked: equal groups, planes and kind of zero point."""

    def kind(member: Member) -> tuple[int, bool, bool]:
        weight = member[2]
        return weight.group, weight.bits <= 4, weight.zero is None

    for _, stack in groupby(sorted(members, key=kind), key=kind):
        yield list(stack)


def _install(model: nn.Module, stack: list[Member], path: InputPath) -> None:
    weight = PackedWeight([integers for _, _, integers in stack], [linear.bias for _, linear, _ in stack])
    beside = [linear.kept for _, linear, _ in stack if linear.kept is not None]
    outputs = [linear.out_features for _, linear, _ in stack]
    source = PackedInput(path, weight, outputs, torch.cat(beside) if beside else None)
    for reader, (name, linear, _) in enumerate(stack):
        model.set_submodule(name, PackedLinear(source, reader, linear.unmap))
