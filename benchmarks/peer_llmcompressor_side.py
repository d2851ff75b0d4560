"""The peer's half of peer_llmcompressor.py: runs in the peer's venv, imports nothing of qexp.

python peer_llmcompressor_side.py <model folder> <tokens.safetensors> <weights out> <answer out>
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, weights: str, answer: str) -> None:
    """Quantize the model of ``folder`` on int64 ``tokens`` [N, S]; write its dequantized linears and its seconds."""
    ids = load_file(tokens)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = [GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])]
    wall, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    on_grid = {f"{name}.weight": model.get_submodule(name).weight.detach().float().contiguous() for name in names}
    save_file(on_grid, weights)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("llmcompressor", "torch", "transformers"))
    Path(answer).write_text(json.dumps({**seconds, "versions": versions, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
