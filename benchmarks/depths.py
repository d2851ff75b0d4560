"""What the benchmarks of memory over depth share: random Llamas of equal blocks, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qexp.models.view import ModelView

MB = 1e6
HEADS = 8
VOCABULARY = 4096
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def random_view(blocks: int, sizes: argparse.Namespace) -> ModelView:
    """Return the view of a random model; ``sizes`` has ``hidden`` and ``inner``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qexp.models.view import ModelView

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=sizes.hidden, intermediate_size=sizes.inner, num_hidden_layers=blocks,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2,
    )  # fmt: skip
    return ModelView(LlamaForCausalLM(config).eval().requires_grad_(False))


def measured(script: str, blocks: int, *words: str, at_once: bool = True) -> dict[str, float]:
    """Return what ``script --one BLOCKS`` prints last; ``at_once``: its malloc gives every freed tensor back."""
    command = [sys.executable, script, *sys.argv[1:], "--one", str(blocks), *words]
    environment = os.environ | (AT_ONCE if at_once else {})
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found
