"""Tables of levels: powers of two, weighted clusters, binary codes; against brute force and the specs' own figures.

Source: section 6 of methods/power_of_two.md, methods/squeezellm.md and methods/gptqt.md.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_members import member
from torch import Tensor

from qexp.core.rng import generator
from qexp.core.words import Stats
from qexp.stages.grid._shared_binary import codes as binary_codes
from qexp.stages.grid._shared_binary import errors, patterns, snapped
from qexp.stages.grid._shared_clusters import cluster
from qexp.stages.grid.power_of_two import element

FLAT = {"weights": "none"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed) / draw(5, *shape, seed=seed + 1).square().mean(0).sqrt()


def rounded(grid: Any, W: Tensor, H: Tensor | None = None) -> Tensor:
    params = grid.fit(W, H)
    answer: Tensor = grid.decode(grid.encode(W, params), params)
    return answer


class TestPowersOfTwo:
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_counts(self, bits: int) -> None:
        kinds = ("zero", "nozero", *(["additive"] if bits > 2 else []))
        counts = {kind: len(element(kind, bits).values.unique()) for kind in kinds}
        assert counts["zero"] == 2**bits - 1 and counts["nozero"] == 2**bits
        assert counts.get("additive", 2**bits - 1) == 2**bits - 1, "no sum comes twice"
        for kind in kinds:
            values, codes = element(kind, bits).values, element(kind, bits).codes
            assert values.max() == 1 and torch.equal(values, -values.flip(0)) and len(codes.unique()) == len(codes)

    @pytest.mark.parametrize("kind", ["zero", "nozero"])
    def test_all_are_powers_of_two(self, kind: str) -> None:
        values = element(kind, 4).values
        mantissa, _ = torch.frexp(values[values > 0])
        assert (mantissa == 0.5).all()

    def test_additive_sets_are_those_of_the_official_code(self) -> None:
        three, four = (element("additive", bits).values for bits in (3, 4))
        torch.testing.assert_close(three, element("zero", 3).values)
        expected = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1], dtype=torch.float64)
        torch.testing.assert_close(four[four >= 0], expected)
        five = element("additive", 5).values
        first, second = [0, 2**-1, 2**-3, 2**-5], [0, 2**-2, 2**-4, 2**-6]
        sums = torch.tensor(sorted(a + b for a in first for b in second), dtype=torch.float64)
        torch.testing.assert_close(five[five >= 0], sums / sums[-1])

    def test_sign_of_zero_is_plus(self) -> None:
        grid = member("grid", "power_of_two", w=3, g=-1)
        params = {"scale": torch.ones(1, 1)}
        assert float(grid.decode(grid.encode(torch.zeros(1, 1), params), params)) == 2**-3
        assert float(grid.decode(grid.encode(torch.full((1, 1), -1e-9), params), params)) == -(2**-3)
        assert (member("grid", "power_of_two", w=3, levels="zero").encode(torch.zeros(1, 1), params) == 0).all()

    def test_pure_shifts_have_one_bit_of_mantissa(self) -> None:
        W = rounded(member("grid", "power_of_two", w=4, g=16, pow2=True), draw(8, 64))
        assert (torch.frexp(W.abs())[0] == 0.5).all()

    @pytest.mark.parametrize("solver", ["rtn", "gptq"])
    @pytest.mark.parametrize("kind", ["zero", "nozero", "additive"])
    def test_weights_on_the_grid_are_recovered(self, kind: str, solver: str) -> None:
        values = element(kind, 4).values
        at = torch.randint(len(values), (8, 64), generator=torch.Generator().manual_seed(0))
        at[:, ::16] = len(values) - 1  # each slice reaches its maximum, so that ratio 1 is the scale
        W, X = values[at] * 0.375, draw(200, 64) @ draw(64, 64, seed=1)
        low, high = X.amin(0), X.amax(0)
        about = Stats(tokens=200, H_II=X.T @ X / 200, low_I=low, high_I=high, mean_abs_I=X.abs().mean(0), rows_TI=X)
        grid = member("grid", "power_of_two", w=4, g=16, levels=kind)
        solved = member("solver", solver).solve(W, about, grid, generator(0))
        torch.testing.assert_close(grid.decode(solved.codes, solved.params), W)

    def test_twice_the_weight_is_twice_the_scale_and_the_same_codes(self) -> None:
        grid, W = member("grid", "power_of_two", w=3, g=16), draw(8, 64)
        one, two = grid.fit(W, None), grid.fit(2 * W, None)
        torch.testing.assert_close(two["scale"], 2 * one["scale"], rtol=2e-3, atol=0)
        assert (grid.encode(W, one) == grid.encode(2 * W, two)).float().mean() > 0.99

    # Relative squared error with the best scale per 128: the spec's own figures, normal and Student's t(5).
    @pytest.mark.parametrize(
        ("kind", "bits", "normal", "tailed"),
        [
            ("zero", 3, 0.0433, 0.0679),
            ("nozero", 2, 0.156, 0.250),
            ("nozero", 3, 0.0394, 0.0601),
            ("zero", 4, 0.0316, 0.0287),
            ("additive", 4, 0.0100, 0.0159),
        ],
    )
    def test_errors_are_those_of_the_spec(self, kind: str, bits: int, normal: float, tailed: float) -> None:
        grid = member("grid", "power_of_two", w=bits, g=128, levels=kind)
        for W, expected in ((draw(1024, 128), normal), (student(1024, 128), tailed)):
            error = float((rounded(grid, W) - W).square().sum() / W.square().sum())
            assert error == pytest.approx(expected, rel=0.05)


def cost(x: Tensor, f: Tensor, levels: Tensor) -> Tensor:
    return (f * (x[..., None] - levels[:, None, :]).square().amin(-1)).sum(-1)


def least_cost(x: list[float], f: list[float], levels: int) -> float:
    """Return the least weighted cost over all ways of cutting sorted numbers into segments."""
    pairs = sorted(zip(x, f, strict=True))
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(pairs)), levels - 1):
        ends, total = [0, *cuts, len(pairs)], 0.0
        for lo, hi in itertools.pairwise(ends):
            mass = sum(w for _, w in pairs[lo:hi]) or 1.0
            mean = sum(w * v for v, w in pairs[lo:hi]) / mass
            total += sum(w * (v - mean) ** 2 for v, w in pairs[lo:hi])
        best = min(best, total)
    return best


class TestClusters:
    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.tuples(st.floats(-4, 4, width=32), st.floats(0.015625, 9, width=32)), min_size=4, max_size=12),
        st.integers(2, 4),
    )
    def test_the_program_finds_the_optimum(self, pairs: list[tuple[float, float]], levels: int) -> None:
        x, f = ([float(pair[i]) for pair in pairs] for i in (0, 1))
        xs, fs = (torch.tensor([v], dtype=torch.float64) for v in (x, f))
        assert float(cost(xs, fs, cluster(xs, fs, levels))) <= least_cost(x, f, levels) * (1 + 1e-6) + 1e-9

    @pytest.mark.parametrize("levels", [8, 16])
    def test_long_rows_are_near_the_optimum_of_all_numbers(self, levels: int) -> None:
        x, f = draw(4, 512), draw(4, 512, seed=1).mul(2).exp()
        ours = cost(x, f, cluster(x, f, levels))
        exact = torch.stack([cost(x[[i]], f[[i]], _exact(x[i], f[i], levels))[0] for i in range(len(x))])
        assert (ours <= exact * 1.005).all()

    def test_levels_are_the_means_of_what_is_nearest(self) -> None:
        x, f = draw(3, 400), draw(3, 400, seed=1).exp()
        levels = cluster(x, f, 8)
        nearest = (x[..., None] - levels[:, None, :]).abs().argmin(-1)
        for row, k in itertools.product(range(3), range(8)):
            mine = nearest[row] == k
            mean = (x[row][mine] * f[row][mine]).sum() / f[row][mine].sum()
            torch.testing.assert_close(levels[row, k], mean, rtol=1e-3, atol=1e-4)

    def test_few_kinds_of_numbers_are_kept_exactly(self) -> None:
        kinds = torch.tensor([-3.0, -2.999, -1, 0, 0.001, 0.5, 7, 7.5])
        x = kinds[torch.randint(8, (5, 600), generator=torch.Generator().manual_seed(0))]
        assert (cost(x, draw(5, 600).exp().float(), cluster(x, torch.ones_like(x), 8)) < 1e-9).all()

    def test_rows_without_weight_count_all_alike(self) -> None:
        x = draw(2, 300)
        torch.testing.assert_close(cluster(x, torch.zeros_like(x), 4), cluster(x, torch.ones_like(x), 4))

    def test_more_levels_and_the_weights_pay(self) -> None:
        W, F = student(32, 256), draw(32, 256, seed=3).mul(2).exp()
        by = {bits: member("grid", "kmeans", w=bits, g=-1).fit_weighted(W, F)["levels"][:, 0] for bits in (2, 3, 4)}
        costs = [cost(W, F, levels).sum() for levels in by.values()]
        assert costs[0] > 3 * costs[1] > 9 * costs[2]
        plain = member("grid", "kmeans", w=3, g=-1, **FLAT).fit(W, None)["levels"][:, 0]
        assert cost(W, F, by[3]).sum() < 0.8 * cost(W, F, plain).sum()

    def test_no_row_is_above_what_lloyd_finds_from_quantiles(self) -> None:
        x, f = student(16, 300), draw(16, 300, seed=3).mul(2).exp()
        levels = x.quantile((torch.arange(8, dtype=x.dtype) + 0.5) / 8, dim=1).T
        for _ in range(100):
            nearest = (x[..., None] - levels[:, None, :]).abs().argmin(-1)
            mass, sums = (torch.zeros_like(levels).scatter_add_(1, nearest, v) for v in (f, f * x))
            levels = torch.where(mass > 0, sums / mass.clamp(min=1e-300), levels)
        assert (cost(x, f, cluster(x, f, 8)) <= cost(x, f, levels) * (1 + 1e-9)).all()

    def test_ties_go_to_the_lower_level(self) -> None:
        grid = member("grid", "kmeans", w=2, g=-1)
        params = {"levels": torch.tensor([[[-1.0, 0.0, 1.0, 3.0]]])}
        assert grid.encode(torch.tensor([[-0.5, 0.5, 2.0, 9.0]]), params).tolist() == [[0, 1, 2, 3]]

    def test_taking_outliers_out_never_costs(self) -> None:
        x, f = student(16, 300), draw(16, 300, seed=3).mul(2).exp()
        without = torch.where(x.abs() >= x.abs().quantile(0.98, dim=1, keepdim=True), 0, f)
        best, less = cost(x, f, cluster(x, f, 8)), cost(x, without, cluster(x, without, 8))
        assert (less <= best * (1 + 1e-3)).all() and less.sum() < best.sum()  # cells: optima to a thousandth

    def test_every_row_is_below_the_uniform_grid(self) -> None:
        W, F = student(32, 256).float(), torch.ones(32, 256)
        tables = rounded(member("grid", "kmeans", w=3, g=-1, **FLAT), W)
        uniform = rounded(member("grid", "integer", w=3, g=-1), W)
        assert ((F * (tables - W).square()).sum(1) <= (F * (uniform - W).square()).sum(1)).all()


def _exact(x: Tensor, f: Tensor, levels: int) -> Tensor:
    """Return the optimal levels of one long row, by the same recursion over all its numbers, one at a time."""
    x, order = x.sort()
    s = torch.nn.functional.pad(torch.stack([f[order], f[order] * x, f[order] * x * x]).cumsum(1), (1, 0))
    a, b, c = (v[None, :] - v[:, None] for v in s)
    price = torch.where(a > 0, c - b * b / a.clamp(min=1e-300), 0).clamp(min=0)
    price = price + torch.where(torch.ones_like(price).tril(-1) > 0, torch.inf, 0)
    best, steps = price[0], []
    for _ in range(levels - 1):
        best, at = (best[:, None] + price).min(0)
        steps.append(at)
    ends = [len(x)]
    for at in reversed(steps):
        ends.append(int(at[ends[-1]]))
    ends = [0, *ends[::-1]]
    return torch.stack([b[i, j] / a[i, j].clamp(min=1e-300) for i, j in itertools.pairwise(ends)])[None]


HOW_MANY = {(4, 3): 145, (5, 3): 4361, (3, 2): 22, (4, 2): 252, (5, 2): 2360}


class TestBinaryCodes:
    @pytest.mark.parametrize(("fine", "bits"), HOW_MANY)
    def test_how_many_there_are(self, fine: int, bits: int) -> None:
        found = binary_codes(fine, bits)
        assert len(found) == HOW_MANY[fine, bits]
        levels = snapped(found, fine)
        assert levels.min() >= 0 and levels.max() < 2**fine and (levels.diff(dim=1) >= 0).all()
        every = found[:, :1] + found[:, 1:] @ patterns(bits, found).T
        assert all(len(set(row)) == 2**bits for row in every.tolist()), "2^m distinct levels"

    def test_uniform_codes_are_among_them(self) -> None:
        found = {tuple(code) for code in binary_codes(5, 3).tolist()}
        assert all((0, d, 2 * d, 4 * d) in found for d in (1, 2, 3, 4))

    def test_cells_cost_what_the_weights_cost(self) -> None:
        u, h, codes = draw(6, 99).mul(4).add(8), draw(6, 99, seed=1).exp(), binary_codes(4, 2).double()
        ours = errors(u, h, snapped(codes, 4))
        for i in range(0, len(codes), 17):
            values = torch.stack([codes[i, 0] + sum(chosen) for chosen in _sums(codes[i, 1:])])
            cells = u.round().clamp(0, 15)
            order = values.sort().values
            at = torch.searchsorted((order[1:] + order[:-1]) / 2, cells)
            torch.testing.assert_close(ours[:, i], (h * (u - order[at]).square()).sum(1))

    @pytest.mark.parametrize("bits", [2, 3])
    def test_a_weight_that_is_a_code_already_comes_back(self, bits: int) -> None:
        rng = torch.Generator().manual_seed(0)
        gaps, pattern = torch.tensor([1.0, 3, 5][:bits]) / 8, torch.randint(2, (4, 64, bits), generator=rng)
        pattern[:, 0], pattern[:, 1] = 0, 1
        W = -5 / 8 + 2 * (pattern * gaps).sum(-1)
        grid = member("grid", "binary_coding", w=bits, g=-1, least_ratio=0.25, most_ratio=1.0, ratio_step=0.0125)
        span = float(W.max() - W.min())
        assert float((rounded(grid, W) - W).abs().max()) < 0.03 * span

    def test_the_chosen_code_is_no_worse_than_the_uniform_one_of_the_same_range(self) -> None:
        """Levels of 3 bits over the full range, 0, 4, ..., 28 of 31, are a code of 5 bits among the others."""
        W, h = student(16, 128), draw(16, 128, seed=1).exp()
        low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
        s = (high - low) / 31
        u, every = W / s + (15.5 - (high + low) / (2 * s)).round(), binary_codes(5, 3).double()
        found = errors(u, h, snapped(every, 5))
        uniform = [i for i, code in enumerate(every.tolist()) if code[1:] == [4, 8, 16]]
        assert len(uniform) == 4 and (found.amin(1) <= found[:, uniform].amin(1)).all()
        assert (found.amin(1) < 0.9 * found[:, uniform].amin(1)).any()

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_with_as_many_fine_bits_as_bits_it_is_the_uniform_grid(self, bits: int) -> None:
        """One code is left, of steps 1, 2, 4, ...: what min-max rounding has, to what float16 keeps of the planes."""
        ratio = {"least_ratio": 1.0, "most_ratio": 1.0, "ratio_step": 0.1}
        grid = member("grid", "binary_coding", w=bits, g=-1, fine_bits=bits, **ratio)
        uniform, W = member("grid", "integer", w=bits, g=-1, symmetry="asymmetric"), draw(8, 256).float()
        step = uniform.fit(W, None)["scale"]
        expected = step / 2 * torch.tensor([2.0**i for i in range(bits)])
        torch.testing.assert_close(grid.fit(W, None)["plane"][:, 0], expected, rtol=2e-3, atol=0)
        level = W / step
        clear = ((level - level.floor()) - 0.5).abs() > 0.01  # the rest is as near to one level as to the next
        assert float(((rounded(grid, W) - rounded(uniform, W)) / step)[clear].abs().max()) < 0.01

    def test_planes_rise_and_are_positive(self) -> None:
        plane = member("grid", "binary_coding", w=3, g=16).fit(draw(8, 64), None)["plane"]
        assert (plane > 0).all() and (plane.diff(dim=-1) >= 0).all()

    @pytest.mark.parametrize("bits", [2, 3])
    def test_gptq_on_it_is_better_than_on_the_uniform_grid(self, bits: int) -> None:
        """The paper's claim, where it matters: heavy tails, inputs of unlike sizes, rows; 95 % of layers."""
        wins, count = 0, 20
        solver = member("solver", "gptq")
        for seed in range(count):
            W, X = student(48, 128, seed=seed).float(), draw(512, 128, seed=seed + 99).float()
            X[:, ::32] *= 8
            H = X.T @ X / 512
            stats = Stats(512, H, X.amin(0), X.amax(0), X.abs().mean(0), X)
            made = [member("grid", name, w=bits, g=-1) for name in ("binary_coding", "integer")]
            lost = [_loss(W, solver.solve(W, stats, grid, generator(0)), grid, H) for grid in made]
            wins += lost[0] <= lost[1]
        assert wins >= 0.95 * count


def _sums(gaps: Tensor) -> list[list[Tensor]]:
    return [list(chosen) for n in range(len(gaps) + 1) for chosen in itertools.combinations(gaps, n)]


def _loss(W: Tensor, quantized: Any, grid: Any, H: Tensor) -> float:
    E = W - grid.decode(quantized.codes, quantized.params)
    return float((E @ H * E).sum())
