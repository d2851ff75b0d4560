"""Squared gradients of the model's loss: how much each weight matters, once, before any block is quantized.

F = mean over sequences of (d loss / d W)², loss the mean next-token cross-entropy of one sequence: the gradient of the
whole sequence is squared, not that of each token. Sums are float32; what is kept is bfloat16, since only ratios count.
A gradient is spent as soon as it is there, so that one layer's is in memory at a time.

Source: arXiv:2306.07629 section 4.1; methods/squeezellm.md sections 3 and 5. Differs: sums in float32, where the
official code adds in bfloat16 and loses small terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qexp.core.method import Method
from qexp.engine.context import Run
from qexp.engine.store import Finished
from qexp.engine.wants import needs_fisher
from qexp.models.view import ModelView

SEQUENCES = 100  # the paper's; its ablation is flat from 10 on


def take_fisher(view: ModelView, tokens: Tensor, method: Method, run: Run) -> None:
    """Leave the squared gradients of all layers in the view, if the recipe reads them: computed once, kept on disk."""
    if needs_fisher(method):
        view.fisher = fisher_of(view, tokens, run)


def fisher_of(view: ModelView, tokens: Tensor, run: Run) -> dict[str, Tensor]:
    """Return the squared gradients of all layers by name: taken once in a run."""
    return run.store.once("fisher", lambda: Finished(squared_gradients(view, tokens, run), {})).tensors


@contextmanager
def requiring(view: ModelView, weights: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients be taken of these weights, and of nothing else of the model."""
    view.model.requires_grad_(False)
    try:
        for weight in weights:
            weight.requires_grad_()
        with torch.enable_grad():
            yield
    finally:
        view.model.requires_grad_(False)


def squared_gradients(view: ModelView, tokens: Tensor, run: Run) -> dict[str, Tensor]:
    """Return F [O, I], bfloat16, by layer, from int64 tokens [N, S]."""
    weights = {layer.name: view.linear(layer.name).weight for layer in view.layers}
    sums = {name: torch.zeros(weight.shape, device=weight.device) for name, weight in weights.items()}

    def spend(name: str) -> object:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            sums[name] += weight.grad.float().square()
            weight.grad = None

        return hook

    chosen = tokens[:SEQUENCES].to(view.model.device)
    with requiring(view, weights.values()):
        handles = [weight.register_post_accumulate_grad_hook(spend(name)) for name, weight in weights.items()]
        try:
            for ids in run.progress("squared gradients", chosen.split(1)):
                view.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    return {name: (total / len(chosen)).bfloat16().cpu() for name, total in sums.items()}
