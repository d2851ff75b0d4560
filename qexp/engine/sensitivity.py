"""What quantizing one layer alone does to the model: the figures that an allocation by sensitivity asks for.

The float model is walked once, behind the transforms of model scope. In each block every layer is quantized at every
option by the recipe's own grid and solver (one that learns is stood for by rounding to nearest), activations in 16
bits, and measured:
    output   tr(D H Dᵀ) / tr(W H Wᵀ), D the change of the weight, H = E[x xᵀ] of its input
    fisher   1/2 sum F D², F the mean squared gradient of the loss
    trace    1/2 (Tr(H_W) / n) |D|², H_W the Hessian of the loss, its trace by Hutchinson's estimate
    kl       mean over tokens of KL(p || p'), p' with this layer quantized: the model runs on from this block

Source: methods/mixed_precision_lm.md section 3.2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qexp.core.learned import LearnedSolver
from qexp.core.measures import Measured
from qexp.core.method import Method
from qexp.core.ranges import sensed
from qexp.core.rng import generator
from qexp.core.words import FULL_BITS, Layer, Stats
from qexp.engine.capture import observe
from qexp.engine.context import Run
from qexp.engine.fisher import fisher_of, requiring, take_fisher
from qexp.engine.solving import quadratic
from qexp.engine.store import Finished
from qexp.engine.streams import advance, embed, hidden_states
from qexp.models.view import ModelView

log = logging.getLogger(__name__)

PROBES = 20  # of Hutchinson's estimate, spread over the sequences
Damages = dict[str, dict[int, float]]


class Table:
    """Damages and costs by layer and bits; figures that the allocation tells are kept."""

    def __init__(self, method: Method, damages: Damages) -> None:
        self.method, self.damages, self.told = method, damages, dict[str, float]()

    def damage(self, layer: Layer, bits: int) -> float:
        """Return what was measured; 16 bits do nothing."""
        return 0.0 if bits >= FULL_BITS else self.damages[layer.name][bits]

    def cost(self, layer: Layer, bits: int) -> float:
        """Return the stored bits per weight."""
        if bits >= FULL_BITS:
            return float(FULL_BITS)
        return self.method.grid.for_layer(layer, bits).cost(layer.outputs, layer.inputs)

    def tell(self, name: str, value: float) -> None:
        """Keep a figure for the record."""
        self.told[name] = value


def take_bits(view: ModelView, tokens: Tensor, method: Method, run: Run) -> None:
    """Leave the bits of all layers in the view, if the recipe measures them: computed once, kept on disk."""
    allocation = method.allocation
    if not isinstance(allocation, Measured) or method.grid.bits >= FULL_BITS:
        return

    def make() -> Finished:
        table = Table(method, measured(view, tokens, method, run))
        bits = method.allocation.assign(view.layers, table)
        facts = {"metric": allocation.metric, "bits": bits, "damages": table.damages, "told": table.told}
        return Finished({}, facts)

    view.allocation = run.store.once("allocation", make).facts
    counts = {b: sum(x == b for x in view.allocation["bits"].values()) for b in sorted(allocation.options)}
    log.info("bits by %s: %s", allocation.metric, ", ".join(f"{b}: {count} layers" for b, count in counts.items()))


@torch.no_grad()
def measured(view: ModelView, tokens: Tensor, method: Method, run: Run) -> Damages:
    """Return the damage of every layer at every option below 16 bits."""
    asked: Any = method.allocation
    options = sorted({bits for bits in asked.options if bits < FULL_BITS})
    few = tokens[: asked.sequences]
    take_fisher(view, tokens, method, run)
    weighing = _weighing(view, few, tokens, method, run)
    stream, kwargs = embed(view, tokens)
    judge = _Divergence(view, few, kwargs) if asked.metric == "kl" else None
    damages: Damages = {}
    for block in run.progress("measure layers", range(len(view.blocks))):
        known = observe(view, block, view.groups(block), stream, kwargs[block])
        for group in view.groups(block):
            for layer in group.layers:
                damages[layer.name] = {}
                for bits in options:
                    changed = _quantized(view, method, layer, bits, known[group.site], run.seed)
                    weight = view.linear(layer.name).weight
                    if judge is not None:
                        damages[layer.name][bits] = judge.of(block, weight, changed)
                    else:
                        damages[layer.name][bits] = weighing(layer, changed.float() - weight.float(), known[group.site])
        stream = advance(view, block, stream, kwargs[block])
        if judge is not None:
            judge.advance(block)
    return damages


def _quantized(view: ModelView, method: Method, layer: Layer, bits: int, stats: Stats, seed: int) -> Tensor:
    """Return the weight of a layer as the recipe would quantize it."""
    grid, W_OI = method.grid.for_layer(layer, bits), view.linear(layer.name).weight.float()
    grid = sensed(grid, view.fisher_of(layer.name)) if "fisher" in grid.needs else grid
    if isinstance(method.solver, LearnedSolver):
        params = grid.fit(W_OI, stats.H_II)
        return grid.decode(grid.encode(W_OI, params), params)
    solved = method.solver.solve(W_OI, stats, grid, generator(seed, layer.name))
    return grid.decode(solved.codes, solved.params)


def _weighing(
    view: ModelView, few: Tensor, tokens: Tensor, method: Method, run: Run
) -> Callable[[Layer, Tensor, Stats], float]:
    """Return what a change D of a layer's weight counts, by the metric."""
    asked: Any = method.allocation
    if asked.metric == "fisher":
        fisher = fisher_of(view, tokens, run)
        return lambda layer, D, _: 0.5 * float((fisher[layer.name].to(D) * D.square()).sum())
    if asked.metric == "trace":
        traces = hessian_traces(view, few, run)
        return lambda layer, D, _: 0.5 * traces[layer.name] / D.numel() * float(D.square().sum())

    def relative(layer: Layer, D: Tensor, stats: Stats) -> float:
        return quadratic(D, stats.H_II) / max(quadratic(view.linear(layer.name).weight.float(), stats.H_II), 1e-30)

    return relative


