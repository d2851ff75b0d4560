"""Model families as data: the names of modules by role, and the flags that decide what can be folded where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qexp.core.norms import NORM, OFFSET_NORM

LLAMA_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
OPT_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}


@dataclass(frozen=True)
class Family:
    """Where things are in the models of one architecture (names relative to the model or to a block).

    ``post_norms``: the block's outputs pass through norms of their own before the residual sum, so nothing
    can be folded into the residual stream. ``scalable_middle``: a positive diagonal commutes with the
    activation function on the ``up`` branch (gated: the branch is linear; ReLU: homogeneous).
    """

    model_types: tuple[str, ...]
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final_norm: str = "model.norm"
    head: str = "lm_head"
    linears: dict[str, str] = field(default_factory=lambda: dict(LLAMA_LINEARS))
    attention: str = "self_attn"
    key_norm: str = "k_norm"  # of the attention module, in the members that have one
    query_norm: str = "q_norm"
    rotary: bool = True  # positions enter as rotations of the pairs (i, i + d / 2) of queries and keys
    attention_norm: str = "input_layernorm"
    mlp: str | None = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    norm_kind: str = NORM
    layer_norm: bool = False
    post_norms: bool = False
    scalable_middle: bool = True


FAMILIES = (
    Family(model_types=("llama", "mistral", "qwen2", "qwen3", "smollm3")),
    Family(
        model_types=("gemma2", "gemma3_text"),
        mlp_norm="pre_feedforward_layernorm",
        norm_kind=OFFSET_NORM,
        post_norms=True,
    ),
    Family(model_types=("gemma",), norm_kind=OFFSET_NORM),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final_norm="model.decoder.final_layer_norm",
        linears=OPT_LINEARS,
        attention_norm="self_attn_layer_norm",
        mlp=None,
        mlp_norm="final_layer_norm",
        layer_norm=True,
        rotary=False,
    ),
)


def family_of(config: Any) -> Family | None:
    """Return the family of a transformers config, or None where only the generic view applies."""
    if config.model_type == "opt" and not (config.do_layer_norm_before and config.activation_function == "relu"):
        return None  # OPT-350M norms after the sum
    return next((f for f in FAMILIES if config.model_type in f.model_types), None)
