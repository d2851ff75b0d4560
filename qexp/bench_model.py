"""A finished run on packed integers beside its float model: prompt and decoding, seconds and memory.

Rows of op ``prefill`` (m: tokens of the prompt) and ``decode`` (m: 1; milliseconds per token), peers the float model in
bfloat16 and float32. The floor of decoding is the time to read the packed model once, at this machine's own rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qexp.bench_timing import Row, row
from qexp.core.cache import cache_folder
from qexp.core.errors import UserError
from qexp.engine.packing import PLAIN, pack_model
from qexp.eval.speed import Contender, Times, memory_bytes, time_rounds, workload
from qexp.finished import load
from qexp.kernels.ops import kernel_info

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]
OURS = "ours"


def rows(folder: Path, rounds: int, progress: Progress) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of the run in ``folder``, and facts about its models: kernels by count, bytes of weights.

    Raises: UserError if there is no finished run, or nothing of it can be packed.
    """
    from transformers import DynamicCache

    run = load(folder)
    packed = pack_model(run.view, run.method)
    if set(packed.kernels.values()) <= {PLAIN}:
        raise UserError(
            f"{folder} has nothing to pack: no layer has a uniform integer grid",
            "a run with an integer grid and weight bits below 16",
            "method/grid=integer bits=w4a16",
        )
    nn.Module.to(packed.model, torch.bfloat16)
    contenders = {OURS: Contender(packed.model, packed.new_cache)}
    for name, dtype in (("torch bf16", "bfloat16"), ("torch fp32", "float32")):
        model, _ = replace(run.source, dtype=dtype).load(run.device, cache_folder())
        contenders[name] = Contender(model, _cache_of(DynamicCache, model))
    return compare(contenders, rounds, progress), {
        "run": run.record["name"],
        "kernels": packed.counts(),
        "kv": "float" if packed.codec is None else f"{packed.codec.bits} bits",
        "weight_bytes": {name: memory_bytes(contender.model) for name, contender in contenders.items()},
    }


def compare(contenders: dict[str, Contender], rounds: int, progress: Progress) -> list[Row]:
    """Return the rows of prefill and decode; the contender called ``ours`` is the packed one."""
    work = workload(contenders[OURS].model, rounds)
    times = time_rounds(contenders, work, progress)
    length, backend = work.prompt.shape[1], str(kernel_info()["isa"])
    return [
        row(_about("prefill", backend, length), _milliseconds(times, "first"), None),
        row(_about("decode", backend, 1), _milliseconds(times, "token"), None),
    ]


def _cache_of(kind: Any, model: Any) -> Callable[[], Any]:
    return lambda: kind(config=model.config)


def _about(op: str, backend: str, tokens: int) -> dict[str, Any]:
    return {"op": op, "backend": backend, "m": tokens, "k": 0, "n": 0, "group": 0}


def _milliseconds(times: dict[str, Times], what: str) -> dict[str, list[float]]:
    return {name: [1e3 * seconds for seconds in getattr(each, what)] for name, each in times.items()}
