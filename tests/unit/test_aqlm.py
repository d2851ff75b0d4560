"""AQLM: sums of codewords, the search of codes, learned codebooks, and blocks tuned with codes frozen.

Source: methods/aqlm.md section 6.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_members import member
from torch import Tensor
from toy_models import distance, logits, tokens, view_of
from toy_recipes import a_run, linear_of, recipe, scene_of, short, stream_into

from qexp.core.codebooks import Beams, nearest_sums, summed
from qexp.core.errors import NumericalError, UserError
from qexp.core.linear import InputPath, QuantLinear
from qexp.core.rng import generator
from qexp.core.storage import pack_linear, packed_bytes, unpack_linear
from qexp.core.words import FULL_BITS, Layer, Quantized, Stats
from qexp.engine.blocks import quantize_blocks
from qexp.engine.checks import check_method, check_model
from qexp.engine.solving import plan_of, solve_group
from qexp.engine.tuning import tune_block
from qexp.stages.solver import _shared_sweep, beam
from qexp.stages.solver._shared_codewords import Search

IDS = tokens(16)
SMALL = {"dim": 4, "codebook_bits": 4}


def grid_of(w: int = 2, **settings: Any) -> Any:
    return member("grid", "additive", w=w, **{**SMALL, **settings})


def solver_of(**settings: Any) -> Any:
    return short(member("solver", "beam"), **{"training": {"steps": 20}, **settings})


def layer(seed: int = 0, outputs: int = 32, inputs: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(400, inputs, generator=rng) @ torch.randn(inputs, inputs, generator=rng) / inputs**0.5
    W = torch.randn(outputs, inputs, generator=rng) * torch.linspace(0.3, 3, outputs)[:, None]
    return W.to(dtype), stats((X.T @ X / 400).to(dtype))


def stats(H: Tensor) -> Stats:
    return Stats(tokens=1, H_II=H, low_I=-H[0], high_I=H[0], mean_abs_I=H[0], rows_TI=H)


def loss(W: Tensor, H: Tensor, grid: Any, solved: Quantized) -> float:
    D = (grid.decode(solved.codes, solved.params) - W).double()
    return float(((D @ H.double()) * D).sum())


def random_sums(seed: int, rows: int, groups: int, books: int, words: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [O, G, K], books [K, C, D] and scales [O], float64."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(words, (rows, groups, books), generator=rng)
    scale = torch.rand(rows, generator=rng, dtype=torch.float64) + 0.5
    return codes, torch.randn(books, words, dim, generator=rng, dtype=torch.float64), scale


class TestCodes:
    @given(st.integers(1, 16), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
    @settings(max_examples=60, deadline=None)
    def test_they_come_back_from_their_bytes_at_any_width(self, width: int, books: int, rows: int, seed: int) -> None:
        grid = replace(grid_of(), bits=books, dim=width, codebook_bits=width)
        rng = torch.Generator().manual_seed(seed)
        codes = torch.randint(1 << width, (rows, 3, books), generator=rng)
        codes = codes.to(torch.uint8 if width <= 8 else torch.int32)
        packed = grid.pack(codes)
        assert torch.equal(grid.unpack(packed, rows, 3), codes) and grid.unpack(packed, rows, 3).dtype == codes.dtype
        assert 0 <= 8 * packed.nbytes - width * codes.numel() < 8 * (8 + max(0, width - 8))

    def test_one_book_of_numbers_is_a_table_for_the_whole_weight(self) -> None:
        W, _ = layer()
        grid = grid_of(w=4, dim=1)
        params = grid.fit(W, None)
        table, scale = (t.double() for t in grid.books(params))
        assert table.shape == (1, 16, 1)
        nearest = (W.double() / scale[:, None])[..., None].sub(table[0, :, 0]).abs().argmin(-1)
        assert torch.equal(grid.encode(W, params)[..., 0].long(), nearest)

    @given(st.integers(0, 999))
    @settings(max_examples=20, deadline=None)
    def test_as_many_beams_as_words_find_the_nearest_sum_of_two(self, seed: int) -> None:
        _, books, _ = random_sums(seed, 1, 1, 2, 4, 3)
        X = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        least = torch.cdist(X, summed(books, every)).amin(1)
        found = nearest_sums(X, books, 4, 0, chunk=30)
        torch.testing.assert_close((X - summed(books, found)).norm(dim=1), least)

    def test_what_is_left_shrinks_with_every_book(self) -> None:
        W, _ = layer()
        grid = grid_of(w=4)
        books, scale = grid.books(grid.fit(W, None))
        X = (W / scale[:, None]).reshape(-1, 4)
        left = [float((X - summed(books[:k], nearest_sums(X, books[:k], 1, 0, 999))).norm()) for k in range(1, 5)]
        assert left == sorted(left, reverse=True) and left[0] < float(X.norm())

    def test_fewer_vectors_than_words_are_all_met(self) -> None:
        W = torch.randn(4, 8, generator=generator(0))
        grid = grid_of(w=4)
        params = grid.fit(W, None)
        torch.testing.assert_close(grid.decode(grid.encode(W, params), params), W, rtol=2e-3, atol=2e-3)

    def test_codebooks_are_one_set_in_memory_also_for_a_sweep(self) -> None:
        (W, about), grid = layer(), grid_of()
        params = grid.fit(W, None)
        alone = 2 * 16 * 4 * W.element_size()
        assert params["codebooks"].untyped_storage().nbytes() == alone
        sweep = _shared_sweep.Sweep.start(W, torch.arange(64), about.H_II, grid)
        sweep.use(params, torch.arange(64))
        assert sweep.params["codebooks"].untyped_storage().nbytes() == alone

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"codebook_bits": 3}, r"codebook_bits=3 for vectors of 2 x 4 = 8 bits; need a divisor.*codebook_bits=4"),
            ({"codebook_bits": 8}, r"2\^8 words for the 512 vectors.*4 vectors for each word.*codebook_bits=4"),
            ({"dim": 5}, r"grid.dim=5 does not divide in_features=64.*set method.grid.dim=8"),
        ],
    )
    def test_books_that_do_not_fit_are_refused_with_those_that_do(self, settings: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            grid_of(**settings).check(Layer("x", "q", 0, 32, 64))
        grid_of(**settings, w=FULL_BITS).check(Layer("x", "q", 0, 32, 64))

    def test_norms_beyond_float16_are_told(self) -> None:
        with pytest.raises(NumericalError, match="float16"):
            grid_of().fit(torch.full((4, 8), 1e5), None)


class TestSearch:
    @pytest.mark.parametrize("k", [0, 1, 2])
    def test_the_change_of_the_loss_is_exact_for_every_word(self, k: int) -> None:
        codes, books, scale = random_sums(1, 3, 4, 3, 8, 2)
        W, about = layer(1, 3, 8, torch.float64)
        H, here = about.H_II, slice(4, 6)
        decode = lambda codes: (summed(books, codes) * scale[:, None, None]).flatten(1)  # noqa: E731
        D = decode(codes) - W
        start = ((D @ H) * D).sum(1, keepdim=True)
        pull = scale[:, None, None] * (D @ H)[:, None, here]
        beams = Beams(codes[:, None, 2].clone(), pull, start, scale.square(), H[here, here])
        for other in (k, (k + 1) % 3):  # the second from eight beams: sums that have moved
            beams.replace(other, books[other], 64)
        assert beams.loss.shape == (3, 64)
        for row, m in itertools.product(range(3), range(64)):
            changed = codes.clone()
            changed[row, 2] = beams.codes[row, m]
            E = (decode(changed) - W)[row]
            assert float(beams.loss[row, m]) == pytest.approx(float(E @ H @ E), rel=1e-9)

    @given(st.integers(0, 999), st.sampled_from([1, 2, 5]))
    @settings(max_examples=20, deadline=None)
    def test_a_sweep_never_raises_the_loss_of_a_row(self, seed: int, beams: int) -> None:
        codes, books, scale = random_sums(seed, 5, 6, 2, 4, 2)
        W, about = layer(seed, 5, 12, torch.float64)
        found = self.swept(W, about.H_II, books, codes, scale, beams)
        before, after = (self.losses(W, about.H_II, books, c, scale) for c in (codes, found))
        assert (after <= before + 1e-9).all() and (after < before).any()

    @given(st.integers(0, 999))
    @settings(max_examples=20, deadline=None)
    def test_enough_beams_are_exhaustive_in_one_group(self, seed: int) -> None:
        codes, books, scale = random_sums(seed, 4, 1, 2, 4, 3)
        W, about = layer(seed, 4, 3, torch.float64)
        every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        all_losses = [self.losses(W, about.H_II, books, c.expand(4, 1, 2), scale) for c in every]
        wide, narrow = (self.swept(W, about.H_II, books, codes, scale, m) for m in (4, 1))
        wide_loss, narrow_loss = (self.losses(W, about.H_II, books, c, scale) for c in (wide, narrow))
        torch.testing.assert_close(wide_loss, torch.stack(all_losses).amin(0))
        assert (wide_loss <= narrow_loss + 1e-12).all()

    def test_uncorrelated_inputs_and_one_book_are_rounding_to_the_nearest_word(self) -> None:
        W, _ = layer()
        grid = grid_of(dim=2)
        params = grid.fit(W, None)
        books, scale = grid.books(params)
        start = torch.zeros(32, 32, 1, dtype=torch.int64)
        found = self.swept(W, torch.eye(64), books, start, scale, 1)
        assert torch.equal(found, grid.encode(W, params).long())

    def test_codes_of_a_weight_that_is_exactly_such_a_sum_stay(self) -> None:
        codes, books, scale = random_sums(0, 8, 6, 2, 16, 4)
        W = (summed(books, codes) * scale[:, None, None]).flatten(1)
        _, about = layer(0, 8, 24, torch.float64)
        for beams in (1, 3):
            assert torch.equal(self.swept(W, about.H_II, books, codes, scale, beams), codes)

    @staticmethod
    def losses(W: Tensor, H: Tensor, books: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        D = (summed(books, codes) * scale[:, None, None]).flatten(1) - W
        return ((D @ H) * D).sum(1)

    @staticmethod
    def swept(W: Tensor, H: Tensor, books: Tensor, codes: Tensor, scale: Tensor, beams: int) -> Tensor:
        D = (summed(books, codes) * scale[:, None, None]).flatten(1) - W
        visits = [(group, range(len(books))) for group in reversed(range(codes.shape[1]))]
        return Search(books, H, visits, beams)(codes, D, scale)


class TestSolver:
    def test_loss_falls_epoch_by_epoch_and_ends_far_below_plain_rounding(self) -> None:
        (W, about), grid = layer(), grid_of()
        found = [
            loss(W, about.H_II, grid, solver_of(epochs=n, tolerance=0).solve(W, about, grid, generator(0)))
            for n in range(5)
        ]
        assert found == sorted(found, reverse=True) and found[-1] < 0.7 * found[0]

    def test_it_ends_where_an_epoch_gains_too_little(self) -> None:
        (W, about), grid = layer(), grid_of()
        once = solver_of(epochs=1).solve(W, about, grid, generator(0))
        stopped = solver_of(epochs=50, tolerance=0.99).solve(W, about, grid, generator(0))
        assert torch.equal(once.codes, stopped.codes)

    @pytest.mark.parametrize("beams", [1, 4])
    def test_rows_in_chunks_give_the_same_codes(self, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
        (W, about), grid = layer(), grid_of()
        whole = solver_of(epochs=2, beams=beams).solve(W, about, grid, generator(0))
        monkeypatch.setitem(beam.CHUNK_ELEMENTS, "cpu", 64 * 7 * beams)
        parts = solver_of(epochs=2, beams=beams).solve(W, about, grid, generator(0))
        assert (whole.codes == parts.codes).float().mean() > 0.99  # sums of another shape may round differently

    def test_the_seed_decides_the_order(self) -> None:
        (W, about), grid = layer(), grid_of()
        first, again, other = (solver_of(epochs=2).solve(W, about, grid, generator(s)).codes for s in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_more_beams_are_not_worse_on_average(self) -> None:
        found = []
        for beams in (1, 6):
            losses = []
            for seed in range(3):
                (W, about), grid = layer(seed), grid_of()
                solved = solver_of(epochs=2, beams=beams).solve(W, about, grid, generator(0))
                losses.append(loss(W, about.H_II, grid, solved))
            found.append(sum(losses))
        assert found[1] < found[0]

    def test_at_two_bits_it_beats_gptq_in_groups_of_64(self) -> None:
        integer, grid = member("grid", "integer", w=2, g=64), grid_of()
        for seed in range(3):
            W, about = layer(seed, 128, 128)
            assert grid.cost(128, 128) < 2.26 < integer.cost(128, 128)
            gptq = member("solver", "gptq").solve(W, about, integer, generator(0))
            ours = solver_of(epochs=4).solve(W, about, grid, generator(0))
            assert loss(W, about.H_II, grid, ours) < 0.7 * loss(W, about.H_II, integer, gptq)

    def test_rows_of_zeros_and_silent_inputs_are_fine(self) -> None:
        (W, about), grid = layer(), grid_of()
        W[3] = 0
        solved = solver_of(epochs=2).solve(W, stats(about.H_II * 0), grid, generator(0))
        assert solved.params["codebooks"].isfinite().all()
        assert (grid.decode(solved.codes, solved.params)[3] == 0).all()

    def test_settings_that_mean_nothing_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"solver\.beams=0"):
            solver_of(beams=0)
        with pytest.raises(UserError, match=r"training\.betas=\[1\.0, 0\.9\]; need two numbers"):
            solver_of(training={"betas": [1.0, 0.9]})
        made = replace(recipe(), solver=solver_of())
        with pytest.raises(UserError, match=r"a search of codewords on Integer.*method/grid=additive"):
            check_method(made, calibrated=True)


TUNER = member("tuner", "codebook")["codebook"]
FEW = {"epochs": 4, "batch": 4, "measure_every": 0}


def aqlm(**settings: Any) -> Any:
    """Return the recipe at a size that fits a toy; ``settings`` of the method."""
    tuner = {"codebook": short(TUNER, training=FEW, rate=3e-3, norm_rate=3e-3)}
    made = replace(recipe(w=2), grid=grid_of(dim=2, codebook_bits=2), solver=solver_of(epochs=1), tuner=tuner)
    return replace(made, **settings)


class TestTuner:
    @pytest.mark.parametrize("solver", ["beam", "rtn", "gptq"])
    def test_a_block_is_not_worse_and_its_codes_stay(self, solver: str) -> None:
        view = view_of("llama", torch.float32)
        stream, kwargs = stream_into(view, 0, IDS)
        made = aqlm(solver=solver_of(epochs=1) if solver == "beam" else member("solver", solver))
        check_method(made, calibrated=True)
        check_model(view, made)
        plan, scene = plan_of(view, made, 0), scene_of(view, 0, stream, kwargs)
        for group in view.groups(0):
            solve_group(plan, group, about_inputs(group.layers[0].inputs))
        linears = {a.role: view.linear(a.name) for a in view.layers_of(0)}
        before = {role: (one.codes, one.params, one.weight.clone()) for role, one in linears.items()}
        (story,) = tune_block(plan, scene, {}, {}).values()
        assert story.outcome.best < 0.95 * story.outcome.start
        for role, linear in linears.items():
            codes, params, weight = before[role]
            assert linear.codes is codes and not torch.equal(linear.weight, weight)
            assert_stored(linear)
            again = QuantLinear(torch.nn.Linear(linear.in_features, linear.out_features, bias=False), InputPath(1))
            unpack_linear(again, linear.grid, *pack_linear(linear))
            assert again.params["codebooks"].stride(0) == 0, "one set in memory also behind the store"
            books = linear.params["codebooks"]
            assert books.stride(0) == 0 and not torch.equal(books, params["codebooks"])

    def test_nothing_learned_is_nothing_changed(self) -> None:
        W, _ = layer()
        grid = grid_of()
        params = grid.fit(W, None)
        values = TUNER.values(Quantized(grid.encode(W, params), params), grid)
        assert torch.equal(values.rounded(), grid.decode(grid.encode(W, params), params))
        (knobs,) = values.knobs
        assert [t.shape for t in knobs.tensors] == [(1, 1, 2, 16, 4), (32, 1)], "one set of codebooks is learned"
        values.rounded().square().sum().backward()
        assert all(float(t.grad.abs().sum()) > 0 for t in knobs.tensors)  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("name", "relative"),
        [
            *((name, True) for name in ("integer", "power_of_two", "kmeans", "nf4", "nvfp4")),
            *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("binary_coding", "pyramid")),
            *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("integer", "kmeans", "pyramid")),
        ],
    )
    def test_other_grids_are_learned_as_well(self, name: str, relative: bool, tmp_path: Path) -> None:
        view, bits = view_of("llama", torch.float32), 4 if name in ("nf4", "nvfp4") else 2
        own = {"integer": {"scale_dtype": "float16"}, "pyramid": {"dim": 8}}.get(name, {})
        grid = member("grid", name, w=bits, **own, **({} if name == "pyramid" else {"group": 8}))
        rate = (3e-3 if bits == 2 else 5e-4) if relative else 3e-4  # four bits are nearer to the best of them
        rates = {"rate": rate, "norm_rate": 3e-3 if bits == 2 else rate}
        tuner = {"codebook": short(TUNER, training=FEW, relative=relative, **rates)}
        bits_of = member("allocation", "uniform", w=bits)
        learned = aqlm(grid=grid, solver=member("solver", "gptq"), tuner=tuner, allocation=bits_of)
        first, _ = quantize_blocks(view, IDS, learned, a_run(tmp_path))
        assert first.learned["codebook"]["best"] < (0.99 if bits == 2 else 0.999) * first.learned["codebook"]["start"]
        linear, alone = linear_of(view, "q"), view_of("llama", torch.float32)
        assert_stored(linear)
        quantize_blocks(alone, IDS, replace(learned, tuner={}), a_run(tmp_path / "b"))
        assert torch.equal(linear.codes, linear_of(alone, "q").codes)
        assert not torch.equal(linear.weight, linear_of(alone, "q").weight)

    def test_a_grid_with_nothing_to_learn_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"learned values of Floating.*method/tuner=\[\]"):
            check_method(aqlm(grid=member("grid", "mxfp4"), solver=member("solver", "rtn")), calibrated=True)
        shifts = member("grid", "power_of_two", w=3, pow2=True)
        with pytest.raises(UserError, match="no free floating-point numbers"):
            check_method(aqlm(grid=shifts, solver=member("solver", "rtn")), calibrated=True)


def about_inputs(inputs: int) -> Stats:
    return stats(layer(0, 2, inputs)[1].H_II)


def assert_stored(linear: QuantLinear) -> None:
    """Assert that the weight is what codes and parameters say, and that storing these loses nothing."""
    assert linear.grid is not None and linear.codes is not None
    assert torch.equal(linear.weight, linear.grid.decode(linear.codes, linear.params))
    kinds = {name: getattr(torch, kept) for name, kept in linear.grid.formats.items() if isinstance(kept, str)}
    assert all(torch.equal(p, p.to(kinds[name]).to(p)) for name, p in linear.params.items() if name in kinds)


class TestModel:
    @pytest.mark.parametrize(
        "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3", "qwen3"))]
    )
    @pytest.mark.parametrize("inputs", ["quantized", "block"])
    def test_it_runs_on_every_kind_of_model_and_counts_its_bytes(
        self, family: str, inputs: str, tmp_path: Path
    ) -> None:
        view, truth = view_of(family, torch.float32), logits(view_of(family, torch.float32).model, IDS)
        reports = quantize_blocks(view, IDS, aqlm(inputs=inputs, grid=grid_of(w=4, dim=2)), a_run(tmp_path))
        assert [list(r.learned) for r in reports] == [["codebook"]] * 2
        answer = logits(view.model, IDS)
        assert float((answer - truth).pow(2).mean() / truth.pow(2).mean()) < 0.2
        for told in (told for report in reports for told in report.layers):
            linear = view.linear(told.name)
            assert told.bits == pytest.approx(8 * packed_bytes(linear) / linear.weight.numel(), rel=1e-3)

    def test_a_second_run_installs_the_same_weights(self, tmp_path: Path) -> None:
        first, again = (view_of("llama", torch.float32) for _ in range(2))
        quantize_blocks(first, IDS, aqlm(), a_run(tmp_path))
        quantize_blocks(again, IDS, aqlm(), a_run(tmp_path))  # finished blocks come from disk
        assert torch.equal(logits(first.model), logits(again.model))
        assert torch.equal(linear_of(first, "down").weight, linear_of(again, "down").weight)

    def test_layers_that_are_not_quantized_are_not_tuned(self, tmp_path: Path) -> None:
        view = view_of("llama", torch.float32)
        before = logits(view.model)
        quantize_blocks(view, IDS, aqlm(allocation=member("allocation", "uniform", w=16)), a_run(tmp_path))
        assert distance(logits(view.model), before) == 0
