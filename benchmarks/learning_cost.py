"""What SpinQuant's learning costs: seconds a step, and memory with 6, 12 and 24 blocks of equal size.

    python benchmarks/learning_cost.py [--hidden 256 --inner 768 --batch 8 --tokens 512 --steps 3 --blocks 6 12 24]

Each depth runs in two processes: one is timed as a run would be; in the other malloc gives every freed tensor
back at once, so that the resident set is what is in use. Memory is that: the peak while learning ran above what there
was when it began (the model), of which the rotations with their gradients are counted apart. If learning keeps one
block's activations at a time, what is left does not grow with the blocks.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from depths import MB, VOCABULARY, measured, random_view
from meter import Meter, resident_bytes


def learn(blocks: int, sizes: argparse.Namespace) -> dict[str, float]:
    """Learn for a few steps on a random model; return bytes and seconds."""
    import torch

    from qexp import compose
    from qexp.core.build import build
    from qexp.core.memory import keep_freed_memory
    from qexp.engine.store import Store
    from qexp.engine.transforming import transform_model
    from qexp.engine.whole_model import Learning

    if not sizes.exact:
        keep_freed_memory()
    key = "method.transform.learned_rotation"
    settings = [f"{key}.steps={sizes.steps}", f"{key}.batch={sizes.batch}"]
    with compose.hydra():
        choice = compose.composed(["method=spinquant", "bits=w4a4kv4", *settings])
    method = build(choice["method"])
    view = random_view(blocks, sizes)
    tokens = torch.randint(0, VOCABULARY, (sizes.batch, sizes.tokens))
    weights = sum(p.nbytes for p in view.model.parameters())
    rotation = method.transform["learned_rotation"]
    numbers = sum((s.head_size or s.size) ** 2 for s in rotation.sites(view))
    done: list[float] = []

    before, meter = [], Meter()

    def watch(_: str, items: Any) -> Any:
        before.append(resident_bytes())
        for item in items:
            done.append(time.perf_counter())
            yield item
        done.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, meter.running(), meter.phase("learn"):
        transform_model(view, method, 0, Learning(tokens, Store(Path(folder), []), watch))
    seconds = sorted(b - a for a, b in pairwise(done))
    return {
        "weights": weights, "rotations": numbers * 8 * 2, "before": before[0], "peak": meter.peak["learn"],
        "seconds": seconds[len(seconds) // 2],
    }  # fmt: skip


def main() -> None:
    """Run every depth and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("hidden", 256), ("inner", 768), ("batch", 8), ("tokens", 512), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(learn(given.one, given)))
        return
    print(f"{platform.processor() or platform.machine()}, {given}")
    heads = ("blocks", "s/step", "weights", "rotations", "peak above the model", "less rotations")
    print("{:>6} {:>8} {:>9} {:>9} {:>21} {:>14}".format(*heads))
    for blocks in given.blocks:
        found = measured(__file__, blocks, "--exact")
        found |= {"seconds": measured(__file__, blocks, at_once=False)["seconds"]}
        above = found["peak"] - found["before"]
        print(
            f"{blocks:>6} {found['seconds']:>8.2f} {found['weights'] / MB:>6.1f} MB {found['rotations'] / MB:>6.2f} MB"
            f" {above / MB:>18.1f} MB {(above - found['rotations']) / MB:>11.1f} MB"
        )


if __name__ == "__main__":
    main()
