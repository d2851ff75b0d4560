"""How far a quantized model is from the float one: KL(float || quantized) per token and top-1 agreement.

The float model answers once: its last hidden states are on disk and its output embedding is copied, so its logits can
be made again, piece by piece, beside the quantized ones. One pass gives loss, KL and agreement. Both sides use the same
pieces and dtype, so a model compared with itself gives exactly 0 and 1.
Source: methods/evaluation.md section 1.4 (these separate methods long before perplexity does).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.eval.perplexity import Loop, Reader, hidden_states

CACHE_ELEMENTS = 2**18  # 1 MiB of float32: the second-level cache of one core


@dataclass(frozen=True)
class Teacher:
    """The float model's answer on one set: a reader whose head is a copy, and its hidden states [W, S, C] in a file."""

    reader: Reader
    file: Path

    def hidden(self) -> Iterator[Tensor]:
        """Yield the hidden states [S, C] of window after window; only one is in memory."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as tensors:
            rows = tensors.get_slice("hidden")
            for index in range(rows.get_shape()[0]):
                yield rows[index]


@dataclass(frozen=True)
class Scores:
    """Per window: mean token loss and, with a teacher, mean KL(float || quantized) in nats and share of equal top-1."""

    losses: list[float]
    kl: list[float]
    top1: list[float]


def frozen(source: Reader) -> Reader:
    """Return a reader whose head survives what quantization does to the model's."""
    return replace(source, head=copy.deepcopy(source.head))


@torch.no_grad()
def score_windows(source: Reader, windows_WS: Tensor, teacher: Teacher | None, loop: Loop, label: str) -> Scores:
    """Score int64 windows [W, S] in one pass over them."""
    scores = Scores([], [], [])
    other = _shared(teacher.reader, source.head) if teacher else None
    answers = teacher.hidden() if teacher else itertools.repeat(None, len(windows_WS))
    for (ids, hidden), answer in zip(
        hidden_states(source, windows_WS, loop, f"evaluate {label}, batches"), answers, strict=True
    ):
        loss, kl, top1 = score_window(source, hidden, ids, other, answer)
        scores.losses.append(loss)
        if teacher:
            scores.kl.append(kl)
            scores.top1.append(top1)
    return scores


def score_window(
    source: Reader, hidden_SC: Tensor, ids_S: Tensor, other: Reader | None, answer_SC: Tensor | None
) -> tuple[float, float, float]:
    """Return (loss, kl, top1), means over the S - 1 predictions of one window; float32 logits, float64 sums."""
    sums, count = torch.zeros(3, dtype=torch.float64), len(ids_S) - 1
    for start in range(0, count, source.chunk()):
        here = slice(start, min(start + source.chunk(), count))
        logits_TV = source.logits(hidden_SC[here])
        targets_T = ids_S[here.start + 1 : here.stop + 1]
        sums[0] += F.cross_entropy(logits_TV, targets_T, reduction="none").double().sum().cpu()
        if other is not None and answer_SC is not None:
            reference_TV = other.logits(answer_SC[here].to(logits_TV.device))
            sums[1] += divergence(reference_TV, logits_TV).sum().cpu()
            sums[2] += (reference_TV.argmax(-1) == logits_TV.argmax(-1)).double().sum().cpu()
    loss, kl, top1 = (sums / count).tolist()
    return loss, kl, top1


def divergence(reference_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """Return KL(reference || model) in nats per token, float64 [T], of two float32 logits [T, V].

    On the CPU a few tokens at a time: seven passes over what fits the cache take a fifth of the time.
    """
    few = max(1, CACHE_ELEMENTS // logits_TV.shape[-1]) if logits_TV.device.type == "cpu" else len(logits_TV)
    pieces = zip(reference_TV.split(few), logits_TV.split(few), strict=True)
    return torch.cat([_divergence(reference, logits) for reference, logits in pieces])


def _divergence(reference_TV: Tensor, logits_TV: Tensor) -> Tensor:
    p_TV, q_TV = reference_TV.log_softmax(-1), logits_TV.log_softmax(-1)
    # 0 * (-inf - x) is nan, where the limit is 0: a masked token has no probability to diverge with
    return torch.where(p_TV.isneginf(), 0.0, p_TV.exp() * (p_TV - q_TV)).sum(-1, dtype=torch.float64)


def _shared(reader: Reader, head: nn.Module) -> Reader:
    """Use the other model's head when it is equal: then equal hidden states give equal bits, wherever weights lie."""
    ours, theirs = reader.head.state_dict(), head.state_dict()
    same = type(reader.head) is type(head) and ours.keys() == theirs.keys()
    same = same and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return replace(reader, head=head) if same else reader
