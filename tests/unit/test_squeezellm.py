"""SqueezeLLM: squared gradients, the sparse part, and tables in a whole run.

Source: methods/squeezellm.md section 6.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_models import tokens, view_of
from toy_recipes import a_run, recipe

from qexp.core.errors import UserError
from qexp.core.sparse import Sparse
from qexp.core.storage import pack_linear, unpack_linear
from qexp.engine.blocks import quantize_blocks
from qexp.engine.checks import check_method
from qexp.engine.fisher import squared_gradients
from qexp.models.view import ModelView
from qexp.stages.transform.dense_sparse import DenseSparse

IDS = tokens(4)
SPLIT = {"dense_sparse": {"sensitive": 0.01, "outliers": 0.02}}


def gradients(view: ModelView, folder: Path, ids: Tensor = IDS) -> dict[str, Tensor]:
    return squared_gradients(view, ids, a_run(folder))


def test_squared_gradients_are_those_of_autograd(tmp_path: Path) -> None:
    view = view_of("llama", torch.float32)
    name = view.layers[3].name
    weight, expected = view.linear(name).weight, 0.0
    for ids in IDS.split(1):
        weight.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(view.model(input_ids=ids, labels=ids).loss, weight)
        expected = expected + gradient.square() / len(IDS)
    weight.requires_grad_(False)
    ours = gradients(view, tmp_path)
    torch.testing.assert_close(ours[name].float(), expected, rtol=1e-2, atol=0)  # bfloat16 has 8 bits
    assert all((value >= 0).all() and value.isfinite().all() for value in ours.values())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in view.model.parameters())


def test_the_order_of_sequences_does_not_matter(tmp_path: Path) -> None:
    view = view_of("llama")
    forth, back = gradients(view, tmp_path), gradients(view, tmp_path, IDS.flip(0))
    assert all(torch.equal(forth[name], back[name]) for name in forth)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10**6))
def test_the_sparse_part_comes_back_from_its_bytes(outputs: int, inputs: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    W, mask = torch.randn(outputs, inputs, generator=rng), torch.rand(outputs, inputs, generator=rng) < 0.2
    sparse = Sparse.of(mask, W)
    packed = sparse.packed()
    assert sum(t.nbytes for t in packed.values()) * 8 == sparse.nbits == 32 * (outputs + 1) + 32 * int(mask.sum())
    again = Sparse.unpacked(packed, inputs)
    blank = torch.full_like(W, 7)
    assert torch.equal(again.over(blank), torch.where(mask, W.half().float(), blank))
    assert torch.equal(again.cleared(W), torch.where(mask, 0, W))


def test_wide_layers_have_wide_columns() -> None:
    W = torch.zeros(2, 70000)
    W[1, 69999] = 3
    packed = Sparse.of(W != 0, W).packed()
    assert packed["column"].dtype == torch.int32
    assert torch.equal(Sparse.unpacked(packed, 70000).over(torch.zeros_like(W)), W)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> ModelView:
    view = view_of("llama", torch.float32)
    method = recipe("dense_sparse", grid="kmeans_fisher", w=3, **SPLIT)
    quantize_blocks(view, IDS, method, a_run(tmp_path_factory.mktemp("run")))
    return view


def test_kept_weights_are_exact_and_as_many_as_asked_for(quantized: ModelView) -> None:
    plain = view_of("llama", torch.float32)
    for layer in quantized.layers:
        linear, before = quantized.linear(layer.name), plain.linear(layer.name).weight
        assert abs(len(linear.sparse.value) - 0.03 * layer.weights) <= 2
        row, column = linear.sparse.row, linear.sparse.column
        assert torch.equal(linear.weight[row, column], before[row, column].half().float())
        largest = before.abs().flatten().argsort(descending=True)[: round(0.02 * layer.weights)]
        mask = torch.zeros(layer.weights, dtype=torch.bool)
        mask[row * layer.inputs + column] = True
        assert mask[largest].float().mean() > 0.9, "the largest are kept, but for those that count as sensitive"


def test_it_is_stored_and_comes_back(quantized: ModelView) -> None:
    for layer in quantized.layers[:3]:
        linear, fresh = quantized.linear(layer.name), view_of("llama", torch.float32).linear(layer.name)
        tensors, facts = pack_linear(linear)
        unpack_linear(fresh, linear.grid, tensors, facts)
        assert torch.equal(fresh.weight, linear.weight)
        stored = 8 * sum(t.nbytes for t in tensors.values())
        assert stored == pytest.approx(linear.cost() * layer.weights, abs=8 * len(tensors))


def test_no_fraction_is_no_sparse_part(tmp_path: Path) -> None:
    views = [view_of("llama", torch.float32) for _ in range(2)]
    nothing = {"dense_sparse": {"sensitive": 0.0, "outliers": 0.0}}
    for view, method in zip(
        views, (recipe("dense_sparse", grid="kmeans", w=3, **nothing), recipe(grid="kmeans", w=3)), strict=True
    ):
        quantize_blocks(view, IDS, method, a_run(tmp_path / str(id(view))))
    for layer in views[0].layers:
        assert torch.equal(views[0].linear(layer.name).weight, views[1].linear(layer.name).weight)


def test_gradients_of_other_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"smooth of a block changing weights.*method\.grid\.weights=hessian"):
        check_method(recipe("smooth", grid="kmeans_fisher"), calibrated=True)
    with pytest.raises(UserError, match="transforms behind dense_sparse"):
        check_method(recipe("dense_sparse", "smooth", grid="integer"), calibrated=True)
    with pytest.raises(UserError, match="calibration=none"):
        check_method(recipe(grid="kmeans_fisher"), calibrated=False)


def test_fractions_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"outliers=0\.7; need fractions below 0\.5"):
        DenseSparse(sensitive=0.0, outliers=0.7, places=["mlp_in"])
