"""The walk over the blocks against direct computations: streams, statistics, solves, errors, what is left float."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_members import member
from torch import Tensor
from toy_models import FAMILIES, UNKNOWN, distance, logits, tokens, toy, view_of
from toy_recipes import a_run, recipe

from qexp.core.method import Method
from qexp.core.rng import generator
from qexp.core.stages import Measures
from qexp.core.words import Layer, Quantized, Stats
from qexp.engine import streams
from qexp.engine.blocks import activate, quantize_blocks
from qexp.engine.capture import observe
from qexp.engine.solving import plan_of, solve_group
from qexp.engine.streams import advance, embed
from qexp.models.view import ModelView

IDS = tokens(count=6)
GPTQ = member("solver", "gptq")


@pytest.fixture(autouse=True)
def _micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences a micro-batch: three of them, so that summing over batches is part of every test."""
    monkeypatch.setattr(streams, "MICRO_TOKENS", 2 * IDS.shape[1])


@contextmanager
def inputs_of(view: ModelView) -> Iterator[dict[str, Tensor]]:
    """Record what enters every layer, and every block, in the forwards inside."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def take(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            seen[name] = (args[0] if args else given["hidden_states"]).detach().clone()

        return take

    modules = {layer.name: view.linear(layer.name) for layer in view.layers}
    modules |= {str(index): block for index, block in enumerate(view.blocks)}
    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def seen_in_a_forward(view: ModelView) -> dict[str, Tensor]:
    with inputs_of(view) as seen:
        logits(view.model, IDS)
    return seen


def second_moment(x: Tensor) -> Tensor:
    flat = x.flatten(0, -2).double()
    return flat.T @ flat / len(flat)


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """A solver that rounds and keeps the statistics it was given, by the first row of the weight."""

    kept: list[Stats | None]
    version = 1
    needs = frozenset({"activations"})

    def solve(self, W_OI: Tensor, stats: Stats | None, grid: Any, rng: torch.Generator) -> Quantized:
        self.kept.append(stats)
        params = grid.fit(W_OI, None)
        return Quantized(grid.encode(W_OI, params), params)


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """An allocation that leaves some roles at 16 bits."""

    full: Sequence[str]
    version = 1

    def assign(self, layers: Iterable[Layer], measures: Measures) -> dict[str, int]:
        return {layer.name: 16 if layer.role in self.full else 4 for layer in layers}


class TestStreams:
    @pytest.mark.parametrize("family", [*FAMILIES, *UNKNOWN])
    def test_they_are_the_hidden_states_of_a_forward(self, family: str) -> None:
        view = view_of(family)
        expected = seen_in_a_forward(view)
        stream, kwargs = embed(view, IDS)
        assert [len(x) for x in stream] == ([1] * 6 if family == "bloom" else [2, 2, 2])
        for block in range(len(view.blocks)):
            assert distance(torch.cat(stream), expected[str(block)]) < 1e-13
            stream = advance(view, block, stream, kwargs[block])

    @pytest.mark.parametrize("family", ["gemma2", "gemma3"])
    def test_each_block_gets_its_own_kind_of_mask(self, family: str) -> None:
        """The sliding window (5) is shorter than the sequence (12): the other block's mask gives another answer."""
        view = view_of(family)
        stream, kwargs = embed(view, IDS)
        right = torch.cat(advance(view, 0, stream, kwargs[0]))
        assert distance(right, torch.cat(advance(view, 0, stream, kwargs[1]))) > 1e-3
        assert distance(right, seen_in_a_forward(view)["1"]) < 1e-13

    def test_no_calibration_is_an_empty_stream(self) -> None:
        view = view_of("llama")
        stream, kwargs = embed(view, torch.empty(0, 12, dtype=torch.long))
        assert stream == [] and kwargs == [{}, {}]
        assert advance(view, 0, stream, kwargs[0]) == []

    def test_no_hook_stays_behind(self) -> None:
        view = view_of("llama")
        embed(view, IDS)
        assert all(not block._forward_pre_hooks for block in view.blocks)


