"""Models and a tokenizer small enough to build inside a test."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(61))]
BOS = 0


def word_tokenizer(*, adds_bos: bool = False, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, w0 to w60; ``adds_bos`` puts <s> in front by default, as LLaMA's does."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_model(*, vocabulary: int = 64, positions: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """A randomly initialised two-block Llama, float32, with logits wide enough that text is not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def table_model(table_VV: torch.Tensor) -> LlamaForCausalLM:
    """A Llama whose logits after token i are row i of ``table_VV``: the blocks add nothing, embeddings are one-hot."""
    size = table_VV.shape[0]
    model = tiny_model(vocabulary=size)
    config = LlamaConfig(**{**model.config.to_dict(), "hidden_size": size, "head_dim": 8, "tie_word_embeddings": False})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        # a one-hot row has root mean square 1 / sqrt(size), so the norm makes it sqrt(size)
        model.model.norm.weight.fill_(size**-0.5)
        model.lm_head = nn.Linear(size, size, bias=False)
        model.lm_head.weight.copy_(table_VV.T)
    return model


def constant_model(logits_V: torch.Tensor) -> LlamaForCausalLM:
    """A model that gives the same distribution after every token."""
    return table_model(logits_V.expand(len(logits_V), -1))
