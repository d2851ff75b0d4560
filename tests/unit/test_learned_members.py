"""What the specs of OmniQuant, AffineQuant, LRQ, EfficientQAT and Norm Tweaking say must hold, member by member."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_members import member
from toy_models import FAMILIES, distance, logits, tokens, view_of
from toy_recipes import a_run, linear_of, recipe, scene_of, short, stream_into

from qexp.core import rewrite
from qexp.core.compound_maps import HeadMaps
from qexp.core.distance import distance as loss_of
from qexp.core.errors import UserError
from qexp.core.ranges import within
from qexp.core.rng import generator
from qexp.core.words import Insert
from qexp.engine.blocks import activate, quantize_blocks
from qexp.engine.candidate import quantizers
from qexp.engine.checks import check_method
from qexp.engine.solving import plan_of
from qexp.engine.streams import hidden_states
from qexp.engine.transforming import transform_block
from qexp.engine.tuning import tune_model
from qexp.engine.whole_model import NextToken
from qexp.models.view import ModelView
from qexp.stages.solver.rtn import Rtn
from qexp.stages.transform.affine import mask

IDS = tokens(16)
W_OI = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 24)[:, None]
GRIDS = ("integer", "integer_symmetric", "integer_half_step", "midrise")
SOLVERS = ("flexround", "lrq", "signround", "block_ap")


def rounding(name: str, grid: str = "integer", w: int = 3, g: int = 16, **settings: Any) -> Any:
    solver = short(member("solver", name), **settings)
    return solver.rounding(W_OI, None, member("grid", grid, w=w, g=g), generator(0))


class TestSolversThatLearn:
    @pytest.mark.parametrize("name", SOLVERS)
    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("group", [-1, 16])
    def test_they_start_as_plain_rounding_bit_for_bit(self, name: str, grid: str, group: int) -> None:
        begun, plain = rounding(name, grid, g=group), member("grid", grid, w=3, g=group)
        expected = Rtn().solve(W_OI, None, plain, generator(0))
        got = begun.quantized()
        assert torch.equal(got.codes, expected.codes)
        assert all(torch.equal(got.params[key], expected.params[key]) for key in expected.params)
        assert torch.equal(begun.rounded().detach(), plain.decode(expected.codes, expected.params))

    @pytest.mark.parametrize("name", SOLVERS)
    @pytest.mark.parametrize("grid", GRIDS)
    def test_what_is_kept_decodes_to_what_was_trained(self, name: str, grid: str) -> None:
        """Bit for bit, wherever training has led."""
        moved, plain = rounding(name, grid), member("grid", grid, w=3, g=16)
        rng = generator(1)
        with torch.no_grad():
            for tensor in (t for knob in moved.knobs for t in knob.tensors):
                tensor += 0.2 * torch.randn(tensor.shape, generator=rng)
            moved.project()
        kept = moved.quantized()
        assert torch.equal(moved.rounded().detach(), plain.decode(kept.codes, kept.params))
        assert int(kept.codes.max()) <= 7 and kept.codes.dtype == torch.uint8
        assert not torch.equal(kept.codes, rounding(name, grid).quantized().codes)

    def test_lrq_has_the_parameters_that_the_paper_counts(self) -> None:
        outputs, inputs, rank = 24, 64, 5
        count = sum(t.numel() for t in rounding("lrq", g=-1, rank=rank).knobs[0].tensors)
        assert count == rank * (outputs + inputs) + 2 * outputs + inputs
        assert sum(t.numel() for t in rounding("flexround", g=-1).knobs[0].tensors) == outputs * inputs + 2 * outputs
        assert rounding("lrq", g=-1, rank=1024).factors["L"].shape == (24, 12), "half of the smaller side at most"

    def test_low_rank_factors_can_say_what_full_ones_do(self) -> None:
        full, low = rounding("flexround"), rounding("lrq", rank=12)
        with torch.no_grad():
            low.factors["L"].normal_(generator=generator(2)).mul_(0.1)
            full.factors["S"].copy_(low.factors["L"] @ low.factors["U"])
        assert torch.equal(full.quantized().codes, low.quantized().codes)

    def test_the_pull_on_a_factor_is_proportional_to_its_weight(self) -> None:
        one = rounding("flexround", w=8)
        one.rounded().sum().backward()
        begun = one.begun
        levels = (begun.W / begun.scale[..., None]).round() + begun.zero[..., None]
        inside = ((levels > 0) & (levels < 255)).flatten(1)
        gradient = one.factors["S"].grad
        torch.testing.assert_close(gradient[inside], -W_OI[inside], rtol=1e-5, atol=1e-6)

    def test_gradients_of_block_ap_are_the_closed_forms(self) -> None:
        one = rounding("block_ap", w=2, g=-1)
        with torch.no_grad():
            one.scale *= 0.6  # so that weights are cut on both sides
        scale, zero = one.begun.met(one.scale).detach(), one.zero.detach().round()
        level = (W_OI / scale).round()
        below, above = level + zero < 0, level + zero > 3
        one.rounded().sum().backward()
        inside = ~(below | above)
        assert below.any() and above.any() and inside.any()
        torch.testing.assert_close(one.W.grad.flatten(1), inside.float())
        ds = torch.where(inside, level - W_OI / scale, torch.where(below, -zero, 3 - zero))
        torch.testing.assert_close(one.scale.grad, ds.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)
        dz = torch.where(inside, 0.0, -scale)
        torch.testing.assert_close(one.zero.grad, dz.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)

    def test_offsets_and_ranges_of_signround_stay_within_bounds(self) -> None:
        one = rounding("signround", rate=1.0)
        with torch.no_grad():
            for tensor in one.knobs[0].tensors:
                tensor += 3
        one.project()
        assert float(one.V.max()) == 0.5 and float(one.low.max()) == 1
        assert rounding("signround", training={"steps": 100}).knobs[0].rate == pytest.approx(0.01)
        assert rounding("signround", training={"steps": 1000}).knobs[0].rate == pytest.approx(0.002)
        assert rounding("signround", w=4, training={"steps": 1000}).knobs[0].rate == pytest.approx(0.001)

    def test_values_that_are_not_evenly_spaced_are_refused(self) -> None:
        class Other:
            group, needs = -1, frozenset[str]()

        with pytest.raises(UserError, match=r"learns on the values of Other; need a uniform grid"):
            member("solver", "lrq").solve(W_OI, None, Other(), generator(0))


LEVELS = ("power_of_two", "additive_power_of_two", "midrise", "nf4", "fp8", "mxfp4")
WIDE = {"additive_power_of_two": 4, "nf4": 4, "fp8": 8, "mxfp4": 4}


class TestLatentWeights:
    @staticmethod
    def begun(grid: str, **settings: Any) -> tuple[Any, Any]:
        values = member("grid", grid, w=WIDE.get(grid, 3), g=16)
        return short(member("solver", "latent"), **settings).rounding(W_OI, None, values, generator(0)), values

    @pytest.mark.parametrize("grid", LEVELS)
    def test_it_starts_as_plain_rounding_and_keeps_the_last_forward_pass(self, grid: str) -> None:
        one, values = self.begun(grid)
        expected = Rtn().solve(W_OI, None, values, generator(0))
        assert torch.equal(one.quantized().codes, expected.codes)
        with torch.no_grad():
            for tensor in (t for knob in one.knobs for t in knob.tensors):
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator(1))
        kept = one.quantized()
        assert torch.equal(one.rounded().detach(), values.decode(kept.codes, kept.params))
        assert torch.equal(kept.codes, values.encode(one.W.detach(), kept.params)), "the nearest of the latent weight"
        assert not torch.equal(kept.codes, expected.codes)

    @pytest.mark.parametrize("grid", LEVELS)
    def test_gradients_are_the_closed_forms(self, grid: str) -> None:
        one, values = self.begun(grid)
        with torch.no_grad():
            one.W *= 1.5  # so that weights are cut
        pulled = torch.randn(W_OI.shape, generator=generator(3))
        one.rounded().backward(pulled)
        kept = one.quantized()
        scale = kept.params["scale"].repeat_interleave(W_OI.shape[1] // kept.params["scale"].shape[1], 1)
        inside = (one.least * scale <= one.W) & (one.largest * scale >= one.W)
        assert inside.any() and not inside.all()
        torch.testing.assert_close(one.W.grad, inside * pulled)
        if one.moved.grad is None:
            assert grid == "mxfp4", "scales that are powers of two stay"
            return
        levels = values.decode(kept.codes, kept.params) / scale
        ds = (levels - inside * one.W.detach() / scale) * pulled * scale
        expected = ds.unflatten(1, (one.moved.shape[1], -1)).sum(2)
        torch.testing.assert_close(one.moved.grad, expected, rtol=1e-3, atol=1e-4)

    def test_a_slice_of_zeros_stays_and_teaches_nothing_that_is_not_finite(self) -> None:
        values, W = member("grid", "power_of_two", w=3, g=16), W_OI.clone()
        W[3, :16] = 0
        one = member("solver", "latent").rounding(W, None, values, generator(0))
        one.rounded().sum().backward()
        assert not one.rounded()[3, :16].any()
        assert one.W.grad.isfinite().all() and one.moved.grad.isfinite().all()

    def test_grids_with_more_than_a_scale_are_refused_before_any_work(self) -> None:
        method = recipe(grid="kmeans", w=3)
        with pytest.raises(UserError, match=r"levels of KMeans; need a grid of levels times a scale"):
            check_method(replace(method, solver=member("solver", "latent")), calibrated=True)


class TestClip:
    @pytest.mark.parametrize("grid", GRIDS[:3])
    @pytest.mark.parametrize("logit", [30.0, 4.0])
    def test_no_cut_is_plain_rounding_and_a_start_is_rounding_in_the_cut_range(self, grid: str, logit: float) -> None:
        plain = member("grid", grid, w=3, g=16)
        tuner = replace(member("tuner", "clip")["clip"], start=logit)
        made = tuner.ranges({"w": (24, 4)}).make()
        ratios = made.clips.weights["w"].detach()
        learned = plain.imitate(W_OI, ratios).detach()
        params = within(plain, ratios).fit(W_OI, None)
        assert torch.equal(learned, plain.decode(plain.encode(W_OI, params), params))
        whole = plain.decode(plain.encode(W_OI, p := plain.fit(W_OI, None)), p)
        assert torch.equal(learned, whole) == (logit == 30)

    def test_each_group_has_a_range_of_its_own(self) -> None:
        view = view_of("llama", torch.float32)
        tuner = short(member("tuner", "clip")["clip"], training={"steps": 6}, rate=0.5)
        made = replace(recipe(w=2), tuner={"clip": tuner}, grid=member("grid", "integer", w=2, g=8))
        stream, kwargs = stream_into(view, 0, IDS)
        stories = transform_block(plan_of(view, made, 0), scene_of(view, 0, stream, kwargs), stream)
        assert stories["clip"].outcome.best < stories["clip"].outcome.start
        clips = linear_of(view, "q").clips
        assert clips is not None and clips.shape == (24, 3, 2) and len(clips.unique()) > 24


class TestTransforms:
    def test_maps_of_keys_that_do_not_commute_with_positions_are_refused(self) -> None:
        cases = {("llama", "per_head"): False, ("llama", "rotary"): True, ("opt", "per_head"): True}
        for (family, kind), fine in (cases | {("qwen3", "rotary"): False}).items():
            view = view_of(family)
            before = logits(view.model)
            site = view.sites("keys")[0]
            d, heads = site.head_size, site.size // site.head_size
            rng = generator(0)
            scale, turn = (0.3 * torch.randn(heads, d // 2, generator=rng, dtype=torch.float64) for _ in range(2))
            a, b = torch.diag_embed(scale.exp() * turn.cos()), torch.diag_embed(scale.exp() * turn.sin())
            pairs = torch.cat([torch.cat([a, b], 2), torch.cat([-b, a], 2)], 1)
            free = torch.eye(d).double() + 0.1 * torch.randn(heads, d, d, generator=rng, dtype=torch.float64)
            insert = Insert(kind, HeadMaps(pairs if kind == "rotary" else free))
            if not fine:
                with pytest.raises(UserError, match="which rotary embeddings do not commute with"):
                    rewrite.insert(view.model, site, insert)
                continue
            weights = linear_of(view, "k").weight.clone()
            rewrite.insert(view.model, site, insert)
            assert distance(logits(view.model), before) < 1e-9
            assert distance(linear_of(view, "k").weight, weights) > 0.01

    def test_shifts_are_learned_where_norms_have_biases(self) -> None:
        for family, expected in (("opt", {"attn_in", "mlp_in"}), ("llama", set())):
            view = view_of(family, torch.float32)
            let = member("transform", "let")["let"]
            part, sites = part_of(view, let)
            inserts = part.make().inserts
            assert {site.kind for site in sites if inserts[site.name].shift is not None} == expected

    def test_the_mask_opens_from_the_diagonal_to_everything(self) -> None:
        open_, closed = mask(6, 1.0, 0.1), mask(6, 0.0, 0.1)
        assert torch.equal(closed, torch.eye(6)) and torch.equal(open_, torch.eye(6) * 0.9 + 0.1)
        counts = [int((mask(6, epoch / 19, 0.1) > 0).sum()) for epoch in range(20)]
        assert counts == sorted(counts) and counts[0] == 6 and counts[-1] == 36
        assert int((mask(6, 0.2, 0.1) > 0).sum()) == 6 + 2 * 5

    def test_entries_outside_the_band_stay_zero_and_have_no_gradient(self) -> None:
        view = view_of("llama", torch.float32)
        affine = member("transform", "affine")["affine"]
        part, sites = part_of(view, affine)
        beside = next(t for t in part.knobs[0].tensors if t.dim() == 3)
        part.begin_epoch(0, 5)
        site = next(site for site in sites if site.kind == "value")
        with torch.enable_grad():
            part.make().inserts[site.name].map.apply(torch.randn(3, site.size)).sum().backward()
        assert beside.grad is None or not beside.grad.any()
        part.begin_epoch(1, 5)
        with torch.enable_grad():
            part.make().inserts[site.name].map.apply(torch.randn(3, site.size)).sum().backward()
        opened = mask(site.head_size, 0.25, 1.0).bool() & ~torch.eye(site.head_size).bool()
        assert beside.grad is not None and bool((beside.grad != 0)[:, opened].any())
        assert not beside.grad[:, ~opened].any()

    def test_closed_matrices_are_omniquants_scales(self) -> None:
        view = view_of("llama", torch.float32)
        let, affine = (member("transform", name)[name] for name in ("let", "affine"))
        (ours, sites), (theirs, _) = part_of(view, replace(affine, rotate_keys=False)), part_of(view, let)
        ours.begin_epoch(0, 20)
        one, other = ours.make().inserts, theirs.make().inserts
        for site in sites:
            x = torch.randn(5, site.size, generator=generator(3), dtype=torch.float64)
            assert distance(one[site.name].map.apply(x), other[site.name].map.apply(x)) < 1e-6

    def test_matrices_near_singular_fall_back_to_their_diagonals(self) -> None:
        view = view_of("llama", torch.float32)
        part, sites = part_of(view, replace(member("transform", "affine")["affine"], stability=1.0))
        part.begin_epoch(1, 1)
        site = next(site for site in sites if site.kind == "value")
        scale, beside = next((a, b) for a, b in itertools.pairwise(part.knobs[0].tensors) if b.dim() == 3)
        with torch.no_grad():
            beside.copy_(scale.exp()[:, None])  # equal rows
            kept = part.make().inserts[site.name].map.apply(torch.eye(site.size).double())
        assert torch.equal(kept, torch.diag(kept.diagonal()))


def part_of(view: ModelView, transform: Any) -> tuple[Any, list[Any]]:
    """Return what a transform learns of block 0, and its sites."""
    from qexp.engine.transforming import _surroundings

    stream, kwargs = stream_into(view, 0, IDS)
    sites = [site for site in transform.sites(view) if site.block == 0]
    around = _surroundings(plan_of(view, recipe(), 0), 0, transform, sites, stream, kwargs)
    return transform.part(sites, around, generator(0)), sites


class TestNormTweaking:
    def test_losses_are_those_of_a_naive_loop(self) -> None:
        rng = generator(0)
        q, f = (torch.randn(3, 7, 5, generator=rng, dtype=torch.float64) for _ in range(2))
        means, squares = 0.0, 0.0
        for b in range(3):
            for c in range(5):
                x, y = q[b, :, c], f[b, :, c]
                means += float((x.mean() - y.mean()).abs() + (x.var(correction=0) - y.var(correction=0)).abs()) / 15
                squares += (
                    float((x.mean() - y.mean()) ** 2 + ((x.var() + 1e-6) ** 0.5 - (y.var() + 1e-6) ** 0.5) ** 2) / 3
                )
        assert float(loss_of("mean_var", q, f, 1.0, False)) == pytest.approx(means, rel=1e-12)
        assert float(loss_of("mean_std_sq", q, f, 1.0, False)) == pytest.approx(squares, rel=1e-12)
        for kind in ("mean_var", "mean_std_sq", "mse", "nmse"):
            assert float(loss_of(kind, f, f, 1.0, False)) == 0
            turned = float(loss_of(kind, q.flip(1), f.flip(1), 2.0, False))
            assert turned == pytest.approx(float(loss_of(kind, q, f, 2.0, False)), rel=1e-12)
        cut = float(loss_of("mse", q[:, 1:], f[:, 1:], 1.0, False))
        assert float(loss_of("mse", q, f, 1.0, True)) == pytest.approx(cut)

    @pytest.mark.parametrize("rate", [0.0, 1e-2])
    def test_only_norms_change_and_the_next_block_sees_them(self, rate: float, tmp_path: Path) -> None:
        tuner = short(member("tuner", "norm_tweaking")["norm_tweaking"], rate=rate, training={"measure_every": 4})
        with_it, without = (quantized(tmp_path / str(i), tuner={"norm_tweaking": tuner} if i else {}) for i in (1, 0))
        changed = {
            name
            for name, value in with_it.model.state_dict().items()
            if not torch.equal(value, without.model.state_dict()[name])
        }
        first = {name for name in changed if ".0." in name}
        if not rate:
            assert not changed
            return
        assert first == {"model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}
        roles = {layer.role for layer in with_it.layers}
        seen = [distance(linear_of(with_it, role, 1).weight, linear_of(without, role, 1).weight) for role in roles]
        assert max(seen) > 0, "GPTQ saw the tuned one"

    def test_exact_codes_leave_nothing_to_tune(self, tmp_path: Path) -> None:
        tuner = short(member("tuner", "norm_tweaking")["norm_tweaking"], rate=1e-2)
        view = view_of("llama", torch.float32)
        before = {n: p.clone() for n, p in view.model.named_parameters()}
        from qexp.engine.tuning import tune_block

        stream, kwargs = stream_into(view, 0, IDS)
        stories = tune_block(
            plan_of(view, replace(recipe(w=16), tuner={"norm_tweaking": tuner}), 0),
            scene_of(view, 0, stream, kwargs),
            {},
            {},
        )
        assert stories["norm_tweaking"].outcome.start < 1e-6
        assert all(distance(p, before[n]) < 1e-6 for n, p in view.model.named_parameters())


class TestClosedForm:
    def test_it_solves_its_normal_equations_and_lowers_the_error(self) -> None:
        rng = generator(0)
        X = torch.randn(200, 12, generator=rng, dtype=torch.float64) * torch.linspace(0.2, 4, 12)
        W = torch.randn(9, 12, generator=rng, dtype=torch.float64)
        grid = member("grid", "integer", w=2, g=-1)
        Q = grid.decode(grid.encode(W, p := grid.fit(W, None)), p)
        tuner = replace(member("tuner", "norm_closed_form")["norm_closed_form"], damp=0.0)
        s = tuner.factors((X.T @ X).float(), [(W[:4], Q[:4]), (W[4:], Q[4:])])

        def error(factors: torch.Tensor) -> torch.Tensor:
            return (X @ W.T - (X * factors) @ Q.T).pow(2).sum()

        free = s.clone().requires_grad_()
        with torch.enable_grad():
            error(free).backward()
        assert float(free.grad.abs().max()) < 1e-4 * float(error(torch.ones(12)))  # type: ignore[union-attr]
        assert float(error(s)) < 0.99 * float(error(torch.ones(12, dtype=torch.float64)))

    @pytest.mark.parametrize("solver", ["gptq", "rtn"])
    def test_norms_alone_change_where_no_map_is_behind_them(self, solver: str, tmp_path: Path) -> None:
        tuner = member("tuner", "norm_closed_form")
        with_it, without = (quantized(tmp_path / str(i), solver, tuner=tuner if i else {}) for i in (1, 0))
        theirs = without.model.state_dict()
        first = {n for n, v in with_it.model.state_dict().items() if ".0." in n and not torch.equal(v, theirs[n])}
        assert first == {"model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}
        ids = tokens(16, seed=5)
        truth = logits(view_of("llama", torch.float32).model, ids)
        assert (logits(with_it.model, ids) - truth).pow(2).mean() < (logits(without.model, ids) - truth).pow(2).mean()


class TestEndToEnd:
    def test_steps_alone_change_and_the_loss_does_not_rise(self, tmp_path: Path) -> None:
        tuner = short(member("tuner", "e2e_qp")["e2e_qp"], rate=2e-3, training={"batch": 4, "epochs": 4, "micro": 2})
        with_it, without = (quantized(tmp_path / str(i), tuner={"e2e_qp": tuner} if i else {}) for i in (1, 0))
        for layer in with_it.layers:
            ours, theirs = with_it.linear(layer.name), without.linear(layer.name)
            assert ours.codes is not None and theirs.codes is not None and torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.params["zero"], theirs.params["zero"])
        moved = [
            not torch.equal(with_it.linear(a.name).params["scale"], without.linear(a.name).params["scale"])
            for a in with_it.layers
        ]
        assert sum(moved) > len(moved) / 2
        plain = {layer.name + ".weight" for layer in with_it.layers}
        rest = {n: p for n, p in without.model.named_parameters() if n not in plain}
        assert all(torch.equal(with_it.model.get_parameter(n), p) for n, p in rest.items())
        assert cross_entropy(with_it) < cross_entropy(without)

    @pytest.mark.parametrize("grid", ["power_of_two", "kmeans", "binary_coding"])
    def test_what_decodes_codes_of_any_grid_is_learned_and_codes_stay(self, grid: str, tmp_path: Path) -> None:
        training = {"batch": 4, "epochs": 4, "micro": 2}
        tuner = short(member("tuner", "end_to_end")["end_to_end"], rate=2e-3, training=training)
        keys = {"grid": member("grid", grid, w=3, g=-1)}
        with_it, without = (
            quantized(tmp_path / str(i), tuner={"end_to_end": tuner} if i else {}, **keys) for i in (1, 0)
        )
        for layer in with_it.layers:
            ours, theirs = with_it.linear(layer.name), without.linear(layer.name)
            assert ours.codes is not None and theirs.codes is not None and torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.weight, ours.grid.decode(ours.codes, ours.params).to(ours.weight))
        assert cross_entropy(with_it) < cross_entropy(without)

    def test_a_killed_descent_goes_on_where_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from qexp.core import minimise as loops

        tuner = short(
            member("tuner", "e2e_qp")["e2e_qp"], rate=2e-3, training={"batch": 4, "epochs": 4, "measure_every": 2}
        )
        whole = quantized(tmp_path / "whole", tuner={"e2e_qp": tuner})
        real, calls = loops._Loop._take, [0]

        def dies(self: Any, step: int) -> bool:
            calls[0] += 1
            if calls[0] == 8:
                raise KeyboardInterrupt
            return real(self, step)

        monkeypatch.setattr(loops._Loop, "_take", dies)
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path / "killed", tuner={"e2e_qp": tuner})
        assert (tmp_path / "killed" / "blocks" / "e2e_qp.state.safetensors").exists()
        calls[0] = 100
        taken = []
        monkeypatch.setattr(loops._Loop, "_take", lambda self, step: (taken.append(step), real(self, step))[1])
        again = quantized(tmp_path / "killed", tuner={"e2e_qp": tuner})
        assert taken[0] == 6, "it went on behind the state of step 6"
        for layer in whole.layers:
            ours, theirs = again.linear(layer.name), whole.linear(layer.name)
            assert torch.equal(ours.weight, theirs.weight)
        assert not list((tmp_path / "killed" / "blocks").glob("*state*"))


def quantized(folder: Path, solver: str = "gptq", **stages: Any) -> ModelView:
    """Return a toy that is quantized by GPTQ at 2 bits."""
    view = view_of("llama", torch.float32)
    method = replace(recipe(w=2), solver=member("solver", solver), **stages)
    run = a_run(folder)
    quantize_blocks(view, IDS, method, run)
    tune_model(view, IDS, method, run)
    activate(view, range(len(view.blocks)), method)
    return view


def cross_entropy(view: ModelView) -> float:
    out = logits(view.model, IDS)
    return float(torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


class TestTogether:
    """What members that learn must not do to each other, or to the rest of a recipe."""

    def test_norms_take_the_rate_of_two_bits(self) -> None:
        solver = member("solver", "block_ap")
        assert solver.norms_rate(2) == 2 * solver.norms_rate(3) == 2 * solver.norm_rate
        assert member("solver", "lrq").norms_rate(2) == 0

    @pytest.mark.parametrize("last", ["outlier_columns", "smooth"])
    def test_ranges_are_learned_behind_all_transforms(self, last: str) -> None:
        """Not with a learned transform whose weights another one still changes."""
        view = view_of("llama", torch.float32)
        tuner = short(member("tuner", "clip")["clip"], training={"steps": 2})
        let = {"training": {"steps": 2, "floor": "none"}}
        made = replace(
            recipe("let", last, w=3, let=let), tuner={"clip": tuner}, grid=member("grid", "integer", w=3, g=8)
        )
        plan, (stream, kwargs) = plan_of(view, made, 0), stream_into(view, 0, IDS)
        stories = transform_block(plan, scene_of(view, 0, stream, kwargs), stream)
        assert list(stories) == ["let", "clip"] and not stories["let"].made.clips.weights
        columns = 24 - linear_of(view, "q").path.kept
        clips = linear_of(view, "q").clips
        assert clips is not None and clips.shape == (24, columns // 8, 2)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_columns_that_are_kept_stay_and_ranges_may_read_the_rest_of_the_hessian(
        self, solver: str, tmp_path: Path
    ) -> None:
        view = view_of("llama", torch.float32)
        grid = member("grid", "integer_output_clip", w=3, g=8)
        made = replace(
            recipe("outlier_columns", w=3), grid=grid, solver=short(member("solver", solver), training={"steps": 2})
        )
        quantize_blocks(view, IDS, made, a_run(tmp_path))
        linear = linear_of(view, "q")
        assert linear.kept is not None and linear.codes is not None
        assert linear.codes.shape[1] + linear.kept.shape[1] == 24
        assert torch.equal(linear.weight[:, -linear.kept.shape[1] :], linear.kept)

    def test_layers_of_other_bits_are_all_kept_and_taken_up(self, tmp_path: Path) -> None:
        solver = short(member("solver", "block_ap"), training={"steps": 3, "batch": 2}, rate=1e-3)
        mixed = replace(recipe(w=2), solver=solver, allocation=member("allocation", "by_role", w=2))
        view = view_of("llama", torch.float32)
        quantize_blocks(view, IDS, mixed, a_run(tmp_path / "first"))
        more = short(solver, training={"steps": 0, "epochs": 0, "load": str(tmp_path / "first" / "learned")})
        again = view_of("llama", torch.float32)
        quantize_blocks(again, IDS, replace(mixed, solver=more), a_run(tmp_path / "second"))
        assert len({view.linear(layer.name).grid.bits for layer in view.layers}) > 1  # type: ignore[union-attr]
        ours, theirs = linear_of(view, "down"), linear_of(again, "down")
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.weight, theirs.weight)  # type: ignore[arg-type]
        another = short(solver, training={"load": str(tmp_path / "first" / "learned")})
        with pytest.raises(UserError, match=r"holds no solver\.0\.\d.*for block 0; need a run of this recipe"):
            wrong = replace(recipe(w=3), solver=member("solver", "lrq"))
            wrong = replace(wrong, solver=short(wrong.solver, training={"load": another.training.load}))
            quantize_blocks(view_of("llama", torch.float32), IDS, wrong, a_run(tmp_path / "third"))

    def test_quantizers_come_back_as_they_were(self) -> None:
        view, made = view_of("llama", torch.float32), recipe(act="per_token", a=4)
        activate(view, [0], made)
        path = linear_of(view, "q").path
        with quantizers(view, recipe(act="per_token", a=8), [0]):
            assert path.act is not None
            inside = path.act
        assert path.act is not None and path.act is not inside

    def test_ranges_of_activations_follow_norms_that_change(self, tmp_path: Path) -> None:
        act = member("act", "per_tensor", a=8)
        tuner = {"norm_tweaking": short(member("tuner", "norm_tweaking")["norm_tweaking"], rate=0.05)}
        view = view_of("llama", torch.float32)
        made = replace(recipe(w=2), act=act, tuner=tuner)
        seen: dict[str, torch.Tensor] = {}
        quantize_blocks(view, IDS, made, a_run(tmp_path))
        path = linear_of(view, "q").path
        path.observer = lambda x: seen.update(peak=x.abs().max())
        view.model(IDS, use_cache=False)
        path.observer = None
        assert float(path.ranges["scale"]) == pytest.approx(float(seen["peak"]) / 127, rel=1e-4)

    def test_a_slice_of_zeros_stays_zero_on_a_midrise_grid(self) -> None:
        W = W_OI.clone()
        W[3] = 0
        grid = member("grid", "midrise", w=2, g=-1)
        kept = member("solver", "lrq").solve(W, None, grid, generator(0))
        assert float(grid.decode(kept.codes, kept.params)[3].abs().max()) < 1e-6

    def test_nothing_to_round_is_nothing_to_learn(self, tmp_path: Path) -> None:
        view = view_of("llama")
        before = logits(view.model)
        tuner = member("tuner", "clip") | member("tuner", "e2e_qp")
        made = replace(recipe("smooth", w=16), tuner=tuner)
        quantize_blocks(view, IDS, made, a_run(tmp_path))
        assert tune_model(view, IDS, made, a_run(tmp_path)) == {}
        assert distance(logits(view.model), before) < 1e-9

    @pytest.mark.parametrize("family", FAMILIES)
    def test_everything_is_learned_on_every_family(self, family: str, tmp_path: Path) -> None:
        """Norms with offsets, norms of keys, biases, tied embeddings, capped logits, sliding windows."""
        few = {"steps": 3, "epochs": 0, "batch": 2}
        tuners = {
            name: short(member("tuner", name)[name], training=few) for name in ("clip", "norm_tweaking", "e2e_qp")
        } | member("tuner", "norm_closed_form")
        made = replace(
            recipe("affine", w=4, act="per_token_asymmetric", a=8, affine={"training": {**few, "floor": "none"}}),
            solver=short(member("solver", "block_ap"), training=few), tuner=tuners, quantize_stream=True,
        )  # fmt: skip
        view, truth = view_of(family, torch.float32), logits(view_of(family, torch.float32).model, IDS)
        reports = quantize_blocks(view, IDS, made, a_run(tmp_path))
        loss = NextToken(view, IDS)
        told = loss.measure(lambda i, x: hidden_states(view.blocks[i](x, **loss.kwargs[i])), range(len(IDS)))
        assert told == pytest.approx(cross_entropy(view), rel=1e-4), "the loss that is descended is the model's own"
        (losses,) = tune_model(view, IDS, made, a_run(tmp_path)).values()
        assert len(losses) == 3
        assert [list(r.learned) for r in reports] == [["affine", "solver", "norm_tweaking"]] * 2
        answer = logits(view.model, IDS)
        assert float((answer - truth).pow(2).mean() / truth.pow(2).mean()) < 0.3