class TestStatistics:
    @pytest.mark.parametrize("family", [*FAMILIES, *UNKNOWN])
    def test_they_are_those_of_a_direct_computation(self, family: str) -> None:
        view = view_of(family)
        expected = seen_in_a_forward(view)
        stream, kwargs = embed(view, IDS)
        for block in range(len(view.blocks)):
            found = observe(view, block, view.groups(block), stream, kwargs[block])
            assert list(found) == [group.site for group in view.groups(block)]
            for group in view.groups(block):
                stats, x = found[group.site], expected[group.layers[-1].name]
                assert stats.tokens == IDS.numel()
                assert stats.H_II.dtype == torch.float32
                assert distance(stats.H_II, second_moment(x)) < 1e-6
                assert distance(stats.absmax_I, x.abs().flatten(0, -2).amax(0)) < 1e-6
                assert distance(stats.mean_abs_I, x.abs().flatten(0, -2).mean(0)) < 1e-6
            stream = advance(view, block, stream, kwargs[block])

    def test_stopping_early_changes_nothing(self) -> None:
        view = view_of("qwen3")
        stream, kwargs = embed(view, IDS)
        groups = view.groups(0)
        together = observe(view, 0, groups, stream, kwargs[0])
        for group in groups:
            alone = observe(view, 0, [group], stream, kwargs[0])[group.site]
            assert torch.equal(alone.H_II, together[group.site].H_II)
            assert torch.equal(alone.absmax_I, together[group.site].absmax_I)

    def test_stopping_early_saves_the_rest_of_the_block(self) -> None:
        view = view_of("llama")
        stream, kwargs = embed(view, IDS)
        with inputs_of(view) as seen:
            observe(view, 0, view.groups(0)[:1], stream, kwargs[0])
        assert view.groups(0)[-1].layers[0].name not in seen

    def test_no_observer_stays_behind(self) -> None:
        view = view_of("llama")
        stream, kwargs = embed(view, IDS)
        observe(view, 0, view.groups(0), stream, kwargs[0])
        assert all(view.linear(layer.name).path.observer is None for layer in view.layers)

    def test_activations_that_are_not_finite_are_told(self) -> None:
        view = view_of("llama")
        stream, kwargs = embed(view, IDS)
        stream[1][0, 3, 5] = float("nan")
        with pytest.raises(Exception, match=r"NaN or Inf at the input of model\.layers\.0\.self_attn\.q_proj"):
            observe(view, 0, view.groups(0), stream, kwargs[0])


