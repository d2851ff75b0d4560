"""The hidden states that travel from block to block, and one block's forward over them.

A stream is the list of a block's inputs, one tensor [B, S, C] per micro-batch, on a shelf (shelf.py). Each block gets
the keyword arguments (mask, rotary tables, ...) that the model itself gives it, recorded once on one sequence: they
broadcast over the batch because all sequences have the same length and no padding. Where they do not (Bloom's alibi
has an entry for each sequence and head), a micro-batch is one sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qexp.models.view import ModelView  # transformers: seconds that a mistake in the config need not wait for

Stream = list[Tensor]
Kwargs = dict[str, Any]
Keep = Callable[[Tensor], Tensor]
MICRO_TOKENS = 2048  # tokens per micro-batch: they fill a matrix product, and freed activations are used again


class StopForward(Exception):
    """Raised by a hook that has seen what it came for; the rest of the forward is not needed."""


@torch.no_grad()
def embed(view: ModelView, tokens: Tensor, keep: Keep = Tensor.cpu) -> tuple[Stream, list[Kwargs]]:
    """Return the inputs of block 0 for int64 ``tokens`` [N, S] and every block's keyword arguments.

    ``keep`` puts a micro-batch where the stream is kept.
    """
    stream: Stream = []
    kwargs: list[Kwargs] = [{} for _ in view.blocks]
    if not len(tokens):
        return stream, kwargs

    def record(index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], given: Kwargs) -> None:
            assert len(args) <= 1, "a model that passes more than the hidden states by position"
            kwargs[index] = {k: v for k, v in given.items() if k != "hidden_states"}
            if index + 1 == len(kwargs):
                raise StopForward

        return hook

    def take(_module: nn.Module, args: tuple[Any, ...], given: Kwargs) -> None:
        x = args[0] if args else given["hidden_states"]
        stream.extend(keep(part) for part in ([x] if _broadcast(kwargs[0], given) else x.split(1)))
        raise StopForward

    def forward(batch: Tensor) -> None:
        with contextlib.suppress(StopForward):
            view.model(batch.to(view.model.device), use_cache=False)

    handles = [b.register_forward_pre_hook(record(i), with_kwargs=True) for i, b in enumerate(view.blocks)]
    try:
        forward(tokens[:1])
        handles.append(view.blocks[0].register_forward_pre_hook(take, with_kwargs=True, prepend=True))
        for batch in tokens.split(max(1, MICRO_TOKENS // tokens.shape[1])):
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return stream, kwargs


def _broadcast(one: Kwargs, many: Kwargs) -> bool:
    """Return whether the arguments of one sequence serve several, whose own are ``many``."""
    pairs = [(one[name], many.get(name)) for name in one]
    shapes = [(a.shape, b.shape) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim()]
    return all(a == b or a[0] == 1 for a, b in shapes)


@torch.no_grad()
def advance(view: ModelView, block: int, stream: Stream, kwargs: Kwargs, keep: Keep = Tensor.cpu) -> Stream:
    """Return the outputs of one block, which are the inputs of the next."""
    return [keep(answer) for answer in answers(view, block, stream, kwargs)]


def take(stream: Stream, chosen: Sequence[int]) -> Tensor:
    """Return some sequences of a stream, [B, S, C], in the order asked for."""
    each = len(stream[0])  # the last micro-batch may be smaller
    return torch.stack([stream[i // each][i % each] for i in chosen])


def answers(view: ModelView, block: int, stream: Stream, kwargs: Kwargs) -> Iterator[Tensor]:
    """Yield the block's answer per micro-batch; one that a hook cuts short by StopForward yields nothing."""
    device = view.model.device
    for batch, x in enumerate(stream):
        try:
            with view.replays.at(batch):
                answer = view.blocks[block](x.to(device), **kwargs)
        except StopForward:
            continue
        yield hidden_states(answer)


def hidden_states(answer: Any) -> Tensor:
    """Return what a module answers, without what some return beside it."""
    first: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return first
