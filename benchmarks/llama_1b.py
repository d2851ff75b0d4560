"""Generation of a Llama-3.2-1B-shaped model on packed integers beside the same model in bfloat16, batch 1.

    python benchmarks/llama_1b.py [--bits w4a8g128] [--head 16|8] [--blocks 16] [--rounds 5] [--prompt 512]

Weights are random (the shape decides the speed) and rounded to the nearest. The output head is tied to the embedding: a
fifth of the parameters, and half of what the packed model reads per token. It stays bfloat16, as in the simulation, or
goes to 8 bits (w8a8) with ``--head 8``; which of the two is printed.
Targets: prefill 1.3x, decoding 2.5x, weights in memory 0.45x of the bfloat16 model.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from bench import composed, machine, table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from qexp.core.build import build
from qexp.core.method import Method
from qexp.engine.blocks import activate
from qexp.engine.packing import PackedModel, pack_head, pack_model
from qexp.engine.solving import plan_of, solve_group
from qexp.eval.speed import Contender, Workload, measure
from qexp.models.view import ModelView
from qexp.tracking.progress import track

SHAPE = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}  # fmt: skip


def random_model(blocks: int) -> PreTrainedModel:
    """Return the model in bfloat16, the same weights each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPE, num_hidden_layers=blocks)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


@torch.no_grad()
def packed_model(model: PreTrainedModel, method: Method, head_bits: int) -> PackedModel:
    """Return the model rounded to the nearest and packed, block by block as a run does."""
    view = ModelView(model)
    plan = plan_of(view, method, 0)
    for block in track("round blocks", range(len(view.blocks))):
        for group in view.groups(block):
            solve_group(plan, group, None)
    activate(view, range(len(view.blocks)), method)
    packed = pack_model(view, method)
    if head_bits == 8:
        pack_head(packed, act_bits=8)
    nn.Module.to(packed.model, torch.bfloat16)
    return packed


def main() -> None:
    """Measure and print; see the module's docstring."""
    logging.basicConfig(level=logging.WARNING)
    given = _arguments()
    config = composed(["method=rtn", "method/grid=integer_symmetric", f"bits={given.bits}"])
    method: Method = build(config["method"], "method")
    plain = random_model(given.blocks)
    packed = packed_model(random_model(given.blocks), method, given.head)
    ids = torch.randint(SHAPE["vocab_size"], (1, given.prompt), generator=torch.Generator().manual_seed(0))
    pair = {
        "packed": Contender(packed.model, packed.new_cache),
        "bfloat16": Contender(plain, lambda: DynamicCache(config=plain.config)),
    }
    found = measure(pair, Workload(ids, given.tokens, given.rounds), track)
    print(machine())
    print(
        f"{given.blocks} blocks, {given.bits}, head {given.head} bits, kernels {packed.counts()}, prompt {given.prompt}"
    )
    print(table(["", "packed", "bfloat16", "ratio"], _lines(found)))
    if given.json:
        given.json.write_text(
            json.dumps({"machine": machine(), "settings": vars(given) | {"json": None}, **found}, default=str)
        )


def _lines(found: dict[str, dict[str, float]]) -> list[list[str]]:
    ours, theirs = found["packed"], found["bfloat16"]
    return [[key, f"{ours[key]:.4g}", f"{theirs[key]:.4g}", f"{ours[key] / theirs[key]:.2f}"] for key in ours]


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="w4a8g128")
    parser.add_argument("--head", type=int, choices=(8, 16), default=16)
    for name, default in (("blocks", 16), ("rounds", 5), ("prompt", 512), ("tokens", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