class TestSolving:
    @pytest.mark.parametrize("grid", ["integer", "integer_symmetric_mse"])
    def test_stacking_equals_separate_solves(self, grid: str) -> None:
        view = view_of("llama", torch.float32)
        stream, kwargs = embed(view, IDS)
        plan = plan_of(view, replace(recipe(grid=grid, w=3), solver=GPTQ), 0)
        group = view.groups(0)[0]
        stats = observe(view, 0, [group], stream, kwargs[0])[group.site]
        weights = {layer.name: view.linear(layer.name).weight.clone() for layer in group.layers}
        solve_group(plan, group, stats)
        assert len(group.layers) == 3
        for layer in group.layers:
            alone = GPTQ.solve(weights[layer.name], stats, plan.grids[layer.name], generator(0, layer.name))
            linear = view.linear(layer.name)
            assert torch.equal(linear.codes, alone.codes)
            assert all(torch.equal(linear.params[key], value) for key, value in alone.params.items())

    def test_one_range_for_a_tensor_is_not_stacked(self) -> None:
        """Stacked, q, k and v would share a range; group 0 means one for each."""
        view = view_of("llama", torch.float32)
        stream, kwargs = embed(view, IDS)
        method = recipe(w=4)
        plan = plan_of(view, replace(method, grid=replace(method.grid, group=0)), 0)
        group = view.groups(0)[0]
        view.linear(group.layers[0].name).weight.mul_(10)
        weights = [view.linear(layer.name).weight.clone() for layer in group.layers]
        solve_group(plan, group, observe(view, 0, [group], stream, kwargs[0])[group.site])
        for layer, W in zip(group.layers, weights, strict=True):
            step = (W.max() - W.min()) / 15
            assert (view.linear(layer.name).weight - W).abs().max() <= 0.51 * step

    def test_reported_errors_are_those_of_a_direct_computation(self) -> None:
        view = view_of("qwen3", torch.float32)
        x = seen_in_a_forward(view)
        stream, kwargs = embed(view, IDS)
        plan = plan_of(view, recipe(w=3), 0)
        known = observe(view, 0, view.groups(0), stream, kwargs[0])
        for group in view.groups(0):
            weights = {layer.name: view.linear(layer.name).weight.double().clone() for layer in group.layers}
            reports = solve_group(plan, group, known[group.site])
            assert [report.name for report in reports] == [layer.name for layer in group.layers]
            for layer, report in zip(group.layers, reports, strict=True):
                W, flat = weights[layer.name], x[layer.name].flatten(0, -2).double()
                change = view.linear(layer.name).weight.double() - W
                relative = (flat @ change.T).pow(2).sum() / (flat @ W.T).pow(2).sum()
                assert report.error == pytest.approx(float(relative), rel=1e-4)
                assert report.sqnr_db == pytest.approx(
                    float(10 * torch.log10(W.pow(2).sum() / change.pow(2).sum())), rel=1e-4
                )
                assert report.bits == pytest.approx(plan.grids[layer.name].cost(layer.outputs, layer.inputs))


