"""The quantized linear layer, simulated: codes decode to the weight that a plain matrix product uses.

``QuantLinear`` replaces ``nn.Linear`` in the blocks of a model and computes the same numbers until something
is inserted or installed. Layers that read the same input share one ``InputPath``: the online maps and the
activation quantizer run once for q, k and v, not three times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qexp.core.maps import LinearMap
from qexp.core.sparse import Sparse
from qexp.core.stages import Grid
from qexp.core.words import FULL_BITS, Params, Quantized


class InputPath:
    """What happens to an input before its readers: ``maps`` in order, ``observer`` looks, ``act`` quantizes.

    The answer for one tensor is kept until every reader has had it, and not longer.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.maps: list[LinearMap] = []
        self.act: Callable[[Tensor], Tensor] | None = None
        self.ranges: Params = {}  # what an act quantizer keeps of this input: calibrated, or a learned clip
        self.kept = 0  # last columns that are not quantized
        self.observer: Callable[[Tensor], None] | None = None
        self._forget()

    def _forget(self) -> None:
        self._source: Tensor | None = None
        self._answer: Tensor | None = None
        self._steps: tuple[object, ...] = ()
        self._version, self._served = -1, 0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the quantized, transformed input, same shape and dtype as ``x`` [..., I]."""
        if not self.maps and self.act is None and self.observer is None:
            return x
        if x.is_inference():  # has no version, so a change in place could not be told: nothing is kept
            return self._compute(x)
        if self._answer is None or not self._is_kept(x):
            self._answer, self._served = self._compute(x), 0
            self._source, self._version, self._steps = x, x._version, self._now()
        answer = self._answer
        self._served += 1
        if self._served >= self.readers:
            self._forget()
        return answer

    def _now(self) -> tuple[object, ...]:
        return (self.act, self.observer, *self.maps)

    def _is_kept(self, x: Tensor) -> bool:
        """Return whether the kept answer is for ``x`` as it is, by the steps as they are."""
        if self._source is not x or self._version != x._version:
            return False
        now = self._now()
        return len(now) == len(self._steps) and all(a is b for a, b in zip(now, self._steps, strict=True))

    def _compute(self, x: Tensor) -> Tensor:
        for step in self.maps:
            x = step.apply(x)
        if self.observer is not None:
            self.observer(x)
        if self.act is None:
            return x
        if not self.kept:
            return self.act(x)
        return torch.cat([self.act(x[..., : -self.kept]), x[..., -self.kept :]], dim=-1)


class QuantLinear(nn.Module):
    """``nn.Linear`` with an input path and, once installed, codes: weight [O, I] = decode(codes, params).

    ``kept`` [O, K] are last columns without codes. ``unmap`` takes a map of the outputs back.
    """

    def __init__(self, linear: nn.Linear, path: InputPath) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.path = path
        self.grid: Grid | None = None
        self.codes: Tensor | None = None
        self.params: Params = {}
        self.kept: Tensor | None = None
        self.sparse: Sparse | None = None  # weights that stay out of quantization, over what codes say of them
        self.unmap: LinearMap | None = None
        self.clips: Tensor | None = None  # learned: how far the range of each row goes, for the solver

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b for x [..., I] after the input path."""
        y = nn.functional.linear(self.path(x), self.weight, self.bias)
        return y if self.unmap is None else self.unmap.undual(y)

    @torch.no_grad()
    def install(self, grid: Grid, quantized: Quantized) -> None:
        """Take codes and parameters; from now on the weight is what they decode to, in the layer's dtype."""
        self.grid, self.codes, self.params = grid, quantized.codes, quantized.params
        decoded = grid.decode(quantized.codes, quantized.params).to(self.weight)
        self.kept = None if quantized.kept is None else quantized.kept.half().to(self.weight)
        behind = self.weight if self.kept is None else torch.cat([decoded, self.kept], dim=1)
        self.weight.copy_(self.assembled(decoded, behind))

    def left(self, W: Tensor | None = None) -> Tensor:
        """Return what of the weight (or of ``W`` [O, I]) is to be quantized: no kept column, no outlier."""
        W = self.dense(W)
        return W[:, : W.shape[1] - self.path.kept]

    def dense(self, W: Tensor | None = None) -> Tensor:
        """Return the weight (or ``W`` [O, I]) without outliers, zeros in their place."""
        W = self.weight if W is None else W
        return W if self.sparse is None else self.sparse.cleared(W)

    def assembled(self, front: Tensor, W: Tensor | None = None) -> Tensor:
        """Return the weight [O, I], ``front`` for what is quantized; kept columns are its own, or those of ``W``."""
        last = (self.weight if W is None else W)[:, front.shape[1] :]
        whole = torch.cat([front, last.to(front)], dim=1) if last.shape[1] else front
        return whole if self.sparse is None else self.sparse.over(whole)

    def cost(self) -> float:
        """Return stored bits per weight, kept columns included."""
        if self.grid is None:
            return float(FULL_BITS)
        kept = 0 if self.kept is None else self.kept.shape[1]
        columns = self.in_features - kept
        dense = (self.grid.cost(self.out_features, columns) * columns + FULL_BITS * kept) / self.in_features
        return dense if self.sparse is None else dense + self.sparse.nbits / self.weight.numel()

    def extra_repr(self) -> str:
        """Return shape and state for ``print(model)``."""
        state = "float" if self.grid is None else f"{self.grid.bits} bits"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {state}, online={len(self.path.maps)}"
        )


def replace_linears(model: nn.Module, groups: list[tuple[str, ...]]) -> None:
    """Replace the named ``nn.Linear`` modules by ``QuantLinear``; each group of names shares an input path."""
    for names in groups:
        path = InputPath(len(names))
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, QuantLinear(linear, path))
