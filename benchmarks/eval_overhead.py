"""What simulated quantization costs an evaluation: seconds of a fake-quantized model over those of the plain one.

    python benchmarks/eval_overhead.py [model=hf model.path=<folder> ...] [--tokens 2048] [--repeats 5]

Two models in one process, the same random tokens in windows of 512, rounds of plain and quantized in turn, medians.
"decoder" leaves out the output head, which nothing quantizes and which hides the cost where the vocabulary is
large. Weights are rounded to nearest without data: what is timed does not depend on their values. Aim: at most 1.3.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from bench import composed, machine, setup_of, table
from torch import Tensor

from qexp.core.errors import UserError
from qexp.engine.blocks import activate, quantize_blocks
from qexp.engine.transforming import transform_model
from qexp.launch import begin
from qexp.models.view import ModelView

RECIPES = {
    "rtn w8a8": ["method=rtn", "bits=w8a8"],
    "rtn w4a4kv4": ["method=rtn", "bits=w4a4kv4"],
    "quarot w4a4kv4": ["method=quarot", "method/solver=rtn", "method/grid=integer_symmetric", "bits=w4a4kv4"],
}
PLAIN = ["calibration=none", "tracking=none"]
WINDOW = 512


@torch.no_grad()
def quantized(model: Any, overrides: list[str], folder: str) -> Any:
    """Return a copy of the model quantized by a recipe without data."""
    setup = setup_of(composed([*PLAIN, *overrides, f"output_dir={folder}"]))
    view, run = ModelView(copy.deepcopy(model)), begin(setup)
    transform_model(view, setup.method, setup.seed)
    quantize_blocks(view, torch.empty(0, WINDOW, dtype=torch.long), setup.method, run)
    activate(view, range(len(view.blocks)), setup.method)
    return view.model


@torch.no_grad()
def seconds(model: Any, ids: Tensor) -> tuple[float, float]:
    """Return CPU seconds of the decoder and of decoder and head over int64 [N, S], one window at a time."""
    inner = whole = 0.0
    for window in ids.split(1):
        began = time.process_time()
        hidden = model.base_model(input_ids=window, use_cache=False).last_hidden_state
        inner += time.process_time() - began
        for piece in hidden[0].split(128):
            model.get_output_embeddings()(piece)
        whole += time.process_time() - began
    return inner, whole


def compare(plain: Any, other: Any, ids: Tensor, repeats: int) -> list[str]:
    """Return medians of interleaved rounds: plain, quantized and their ratio, for decoder and whole."""
    seconds(plain, ids[:1]), seconds(other, ids[:1])
    rounds = [(seconds(plain, ids), seconds(other, ids)) for _ in range(repeats)]
    cells = []
    for part in (0, 1):
        ratio = statistics.median(b[part] / a[part] for a, b in rounds)
        cells += [*(f"{statistics.median(r[i][part] for r in rounds):.2f}" for i in (0, 1)), f"{ratio:.2f}"]
    return cells


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the model, as for qexp")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setup = setup_of(composed([*PLAIN, *options.overrides, f"output_dir={folder}"]))
        run = begin(setup)
        model, _ = setup.model.load(run.device, run.cache)
        vocabulary = model.get_input_embeddings().num_embeddings
        windows = max(1, options.tokens // WINDOW)
        ids = torch.randint(vocabulary, (windows, WINDOW), generator=torch.Generator().manual_seed(0))
        for name, recipe in RECIPES.items():
            other = quantized(model, [*options.overrides, *recipe], folder)
            rows.append([name, *compare(model, other, ids, options.repeats)])
            del other
    header = ["recipe", "decoder s", "quantized s", "ratio", "with head s", "quantized s", "ratio"]
    sys.stdout.write(f"{machine()}\n{windows} windows of {WINDOW}, {options.repeats} rounds, CPU seconds\n\n")
    sys.stdout.write(table(header, rows) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"eval_overhead: {error}")
