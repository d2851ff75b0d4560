"""Sizes from the bytes that would be stored, every scale, zero point and table included.

Source: methods/evaluation.md section 5. Layers that are not quantized, embeddings, norms and the head count 16 bits.
"""

from __future__ import annotations

from qexp.core.linear import QuantLinear
from qexp.core.method import Method
from qexp.core.storage import packed_bytes
from qexp.core.words import FULL_BITS
from qexp.models.view import ModelView


def sizes(view: ModelView, method: Method) -> dict[str, float]:
    """Return the size/... metrics: bits_per_weight of the quantizable linears, bytes of the whole model, KV bytes."""
    linear_weights = sum(layer.weights for layer in view.layers)
    linear_bits = sum(_bits(view.linear(layer.name)) for layer in view.layers)
    linears = [view.linear(layer.name) for layer in view.layers]
    paths = {id(linear.path): linear.path for linear in linears}.values()
    maps = [step for path in paths for step in path.maps] + [one.unmap for one in linears if one.unmap is not None]
    doors = [door for block in range(len(view.blocks)) if (door := view.door(block)) is not None]
    maps += [door.rotation for door in doors if door.rotation is not None]
    tensors = [t for step in maps for t in step.state()[1].values()] + [t for p in paths for t in p.ranges.values()]
    online = sum(tensor.nbytes for tensor in tensors)
    parameters = sum(p.numel() for p in {id(p): p for p in view.model.parameters()}.values())
    others = (parameters - linear_weights) * FULL_BITS
    per_token = 2 * len(view.blocks) * view.kv_heads * view.head_size
    kv_bits = method.kv.cost(view.head_size) if method.kv.bits < FULL_BITS else FULL_BITS
    return {
        "size/bits_per_weight": linear_bits / linear_weights,
        "size/bytes": (linear_bits + others) / 8 + online,
        "fp/size/bytes": view.stored_parameters * FULL_BITS / 8,
        "size/kv_bytes_per_token": per_token * kv_bits / 8,
        "fp/size/kv_bytes_per_token": per_token * FULL_BITS / 8,
    }


def _bits(layer: QuantLinear) -> float:
    """Return the stored bits of one layer's weight: those of the bytes that are written."""
    return FULL_BITS * layer.weight.numel() if layer.grid is None else 8 * packed_bytes(layer)
