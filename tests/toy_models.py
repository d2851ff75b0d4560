"""Causal LMs of every family, small enough that every test may build its own, with nothing trivially 0 or 1 in them.

Gains, biases and means are random, sizes are not powers of two, query widths differ from the hidden size where the
family allows it. In float64 the models are exact: transformers computes RMSNorm in float32 whatever comes in, so those
norms are replaced by ones that do not, or nothing could be told from 1e-7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qexp.models.view import ModelView

VOCABULARY = 64
SEQUENCE = 12  # longer than the sliding windows below
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, **HEADS},
    "llama_tied": {
        "model_type": "llama", "tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 6,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 6, **HEADS},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **HEADS},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **HEADS},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], **HEADS},
    "gemma": {"model_type": "gemma", "head_dim": 8, **HEADS},
    "gemma2": {
        "model_type": "gemma2", "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **HEADS,
    },
    "gemma3": {
        "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 5, "num_attention_heads": 4,
        "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {"model_type": "opt", "ffn_dim": 40, "num_attention_heads": 4, "word_embed_proj_dim": 24, "dropout": 0.0},
}  # fmt: skip
POST_NORMS = ("gemma2", "gemma3")  # no rotation can be folded into their residual stream
UNKNOWN: dict[str, dict[str, Any]] = {  # architectures that have the generic view only
    "unknown": {"model_type": "gpt_neox", "num_attention_heads": 4, "hidden_dropout": 0.0},
    "phi3": {"model_type": "phi3", "resid_pdrop": 0.0, **HEADS},  # o is registered in front of qkv
    "bloom": {"model_type": "bloom", "num_attention_heads": 4, "hidden_dropout": 0.0},  # alibi [B * heads, 1, S]
}
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def toy(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **keys: Any) -> PreTrainedModel:
    """Return a random model of a family (or of ``UNKNOWN``) in eval mode; ``keys`` override its config."""
    config = AutoConfig.for_model(**{**COMMON, **(FAMILIES | UNKNOWN)[name], **keys})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        parameter.copy_(_drawn(path, parameter.shape, rng))
    if dtype == torch.float64:
        for path, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(path, ExactRmsNorm(module))
    return model.to(dtype)


def view_of(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **keys: Any) -> ModelView:
    """Return the view of :func:`toy`."""
    return ModelView(toy(name, dtype, seed, **keys))


def tokens(count: int = 4, length: int = SEQUENCE, seed: int = 1) -> Tensor:
    """Return random token ids int64 [count, length], none of them the padding id."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor | None = None, **given: Any) -> Tensor:
    """Return logits [B, S, V] without a cache."""
    return model(tokens() if ids is None else ids, use_cache=False, **given).logits


def distance(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest magnitude expected; NaN counts as infinite."""
    return float(((got - expected).abs().max() / expected.abs().max()).nan_to_num(nan=float("inf")))


class ExactRmsNorm(nn.Module):
    """A family's RMSNorm in the dtype of its input; Gemma's gain is 1 + w."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def _drawn(path: str, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Gains around 1 (Gemma's 1 + w around 2), biases around 0.2, everything else off centre."""
    drawn = torch.randn(shape, generator=rng, dtype=torch.float64)
    if len(shape) == 1:
        return 1 + 0.3 * drawn if "norm" in path and path.endswith("weight") else 0.2 + 0.3 * drawn
    return drawn + 0.1 if "embed" in path else (drawn + 0.1) * shape[-1] ** -0.5