class _Divergence:
    """The divergence of next-token distributions where one layer has another weight."""

    def __init__(self, view: ModelView, tokens: Tensor, kwargs: list[dict[str, Any]]) -> None:
        self.view, self.kwargs = view, kwargs
        self.stream = [part[None] for batch in embed(view, tokens)[0] for part in batch]
        self.truth = [self._logs(x) for x in self._from(0)]

    def of(self, block: int, weight: Tensor, changed: Tensor) -> float:
        """Return the mean over tokens of KL(p || p') with ``changed`` in the place of a weight of this block."""
        kept = weight.clone()
        weight.copy_(changed)
        try:
            losses = [_kl(truth, self._logs(x)) for truth, x in zip(self.truth, self._from(block), strict=True)]
        finally:
            weight.copy_(kept)
        return sum(losses) / len(losses)

    def advance(self, block: int) -> None:
        """Go on to the next block."""
        self.stream = advance(self.view, block, self.stream, self.kwargs[block])

    def _from(self, block: int) -> list[Tensor]:
        """Return what leaves the last block, a sequence at a time."""
        answers = []
        for x in self.stream:
            state = x.to(self.view.model.device)
            for i in range(block, len(self.view.blocks)):
                state = hidden_states(self.view.blocks[i](state, **self.kwargs[i]))
            answers.append(state)
        return answers

    def _logs(self, x: Tensor) -> Tensor:
        """Return log-probabilities [S, V], float32, of one sequence x [1, S, C]."""
        family = self.view.described
        normed = self.view.model.get_submodule(family.final_norm)(x[0])
        logits = self.view.model.get_submodule(family.head)(normed).float()
        return self.view.capped(logits).log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def hessian_traces(view: ModelView, tokens: Tensor, run: Run) -> dict[str, float]:
    """Return the trace of each layer's Hessian of the loss, by Hutchinson's estimate E[vᵀ H v], v of random signs.

    One product with the Hessian of all layers serves each of them: what other layers add has mean zero.
    """
    weights = {layer.name: view.linear(layer.name).weight for layer in view.layers}
    found, rng = dict.fromkeys(weights, 0.0), generator(run.seed, "hessian traces")
    with requiring(view, weights.values()), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for probe in run.progress("Hessian traces", range(PROBES)):
            ids = tokens[[probe % len(tokens)]].to(view.model.device)
            loss = view.model(input_ids=ids, labels=ids, use_cache=False).loss
            first = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            signs = [torch.randint(2, g.shape, generator=rng).to(g) * 2 - 1 for g in first]
            second = torch.autograd.grad(first, list(weights.values()), signs)
            for name, sign, product in zip(weights, signs, second, strict=True):
                found[name] += float((sign * product).sum()) / PROBES
    return found
