"""GPTQ of one model by llmcompressor and by qexp: the same calibration tokens, the same windows, the same cores.

    taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/peer_llmcompressor.py <peer's python> \
        model=hf model.path=<folder> \
        calibration=local calibration.path=<text> calibration.samples=16 calibration.tokens=512 \
        eval.perplexity=[local] eval.local.path=<text> eval.window_tokens=512 eval.limit=10

The peer lives in a venv of its own (torch first, then llmcompressor; it pins another transformers). Both do W4A16,
groups of 128, symmetric with half a step cut (compressed-tensors' convention), static act-order, damping 0.01, and
leave lm_head.
Timed: from a loaded model and token ids to quantized weights in memory (for qexp this includes its block files).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import composed, machine, setup_of, table
from gptq_phases import PHASES
from meter import Meter
from safetensors.torch import load_file, save_file

from qexp.core.errors import UserError
from qexp.launch import Setup, begin
from qexp.run import measure

DEFAULTS = ["method=gptq", "method/grid=integer_half_step", "bits=w4a16g128", "tracking=none", "eval.divergence=false"]
OUTSIDE = (
    "load model",
    "calibration text",
    "evaluation text",
    "float baseline",
    "activation surfaces",
    "evaluate",
    "other",
)
PEER = Path(__file__).with_name("peer_llmcompressor_side.py")


def main(arguments: list[str]) -> None:
    """Run both and print the comparison."""
    python, overrides = arguments[0], [*DEFAULTS, *arguments[1:]]
    meter = Meter()
    for phase, places in PHASES.items():
        for place in places:
            meter.wrap(place, phase)
    with tempfile.TemporaryDirectory() as name:
        config = composed([*overrides, f"output_dir={name}"])
        setup = setup_of(config)
        with meter.running():
            measured = measure(setup, begin(setup))
        metrics = measured["metrics"]
        dataset = next(iter(config["eval"]["perplexity"]))
        cpu = sum(seconds for phase, seconds in meter.cpu.items() if phase not in OUTSIDE)
        peer = peer_result(python, setup, Path(name))
    rows = [
        row("float", None, metrics[f"fp/perplexity/{dataset}"], metrics[f"fp/perplexity/{dataset}"]),
        row("llmcompressor", peer, peer[f"perplexity/{dataset}"], metrics[f"fp/perplexity/{dataset}"]),
        row(
            "qexp",
            {"wall_seconds": measured["cost"]["quantize_seconds"], "cpu_seconds": cpu},
            metrics[f"perplexity/{dataset}"],
            metrics[f"fp/perplexity/{dataset}"],
        ),
    ]
    sys.stdout.write(f"{machine()}\npeer: {peer['versions']}\noverrides: {' '.join(overrides)}\n\n")
    sys.stdout.write(table(["", "wall s", "CPU s", "perplexity", "gap"], rows) + "\n")


def row(name: str, cost: dict[str, Any] | None, perplexity: float, baseline: float) -> list[str]:
    """Return one line of the table."""
    seconds = [f"{cost[key]:.1f}" for key in ("wall_seconds", "cpu_seconds")] if cost else ["", ""]
    return [name, *seconds, f"{perplexity:.3f}", f"{math.log(perplexity / baseline):.4f}"]


def peer_result(python: str, setup: Setup, folder: Path) -> dict[str, Any]:
    """Quantize with the peer in its own process, put its dequantized weights into our model and measure that."""
    work = begin(setup)
    model, tokenizer = setup.model.load(work.device, work.cache)
    tokens = setup.calibration.load(model, tokenizer, work.cache, work.model_identity)
    source = folder / "source"
    model.save_pretrained(source)
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    answer, weights = folder / "peer.json", folder / "peer.safetensors"
    subprocess.run(
        [python, PEER, source, folder / "tokens.safetensors", weights, answer],
        check=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    sets = setup.eval.sets(model, tokenizer, work.cache, work.model_identity)
    baseline = setup.eval.baseline(model, tokenizer, sets, work.cache / "baseline")
    missing = [name for name in load_file(weights) if name not in dict(model.named_parameters())]
    if missing:
        raise UserError(f"the peer quantized {missing[0]}, which our model lacks", "the same architecture")
    model.load_state_dict(load_file(weights), strict=False)
    metrics = setup.eval.run(model, tokenizer, sets, baseline).metrics
    return {**metrics, **json.loads(answer.read_text())}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"peer_llmcompressor: {error}")
