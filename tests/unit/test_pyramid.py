"""PVQ: points of the pyramid and their numbers, nearest directions, levels that suit the law, bytes that are the cost.

Source: methods/pvq.md section 6.
"""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, kstest
from stage_members import member
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.hadamard import Hadamard
from qexp.core.linear import InputPath, QuantLinear
from qexp.core.rng import generator
from qexp.core.storage import pack_linear, unpack_linear
from qexp.core.words import FULL_BITS, Layer, Quantized, Stats
from qexp.stages.grid import _shared_amplitude as amplitudes
from qexp.stages.grid import _shared_pyramid as pyramid
from qexp.stages.grid.pyramid import Pyramid
from qexp.stages.solver.gptq import Gptq
from qexp.stages.solver.rtn import Rtn

GPTQ = Gptq(damp_fraction=0.01, act_order=False, static_groups=True)
SIZES = [(2, 16384), (4, 4), (8, 16), (8, 709), (16, 12), (16, 27), (16, 53), (32, 21), (62, 4)]
each_size = pytest.mark.parametrize(("dim", "pulses"), SIZES)
each_encoder = pytest.mark.parametrize("encoder", pyramid.ENCODERS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_points(dim: int, pulses: int) -> Tensor:
    values = product(range(-pulses, pulses + 1), repeat=dim)
    return torch.tensor([y for y in values if sum(map(abs, y)) == pulses]).reshape(-1, dim)


def some_points(count: int, dim: int, pulses: int) -> Tensor:
    return pyramid.nearest(draw(count, dim) ** 3, pulses, "project")[0].long()


def grid(bits: int = 3, **keys: object) -> Pyramid:
    made: Pyramid = member("grid", "pyramid", w=bits, **keys)
    return made


def layer(inputs: int, outputs: int = 24) -> Layer:
    return Layer("model.layers.0.mlp.up_proj", "up", 0, outputs, inputs)


def problem(seed: int, outputs: int = 16, inputs: int = 64) -> tuple[Tensor, Stats]:
    X = draw(400, inputs, seed=seed) @ draw(inputs, inputs, seed=seed + 1000) / inputs**0.5
    H = X.T @ X / 400
    return draw(outputs, inputs, seed=seed + 2000), Stats(400, H, -H[0], H[0], H[0], H)


def rounded(made: Pyramid, W: Tensor) -> Tensor:
    params = made.fit(W, None)
    return made.decode(made.encode(W, params), params)


class TestPoints:
    @pytest.mark.parametrize("dim", range(1, 6))
    @pytest.mark.parametrize("pulses", range(1, 6))
    def test_they_are_counted_and_numbered_as_they_are(self, dim: int, pulses: int) -> None:
        y = all_points(dim, pulses)
        assert int(pyramid.counts(dim, pulses)[dim, pulses]) == len(y)
        numbers = pyramid.numbers(y, pulses)
        assert sorted(numbers.tolist()) == list(range(len(y)))
        assert torch.equal(pyramid.points(numbers, dim, pulses).long(), y)
        assert pyramid.number_bits(dim, pulses) == (len(y) - 1).bit_length()

    @each_size
    def test_numbers_come_back(self, dim: int, pulses: int) -> None:
        y = some_points(10_000, dim, pulses)
        numbers, size = pyramid.numbers(y, pulses), int(pyramid.counts(dim, pulses)[dim, pulses])
        assert int(numbers.min()) >= 0 and int(numbers.max()) < size
        assert torch.equal(pyramid.points(numbers, dim, pulses).long(), y)
        ends = torch.tensor([0, 1, size // 2, size - 2, size - 1])
        assert torch.equal(pyramid.numbers(pyramid.points(ends, dim, pulses), pulses), ends)

    @pytest.mark.parametrize(("dim", "most"), [(8, (6, 16, 36)), (16, (12, 27, 53)), (32, (21,))])
    def test_the_most_pulses_are_those_of_the_table(self, dim: int, most: tuple[int, ...]) -> None:
        assert tuple(grid(bits, dim=dim)._pulses for bits in range(2, 2 + len(most))) == most
        for pulses in most:
            assert pyramid.number_bits(dim, pulses) <= 62

    def test_the_published_total_is_met(self) -> None:
        assert grid(3).cost(1, 4096) == 3 + 4 / 16 + 16 / 4096


class TestDirections:
    @each_encoder
    @each_size
    def test_all_pulses_are_spent(self, dim: int, pulses: int, encoder: str) -> None:
        for T in (draw(500, dim), draw(500, dim).float(), draw(500, dim) ** 9, torch.ones(3, dim), torch.zeros(3, dim)):
            y, length = pyramid.nearest(T, pulses, encoder)
            assert (y.abs().sum(1) == pulses).all() and torch.equal(y, y.round())
            assert (y * T >= 0).all() and (length >= 0).all()

    @each_encoder
    @each_size
    def test_points_stay(self, dim: int, pulses: int, encoder: str) -> None:
        y = some_points(2000, dim, pulses)
        for dtype in (torch.float32, torch.float64):
            T = y.to(dtype) * 0.37 / y.to(dtype).norm(dim=1, keepdim=True)
            found, length = pyramid.nearest(T, pulses, encoder)
            assert torch.equal(found.long(), y)
            torch.testing.assert_close(length, torch.full_like(length, 0.37))

    @each_encoder
    def test_length_signs_and_order_do_not_matter(self, encoder: str) -> None:
        T, order = draw(3000, 16), torch.randperm(16, generator=torch.Generator().manual_seed(1))
        y, length = pyramid.nearest(T, 27, encoder)
        for factor in (2.0**-40, 0.1, 3.0, 1e30):
            scaled, longer = pyramid.nearest(T * factor, 27, encoder)
            assert torch.equal(scaled, y)
            torch.testing.assert_close(longer, length * factor)
        signs = draw(16, seed=2).sign()
        assert torch.equal(pyramid.nearest(T * signs, 27, encoder)[0], y * signs)
        assert torch.equal(pyramid.nearest(T[:, order], 27, encoder)[0], y[:, order])

    def test_the_lowest_coordinate_wins_ties(self) -> None:
        for encoder in pyramid.ENCODERS:
            y, _ = pyramid.nearest(torch.ones(1, 8), 3, encoder)
            assert y.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
        assert pyramid.nearest(torch.tensor([[-0.0, 0.0]]), 5, "greedy")[0].tolist() == [[5, 0]]

    def test_greedy_is_next_to_optimal_and_better_than_projection(self) -> None:
        T, y = draw(4000, 4), all_points(4, 4).double()
        best = (T @ (y / y.norm(dim=1, keepdim=True)).T).amax(1)
        greedy, project = (pyramid.nearest(T, 4, encoder)[1] for encoder in pyramid.ENCODERS)
        assert float((greedy > best - 1e-9).double().mean()) >= 0.98
        assert (greedy <= best + 1e-9).all() and (project <= best + 1e-9).all()
        T = draw(4000, 16)
        greedy, project = (pyramid.nearest(T, 12, encoder)[1] for encoder in pyramid.ENCODERS)
        assert greedy.mean() > project.mean()

    @pytest.mark.parametrize(("dim", "pulses", "error"), [(16, 27, 0.0196), (16, 12, 0.081), (32, 22, 0.091)])
    def test_the_error_on_gaussian_weights_is_the_known_one(self, dim: int, pulses: int, error: float) -> None:
        T = draw(20_000, dim)
        _, length = pyramid.nearest(T, pulses, "greedy")
        found = float((T.square().sum(1) - length.square()).sum() / T.numel())  # with the best length
        assert found == pytest.approx(error, abs=0.05 * error)


class TestLengths:
    @pytest.mark.parametrize("rule", amplitudes.RULES)
    @pytest.mark.parametrize(("dim", "columns"), [(2, 64), (8, 288), (16, 64), (16, 4096), (32, 512)])
    @pytest.mark.parametrize("bits", [2, 4, 6])
    def test_levels_rise_within_the_row_and_have_room_above(self, rule: str, dim: int, columns: int, bits: int) -> None:
        levels = torch.tensor(amplitudes.levels(dim, columns, bits, rule)).double()
        assert len(levels) == 2**bits and (levels.diff() > 0).all()
        of_row = levels * (dim / columns) ** 0.5
        assert of_row[0] > 0 and of_row[-1] < 1
        rare = beta.ppf(0.999, *amplitudes.law_of(dim, columns)) ** 0.5
        assert float(of_row[-1]) >= 1.3 * rare - 1e-4
        assert torch.equal(levels.float().double(), levels)

    @pytest.mark.parametrize(("dim", "columns"), [(8, 288), (16, 4096), (32, 4096)])
    @pytest.mark.parametrize("count", [4, 16, 64])
    def test_lloyd_has_less_error_than_quantiles(self, dim: int, columns: int, count: int) -> None:
        law = amplitudes.law_of(dim, columns)
        lengths = torch.from_numpy(beta.ppf((torch.arange(50_000).double() + 0.5) / 50_000, *law)).sqrt()

        def error(rule: str) -> float:
            levels = torch.from_numpy(amplitudes.RULES[rule](law, count))
            nearest = (lengths[:, None] - levels).abs().amin(1)
            return float(nearest.square().mean() / lengths.square().mean())

        assert error("beta_lloyd") < error("beta_quantile")
        if (dim, columns, count) == (16, 4096, 16):
            assert error("beta_lloyd") == pytest.approx(2.8e-4, rel=0.03)

    def test_codes_rise_with_the_length(self) -> None:
        made, direction = grid(), draw(1, 16)
        T = direction / direction.norm() * torch.linspace(0, 3, 200)[:, None]
        places = made.encode(T, {"norm": torch.ones(200, 1).double()})[:, 0, -1]
        assert (places.diff() >= 0).all() and places.unique().tolist() == list(range(16))

    def test_rotated_rows_follow_the_law(self) -> None:
        W = draw(2000, 64) * torch.linspace(0.1, 4, 64)
        signs = draw(64, seed=1).sign()
        turned = Hadamard(64, signs).apply(W)
        plain, law = draw(2000, 64, seed=2), amplitudes.law_of(16, 64)
        for rows, follows in ((plain, True), (Hadamard(64, signs).apply(plain), True), (W, False)):
            squares = rows[:, :16].square().sum(1) / rows.square().sum(1)
            assert (kstest(squares.numpy(), "beta", args=law).pvalue > 0.01) == follows
        nearer = turned[:, :16].square().sum(1) / turned.square().sum(1)
        assert abs(float(nearer.mean()) - 0.25) < 0.02, "a rotation spreads what channels have more of"


class TestFeedback:
    def test_it_lowers_the_loss(self) -> None:
        made, lower = grid(3, columns=64), 0
        for seed in range(40):
            W, stats = problem(seed)
            losses = []
            for solver in (GPTQ, Rtn()):
                solved = solver.solve(W, stats, made, generator(0))
                E = W - made.decode(solved.codes, solved.params)
                losses.append(float((E @ stats.H_II * E).sum()))
            lower += losses[0] < losses[1]
        assert lower >= 38

    @pytest.mark.parametrize("dim", [4, 16])
    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_the_update_by_the_inverse_hessian(self, dim: int, seed: int) -> None:
        W, stats = problem(seed)
        made = grid(3, dim=dim, columns=64)
        solved = GPTQ.solve(W, stats, made, generator(0))
        H = stats.H_II + 0.01 * stats.H_II.diagonal().mean() * torch.eye(64)
        now, params = W.clone(), made.fit(W, None)
        for lo in range(0, 64, dim):
            inverse = torch.linalg.inv(H[lo:, lo:])
            codes = made.encode(now[:, lo : lo + dim], params)
            assert torch.equal(codes[:, 0], solved.codes[:, lo // dim])
            error = now[:, lo : lo + dim] - made.decode(codes, params)
            now[:, lo:] -= error @ torch.linalg.solve(inverse[:dim, :dim], inverse[:dim])


KINDS = {
    "normal": lambda W: W,
    "zeros": torch.zeros_like,
    "constant": torch.ones_like,
    "spike": lambda W: W.abs().argmax(1, keepdim=True).eq(torch.arange(W.shape[1])) * 900.0,
    "wide": lambda W: W.sign() * 10 ** (4 * W).clamp(-30, 3),
    "tiny": lambda W: W * 1e-30,
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(2, 2), (8, 2), (3, 4), (3, 8), (5, 8), (8, 8), (2, 16), (3, 16), (4, 16), (2, 32)]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(2, 6),
    st.sampled_from(pyramid.ENCODERS),
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_any_weight_is_stored_in_its_bytes_and_comes_back(
    size: tuple[int, int],
    outputs: int,
    groups: int,
    amplitude_bits: int,
    encoder: str,
    kinds: list[str],
    dtype: torch.dtype,
    seed: int,
) -> None:
    (bits, dim), inputs = size, size[1] * groups
    made = grid(dim=dim, amplitude_bits=amplitude_bits, encoder=encoder).for_layer(layer(inputs), bits)
    made.check(layer(inputs))
    rows = draw(outputs, inputs, seed=seed)
    W = torch.cat([KINDS[kinds[i % len(kinds)]](row[None]).double() for i, row in enumerate(rows)]).to(dtype)
    params = made.fit(W, None)
    codes = made.encode(W, params)
    assert codes.shape == (outputs, groups, dim + 1) and codes.dtype == made._dtype
    assert (codes[..., :-1].long().abs().sum(-1) == made._pulses).all()
    decoded = made.decode(codes, params)
    assert decoded.dtype == dtype and decoded.isfinite().all() and (decoded[(W == 0).all(1)] == 0).all()
    assert torch.equal(made.decode(made.encode(decoded, params), params), decoded)

    plain = torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    linear, again = (QuantLinear(plain, InputPath(1)) for _ in range(2))
    linear.install(made, Quantized(codes, params))
    tensors, facts = pack_linear(linear)
    unpack_linear(again, made, tensors, json.loads(json.dumps(facts)))
    assert torch.equal(again.codes, codes) and torch.equal(again.weight, decoded)
    spare = sum(t.nbytes for t in tensors.values()) - made.cost(outputs, inputs) * W.numel() / 8
    assert -1e-6 < spare < 1, "only the last byte is not full"


def test_more_bits_for_lengths_and_rotated_rows_come_close_to_the_exact_length() -> None:
    W = draw(200, 256)
    made = grid(3, columns=256)
    _, length = pyramid.nearest(W.view(-1, 16), 27, "greedy")
    exact = float((W.square().sum() - length.square().sum()) / W.numel())
    errors = [float((rounded(grid(3, columns=256, amplitude_bits=b), W) - W).square().mean()) for b in (2, 3, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert exact < float((rounded(made, W) - W).square().mean()) < 1.03 * exact
    assert errors[3] == pytest.approx(exact, rel=2e-3)


class TestMistakes:
    @pytest.mark.parametrize(
        ("bits", "keys", "inputs", "told"),
        [
            (3, {}, 72, r"dim=16 at 3 bits for in_features=72.*divisor of 72, 2 to 30; set method.grid.dim=18"),
            (6, {}, 64, r"dim=16 at 6 bits.*2 to 12; set method.grid.dim=8"),
            (5, {}, 64, r"dim=16 at 5 bits.*2 to 15; set method.grid.dim=8"),
            (8, {"dim": 2}, 127, r"divisor of 127, 2 to 8; set method/grid=integer"),
            (3, {"dim": 1}, 64, r"set method.grid.dim=2"),
            (1, {}, 64, r"grid.bits=1"),
            (3, {"pulses": 0}, 64, r"grid.pulses=0.*set method.grid.pulses=auto"),
            (3, {"pulses": 54}, 64, r"grid.pulses=54.*fit 62 bits"),
            (3, {"pulses": "many"}, 64, r"grid.pulses=many"),
            (3, {"amplitude_bits": 1}, 64, r"amplitude_bits=1.*2 to 6"),
            (3, {"amplitude_bits": 8}, 64, r"amplitude_bits=8.*2 to 6"),
            (3, {"amplitude": "uniform"}, 64, r"grid.amplitude='uniform' is unknown"),
            (3, {"encoder": "brute"}, 64, r"grid.encoder='brute' is unknown"),
        ],
    )
    def test_they_are_told_with_what_to_set(self, bits: int, keys: dict[str, object], inputs: int, told: str) -> None:
        with pytest.raises(UserError, match=told):
            grid(bits, **keys).check(layer(inputs))

    @pytest.mark.parametrize(("bits", "dim"), [(2, 32), (3, 16), (4, 16), (5, 8), (6, 8), (8, 8), (FULL_BITS, 16)])
    def test_these_widths_are_there(self, bits: int, dim: int) -> None:
        grid(bits, dim=dim).check(layer(64))

    def test_pulses_can_be_set(self) -> None:
        made = grid(3, pulses=40)
        made.check(layer(64))
        assert made.cost(1, 4096) == pytest.approx(56 / 16 + 4 / 16 + 16 / 4096)