class TestTheWalk:
    """Statistics come from the stream that the recipe names, as the finished model shows."""

    def walk(self, folder: Path, family: str = "llama", **keys: Any) -> tuple[ModelView, list[Stats | None]]:
        kept: list[Stats | None] = []
        act = keys.pop("act", "none")
        method = replace(recipe(act=act, a=4, w=3), solver=Recorder(kept=kept), **keys)
        view = view_of(family, torch.float32)
        quantize_blocks(view, IDS, method, a_run(folder))
        return view, kept

    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt", *UNKNOWN])
    def test_quantized_inputs(self, family: str, tmp_path: Path) -> None:
        """Every group has seen all groups before it quantized: what it was given is what it reads in the end."""
        view, kept = self.walk(tmp_path, family, inputs="quantized")
        final, floating = seen_in_a_forward(view), seen_in_a_forward(view_of(family, torch.float32))
        groups = [group for block in range(2) for group in view.groups(block)]
        assert len(kept) == len(groups)
        for group, stats in zip(groups, kept, strict=True):
            name = group.layers[0].name
            assert distance(stats.H_II, second_moment(final[name])) < 1e-4
        assert distance(kept[-1].H_II, second_moment(floating[groups[-1].layers[0].name])) > 1e-2

    @pytest.mark.parametrize("family", ["llama", "gemma3", *UNKNOWN])
    def test_float_inputs(self, family: str, tmp_path: Path) -> None:
        view, kept = self.walk(tmp_path, family, inputs="float")
        floating = seen_in_a_forward(view_of(family, torch.float32))
        groups = [group for block in range(2) for group in view.groups(block)]
        for group, stats in zip(groups, kept, strict=True):
            assert distance(stats.H_II, second_moment(floating[group.layers[0].name])) < 1e-5

    @pytest.mark.parametrize("family", ["llama", "gemma3", *UNKNOWN])
    def test_block_inputs(self, family: str, tmp_path: Path) -> None:
        """A block sees the blocks before it quantized and itself float."""
        view, kept = self.walk(tmp_path, family, inputs="block")
        final, floating = seen_in_a_forward(view), seen_in_a_forward(view_of(family, torch.float32))
        first, second = ([group.layers[0].name for group in view.groups(block)] for block in range(2))
        for name, stats in zip(first, kept[: len(first)], strict=True):
            assert distance(stats.H_II, second_moment(floating[name])) < 1e-5
        assert distance(kept[len(first)].H_II, second_moment(final[second[0]])) < 1e-4
        for model in (final, floating):
            assert distance(kept[-1].H_II, second_moment(model[second[-1]])) > 1e-3

    @pytest.mark.parametrize("on", [False, True])
    def test_activation_quantizers_in_the_stream(self, on: bool, tmp_path: Path) -> None:
        view, kept = self.walk(tmp_path, inputs="quantized", act="per_token", quantize_stream=on)
        given = kept[len(view.groups(0))]
        assert given is not None
        silent = view_of("llama", torch.float32)
        quantize_blocks(silent, IDS, replace(recipe(w=3), solver=Recorder(kept=[])), a_run(tmp_path / "silent"))
        name = view.groups(1)[0].layers[0].name
        without = second_moment(seen_in_a_forward(silent)[name])
        activate(silent, range(2), recipe(act="per_token", a=4))
        with_them = second_moment(seen_in_a_forward(silent)[name])
        assert distance(with_them, without) > 1e-2
        assert distance(given.H_II, with_them if on else without) < 1e-4

    def test_resuming_any_prefix_gives_the_same_model(self, tmp_path: Path) -> None:
        method = replace(recipe("fold_norm", "smooth", w=3), solver=GPTQ, inputs="float")
        whole = view_of("llama", torch.float32)
        quantize_blocks(whole, IDS, method, a_run(tmp_path))
        (tmp_path / "blocks" / "00001.safetensors").unlink()
        again = view_of("llama", torch.float32)
        quantize_blocks(again, IDS, method, a_run(tmp_path))
        assert torch.equal(logits(whole.model, IDS), logits(again.model, IDS))

    @pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
    def test_every_weight_decodes_from_its_codes(self, family: str, tmp_path: Path) -> None:
        view = view_of(family, torch.float32)
        quantize_blocks(view, IDS, replace(recipe("smooth", w=3), solver=GPTQ), a_run(tmp_path))
        for layer in view.layers:
            linear = view.linear(layer.name)
            assert linear.codes.dtype == torch.uint8 and int(linear.codes.max()) < 2**3
            assert torch.equal(linear.weight, linear.grid.decode(linear.codes, linear.params).float())


class TestWhatStaysFloat:
    def sixteen(self) -> Method:
        method = recipe(w=4)
        return replace(method, allocation=member("allocation", "none"))

    @pytest.mark.parametrize("family", [*FAMILIES, *UNKNOWN])
    def test_sixteen_bits_leave_the_model_exactly_as_it_was(self, family: str, tmp_path: Path) -> None:
        plain = toy(family, torch.float32)
        view = view_of(family, torch.float32)
        assert quantize_blocks(view, IDS, self.sixteen(), a_run(tmp_path)) == []
        activate(view, range(2), self.sixteen())
        assert torch.equal(logits(view.model, IDS), logits(plain, IDS))
        assert all(view.linear(layer.name).codes is None for layer in view.layers)

    def test_layers_at_sixteen_bits_are_not_touched(self, tmp_path: Path) -> None:
        view, plain = view_of("llama", torch.float32), view_of("llama", torch.float32)
        method = replace(recipe(w=4), allocation=Mixed(full=["v", "down"]))
        reports = quantize_blocks(view, IDS, method, a_run(tmp_path))
        assert [len(report.layers) for report in reports] == [5, 5]
        for layer in view.layers:
            same = torch.equal(view.linear(layer.name).weight, plain.linear(layer.name).weight)
            assert same == (layer.role in ("v", "down"))
