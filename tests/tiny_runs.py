"""Runs of the command on a model so small that one takes seconds: in this process, or in one that can be killed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from tiny_lm import word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
SMALL = ("calibration.samples=8", "calibration.tokens=32", "eval.limit=4", "eval.window_tokens=32", "tracking=none")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, both streams."""

    code: int
    out: str
    err: str


def save_tiny(folder: Path, **sizes: Any) -> Path:
    """Save a random causal LM with its tokenizer in ``folder``; ``sizes`` override its config."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **sizes}))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def tiny(model: Path, out: Path, *overrides: str) -> list[str]:
    """Return the overrides of a small run on ``model`` with results in ``out``."""
    return ["model=hf", f"model.path={model}", f"output_dir={out}", *SMALL, *overrides]


def command(*overrides: str) -> Outcome:
    """Run ``qexp OVERRIDES`` in this process and put its logging back."""
    from qexp.cli import main

    root, out, err = logging.getLogger(), io.StringIO(), io.StringIO()
    before, code = (root.handlers[:], root.level, logging.getLogger("qexp").level), 0
    try:
        with (
            mock.patch("sys.argv", ["qexp", *overrides]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        logging.getLogger("qexp").setLevel(before[2])
    return Outcome(code, out.getvalue(), err.getvalue())


def process(*arguments: str, script: str = "from qexp.cli import main; main()", **environment: str) -> Outcome:
    """Run ``script`` with ``arguments`` in a Python process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, **environment}, timeout=600,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def record_below(folder: Path) -> dict[str, Any]:
    """Return the only record below ``folder``."""
    (file,) = folder.glob("*/record.json")
    return json.loads(file.read_text())


def blocks_below(folder: Path) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Return tensors and facts of every stored block, the seconds it took left out."""
    return {path.name: _block(path) for path in sorted(folder.glob("*/blocks/*.safetensors"))}


def _block(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        report = facts.get("report", {})  # what a transform learned is no block
        for told in (report, *report.get("learned", {}).values()):
            told.pop("seconds", None)
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118


def assert_same_blocks(got: Path, expected: Path) -> None:
    """Assert that two runs stored the same blocks bit for bit."""
    ours, theirs = blocks_below(got), blocks_below(expected)
    assert ours.keys() == theirs.keys() != set()
    for name, (tensors, facts) in ours.items():
        assert facts == theirs[name][1]
        assert tensors.keys() == theirs[name][0].keys()
        assert all(torch.equal(value, theirs[name][0][key]) for key, value in tensors.items()), name
