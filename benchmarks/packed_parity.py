"""Is a packed model the simulated one? Perplexity of both for a finished run, and what rounding noise alone does.

    python benchmarks/packed_parity.py RUN_DIR [--limit 40] [--noise 3]

A packed layer agrees with its simulation to 3e-7 on equal inputs, but a value near a tie then falls to the other side
in the next layer, and a fragile model (few bits, large activations) carries that far. So beside the difference, with
its standard error over windows, stand simulations whose layer outputs are multiplied by 1 + 1.5e-7 times a normal
number: the packed model is as near as can be asked if it lies among them. The set is the first of the run's record.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import machine, table
from torch import Tensor, nn

from qexp.core.build import build
from qexp.core.linear import QuantLinear
from qexp.core.rng import generator
from qexp.engine.context import cache_folder
from qexp.engine.packing import pack_model
from qexp.eval.divergence import score_windows
from qexp.eval.perplexity import Loop, Reader, device_of, perplexity, reader
from qexp.finished import FinishedRun, load
from qexp.tracking.progress import track

NOISE = 1.5e-7  # relative, as of one float32 rounding more


def main() -> None:
    """Measure and print; see the module's docstring."""
    given = _arguments()
    run = load(given.run)
    windows = _windows(run, given.limit)
    source = reader(run.view.model, windows[:1])  # made before anything is noisy, or it distrusts what it reads
    with torch.no_grad():
        simulated = _losses(source, run, windows)
        answers = {f"noise {seed}": _noisy_losses(source, run, windows, seed) for seed in range(given.noise)}
        packed = pack_model(run.view, run.method)
        answers["packed"] = _losses(source, run, windows)
    print(machine())
    print(f"{run.record['name']}: {packed.counts()}; {len(windows)} windows of {windows.shape[1]} tokens")
    print(table(["", "perplexity", "difference %", "standard error %"], _lines(simulated, answers)))


def _windows(run: FinishedRun, limit: int) -> Tensor:
    evaluation = build({**run.record["config"]["eval"], "limit": limit}, "eval")
    model, tokenizer = run.source.load(run.device, cache_folder())
    sets = evaluation.sets(model, tokenizer, cache_folder(), "packed parity", track)
    return next(iter(sets.values()))


def _losses(source: Reader, run: FinishedRun, windows: Tensor) -> list[float]:
    loop = Loop(4, device_of(run.view.model), track)
    return score_windows(source, windows, None, loop, "windows").losses


def _noisy_losses(source: Reader, run: FinishedRun, windows: Tensor, seed: int) -> list[float]:
    """Return the losses of the simulation with noise behind every quantized layer."""
    rng = generator(seed, "packed parity")

    def add(_module: nn.Module, _args: Any, answer: Tensor) -> Tensor:
        return answer * (1 + NOISE * torch.randn(answer.shape, generator=rng).to(answer.device))

    layers: list[QuantLinear] = [run.view.linear(layer.name) for layer in run.view.layers]
    removers: list[Callable[[], None]] = [layer.register_forward_hook(add).remove for layer in layers]
    try:
        return _losses(source, run, windows)
    finally:
        for remove in removers:
            remove()


def _lines(simulated: list[float], answers: dict[str, list[float]]) -> list[list[str]]:
    lines = [["simulated", f"{perplexity(simulated):.3f}", "", ""]]
    for name, losses in answers.items():
        apart = [100 * (a - b) for a, b in zip(losses, simulated, strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
        lines.append([name, f"{perplexity(losses):.3f}", f"{statistics.fmean(apart):+.3f}", f"{error:.3f}"])
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--limit", type=int, default=40, help="windows")
    parser.add_argument("--noise", type=int, default=3, help="simulations with noise")
    return parser.parse_args()


if __name__ == "__main__":
    main()
