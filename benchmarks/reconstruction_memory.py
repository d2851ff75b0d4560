"""What learning block by block costs: seconds a block, and memory with 6, 12 and 24 blocks of equal size.

    python benchmarks/reconstruction_memory.py [--method omniquant_wa --bits w4a4 --hidden 256 --blocks 6 12 24]

Memory is the resident set in use: malloc gives every freed tensor back at once. ``peak`` is what the walk over the
blocks took at most, above the model that was loaded; of it ``kept`` stays for every block (its codes, one byte a
weight, and their parameters). If learning holds one block at a time, what is left does not grow with the blocks.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

from depths import MB, VOCABULARY, measured, random_view
from meter import Meter, resident_bytes


def learn(blocks: int, given: argparse.Namespace) -> dict[str, float]:
    """Quantize a random model by the recipe; return bytes and seconds."""
    import torch

    from qexp import compose
    from qexp.core.build import build
    from qexp.engine.blocks import quantize_blocks
    from qexp.engine.context import Run, quiet
    from qexp.engine.wants import trainings

    with compose.hydra():
        words = [f"method={given.method}", f"bits={given.bits}"]
        for key in trainings(build(compose.composed(words)["method"])):
            words += [f"method.{key}.training.epochs=0", f"method.{key}.training.steps={given.steps}"]
        method = build(compose.composed(words)["method"])
    view = random_view(blocks, given)
    tokens, meter = torch.randint(0, VOCABULARY, (given.samples, given.tokens)), Meter()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "memory", "0", 0, "cpu", quiet, Path(folder), "random", streams=given.streams)
        before, began = resident_bytes(), time.perf_counter()
        with meter.running(), meter.phase("walk"):
            quantize_blocks(view, tokens, method, run)
        seconds = (time.perf_counter() - began) / blocks
    linears = [view.linear(layer.name) for layer in view.layers]
    kept = sum(t.nbytes for linear in linears for t in (linear.codes, *linear.params.values()) if t is not None)
    weights = sum(p.nbytes for p in view.model.parameters())
    return {"before": before, "peak": meter.peak["walk"], "weights": weights, "kept": kept, "seconds": seconds}


def main() -> None:
    """Run every depth in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("hidden", 256), ("inner", 768), ("samples", 32), ("tokens", 512), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=size)
    for name, value in (("method", "omniquant_wa"), ("bits", "w4a4"), ("streams", "auto")):
        parser.add_argument(f"--{name}", default=value)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(learn(given.one, given)))
        return
    print(f"{platform.processor() or platform.machine()}, {given}")
    heads = ("blocks", "s/block", "weights", "kept", "peak above the model", "less kept")
    print("{:>6} {:>8} {:>9} {:>9} {:>21} {:>10}".format(*heads))
    for blocks in given.blocks:
        found = measured(__file__, blocks)
        above = (found["peak"] - found["before"]) / MB
        print(
            f"{blocks:>6} {found['seconds']:>8.2f} {found['weights'] / MB:>6.1f} MB {found['kept'] / MB:>6.1f} MB"
            f" {above:>18.1f} MB {above - found['kept'] / MB:>7.1f} MB"
        )


if __name__ == "__main__":
    main()
