"""Tokens per second of generation, measured: a prompt in one piece (prefill), then token by token (decode).

Contenders run in turns in one process, A B A B, so that whatever else the machine does meets all of them; a figure is
the median of its rounds. Batch 1, greedy. Time to first token is the prompt and the logits of its last position.
Memory is what a model keeps (weights and online maps) and the most it adds while it runs, sampled from outside.

Source: methods/evaluation.md section 6; kernels.md section 9 (interleaved medians).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PROMPT_TOKENS, DECODE_TOKENS, ROUNDS = 512, 32, 3
SAMPLE_SECONDS = 0.002
Progress = Callable[[str, Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Contender:
    """A model and how to make an empty KV cache for it."""

    model: Any
    new_cache: Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """What is generated: a prompt int64 [1, S], then ``decode_tokens`` more, ``rounds`` times."""

    prompt: Tensor
    decode_tokens: int = DECODE_TOKENS
    rounds: int = ROUNDS


@dataclass
class Times:
    """Seconds of each round: the prompt up to the first logits, and one decoded token on average."""

    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)


def workload(model: Any, rounds: int = ROUNDS) -> Workload:
    """Return a prompt of random tokens that fits the model's positions with what follows it."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or PROMPT_TOKENS + DECODE_TOKENS
    decode = max(1, min(DECODE_TOKENS, limit // 4))
    length = max(1, min(PROMPT_TOKENS, limit - decode))
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return Workload(ids, decode, rounds)


def measure(contenders: Mapping[str, Contender], work: Workload, progress: Progress) -> dict[str, dict[str, float]]:
    """Return the figures of each contender: ``prefill_tokens_per_s``, ``decode_tokens_per_s``, and so on.

    Units: seconds and bytes. Memory is sampled in a turn of its own, which also warms up.
    """
    peaks = {name: added_bytes(contender, work) for name, contender in contenders.items()}
    times = time_rounds(contenders, work, progress)
    return {name: _figures(times[name], contenders[name], peaks[name], work) for name in contenders}


def time_rounds(contenders: Mapping[str, Contender], work: Workload, progress: Progress) -> dict[str, Times]:
    """Return the seconds of every round, the contenders in turns; a turn of each before does not count."""
    times = {name: Times() for name in contenders}
    for turn in progress("measure speed, rounds", range(work.rounds + 1)):
        for name, contender in contenders.items():
            first, token = generate(contender, work)
            if turn:
                times[name].first.append(first)
                times[name].token.append(token)
    return times


def added_bytes(contender: Contender, work: Workload) -> int:
    """Return the most memory that generating takes beyond what was in use before."""
    _return_free_memory()
    with _highest() as added:
        generate(contender, work)
    return added[0]


@torch.no_grad()
def generate(contender: Contender, work: Workload) -> tuple[float, float]:
    """Return (seconds to the first token, seconds per token after it)."""
    model, cache = contender.model, contender.new_cache()
    device = next(iter(model.parameters())).device
    ids = work.prompt.to(device)
    began = _now(device)
    ids = _next(model, ids, cache)
    first = _now(device)
    for _ in range(work.decode_tokens):
        ids = _next(model, ids, cache)
    return first - began, (_now(device) - first) / work.decode_tokens


def _next(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Return the likeliest next token [1, 1] after ``ids``, which go into the cache.

    The head gets a copy of the last position, not a view into the prompt: for a view torch's matmul copies the whole
    head (seconds on a CPU), whatever the model. A cap on the logits does not change which is greatest.
    """
    hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[:, -1].clone())
    return logits.argmax(-1, keepdim=True)


def memory_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _figures(times: Times, contender: Contender, peak: int, work: Workload) -> dict[str, float]:
    first, token = statistics.median(times.first), statistics.median(times.token)
    weights = memory_bytes(contender.model)
    return {
        "prefill_tokens_per_s": work.prompt.shape[1] / first,
        "decode_tokens_per_s": 1 / token,
        "first_token_seconds": first,
        "weight_bytes": weights,
        "peak_bytes": weights + peak,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _highest() -> Iterator[list[int]]:
    """Give a list whose one number becomes the most bytes that were in use inside, beyond those at its start."""
    added, stop, start = [0], threading.Event(), _in_use()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            added[0] = max(added[0], _in_use() - start)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield added
    finally:
        stop.set()
        watcher.join()


def _return_free_memory() -> None:
    """Have the C library give freed memory back, or reusing it would not be seen as use; glibc alone can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _in_use() -> int:
    """Return the bytes in use on the GPU if there is one, else resident in memory; 0 where neither can be told."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
