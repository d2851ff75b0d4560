"""Replayed answers change the time of a run and none of its bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stage_members import member
from torch import nn
from toy_models import logits, tokens, view_of
from toy_recipes import a_run, recipe

from qexp.engine.blocks import quantize_blocks
from qexp.models.replay import Replays


class Counter(nn.Module):
    """Doubles its input and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * x


def holder() -> nn.Module:
    return nn.ModuleDict({"outer": nn.ModuleDict({"inner": Counter()})})


def test_a_finished_module_computes_once_per_batch_and_is_put_back() -> None:
    model = holder()
    replays, inner = Replays(model), model["outer"]["inner"]
    replays.finish("outer.inner")
    for _ in range(3):
        for batch in range(2):
            with replays.at(batch):
                answer = model.get_submodule("outer.inner")(torch.tensor(float(batch)))
            assert answer == 2 * batch
    assert inner.calls == 2 and model.get_submodule("outer.inner") is inner


def test_beyond_the_budget_it_computes_again() -> None:
    model = holder()
    replays = Replays(model, budget_bytes=4)  # one float
    replays.finish("outer.inner")
    for _ in range(2):
        for batch in range(2):
            with replays.at(batch):
                model.get_submodule("outer.inner")(torch.ones(1))
    assert model["outer"]["inner"].calls == 1 + 2


def test_finishing_the_outer_module_forgets_the_inner_and_clear_forgets_all() -> None:
    model = holder()
    replays = Replays(model)
    replays.finish("outer.inner")
    replays.finish("outer")
    with replays.at(0):
        assert type(model.get_submodule("outer")).__name__ == "_Replay"
    replays.clear()
    with replays.at(0):
        assert isinstance(model.get_submodule("outer"), nn.ModuleDict)


def quantized(name: str, budget: int, folder: Path, method: str) -> torch.Tensor:
    """Return the logits of a toy model after quantization with this budget for replays."""
    view = view_of(name, torch.float32)
    view.replays = Replays(view.model, budget)
    chosen = replace(
        recipe("fold_norm", "hadamard") if method == "rotated" else recipe(), solver=member("solver", "gptq")
    )
    if method == "activations quantized":
        chosen = replace(chosen, act=member("act", "per_token", a=8), quantize_stream=True)
    run = a_run(folder)
    quantize_blocks(view, tokens(), chosen, run)
    return logits(view.model)


@pytest.mark.parametrize("method", ["plain", "activations quantized"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_quantized_models_are_the_same_to_the_bit(name: str, method: str, tmp_path: Path) -> None:
    with_replays = quantized(name, 2**30, tmp_path / "a", method)
    assert torch.equal(with_replays, quantized(name, 0, tmp_path / "b", method))
