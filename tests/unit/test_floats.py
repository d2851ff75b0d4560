"""Small floats: value sets, ties, the scale rules of MX and NVFP4, and what they lose on known distributions.

Source: methods/fp_formats.md sections 3, 4 and 6.
"""

from __future__ import annotations

import pytest
import torch
from hydra.errors import InstantiationException
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_members import member
from torch import Tensor

from qexp.core.errors import UserError
from qexp.core.words import Layer
from qexp.kernels.floats import RULES, element, fake_quantize_floats, mx_exponent, mx_scale

# name -> largest, least normal, least value above zero, how many finite values
TABLE = {
    "e2m1": (6.0, 1.0, 0.5, 15),
    "e2m3": (7.5, 1.0, 0.125, 63),
    "e3m2": (28.0, 0.25, 0.0625, 63),
    "e4m3": (448.0, 2.0**-6, 2.0**-9, 253),
    "e5m2": (57344.0, 2.0**-14, 2.0**-16, 247),
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("name", TABLE)
def test_value_sets(name: str) -> None:
    kind, (top, _, least, count) = element(name), TABLE[name]
    assert (kind.top, float(kind.values[kind.values > 0].min()), len(kind.values)) == (top, least, count)
    assert torch.equal(kind.values, -kind.values.flip(0))
    assert torch.equal(kind.decode(kind.codes, torch.float64), kind.values)
    assert torch.equal(kind.encode(kind.values), kind.codes), "values are fixed points"


def test_an_element_has_the_bits_it_is_used_for() -> None:
    with pytest.raises(UserError, match=r"elements={4: e4m3}, an element of 8 bits.*method\.grid\.elements={8:e4m3}"):
        member("grid", "mxfp4", w=4, elements={4: "e4m3"}).check(Layer("x", "up", 0, 8, 64))
    with pytest.raises(InstantiationException, match="an element of 8 bits"):
        member("act", "mxfp4", a=4, elements={4: "e4m3"})


@pytest.mark.parametrize("scale", ["float32", "e8m0", "e4m3"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_block_with_what_is_no_number_is_none(scale: str, bad: float) -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    x[0, 3] = bad
    answer = fake_quantize_floats(x, "e2m1", 32, scale, "floor")
    assert answer[0, :32].isnan().all() and answer[1].isfinite().all()


def test_fp4_values_and_codes() -> None:
    kind = element("e2m1")
    assert kind.decode(torch.arange(16), torch.float32).tolist() == [
        *(0, 0.5, 1, 1.5, 2, 3, 4, 6),
        *(0, -0.5, -1, -1.5, -2, -3, -4, -6),
    ]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, 7, -99])
    assert kind.round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -4, 6, -6]


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_8_bits_are_torchs_own(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(3).exp()
    x = torch.cat([x, -x, x.to(TORCH[name]).to(dtype)]).clamp(-element(name).top, element(name).top)
    expected = x.float().to(TORCH[name])
    assert torch.equal(element(name).round(x.float().to(dtype)), expected.to(dtype))
    bits = element(name).encode(x.float())
    assert torch.equal(bits[expected.float() != 0], expected.view(torch.uint8)[expected.float() != 0])


def test_nf4_is_the_table_of_its_paper() -> None:
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert element("nf4").values.tolist() == pytest.approx(published, abs=2e-6)


def blocks(seed: int = 0, count: int = 512) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 32, generator=rng) * torch.randn(count, 1, generator=rng).mul(4).exp()


def test_the_rules_of_mx_scales_hold_the_maximum_where_they_say() -> None:
    x, kind = blocks(), element("e2m1")
    ratio = {rule: x.abs().amax(-1) / mx_scale(x, kind, rule) for rule in RULES}
    assert ratio["floor"].min() >= 4 and ratio["floor"].max() < 8
    assert ratio["even"].min() >= 3.5 and ratio["even"].max() < 7
    assert ratio["rceil"].min() > 3 and ratio["rceil"].max() <= 6
    assert ratio["ceil"].min() > 2 and ratio["ceil"].max() <= 4


@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "ceil"])
def test_exact_powers_of_two_have_exact_exponents(rule: str) -> None:
    powers = torch.arange(-100, 100)
    made = mx_exponent(torch.exp2(powers.float()), element("e2m1"), rule)
    assert torch.equal(made, powers - 2), "e - emax"
    assert mx_exponent(torch.zeros(1), element("e2m1"), rule) == 0


def test_search_is_not_above_any_rule() -> None:
    x, kind = blocks(), element("e2m1")

    def error(rule: str) -> Tensor:
        scale = mx_scale(x, kind, rule)[:, None]
        return (kind.round(x / scale) * scale - x).square().sum(-1)

    assert all((error("search") <= error(rule) * (1 + 1e-6)).all() for rule in ("floor", "even", "rceil"))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_scaling_by_powers_of_two_scales_the_answer(name: str) -> None:
    grid, W = member("grid", name), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def rounded(W: Tensor) -> Tensor:
        params = grid.fit(W, None)
        return grid.decode(grid.encode(W, params), params)

    torch.testing.assert_close(rounded(W * 2**9), rounded(W) * 2**9, rtol=0 if name == "mxfp4" else 1e-6, atol=0)


def test_values_of_the_grid_come_back_where_the_maximum_is_4_or_6_steps() -> None:
    grid, rng = member("grid", "mxfp4"), torch.Generator().manual_seed(0)
    W = element("e2m1").values.float()[torch.randint(15, (16, 64), generator=rng)]
    W[:, 3::32] = torch.where(torch.rand(16, 2, generator=rng) < 0.5, 4.0, 6.0)
    params = grid.fit(W, None)
    assert torch.equal(grid.decode(grid.encode(W, params), params), W)


def test_nvfp4_scales_are_e4m3_and_the_largest_is_448() -> None:
    params = member("grid", "nvfp4").fit(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), None)
    assert torch.equal(params["scale"].to(torch.float8_e4m3fn).float(), params["scale"])
    assert float(params["scale"].max()) == 448 and len(params["tensor"].unique()) == 1


COSTS = {"mxfp4": 4.25, "nvfp4": 4.5 + 32 / 4096**2, "nf4": 4.25, "fp8": 8 + 32 / 4096}


@pytest.mark.parametrize("name", COSTS)
def test_effective_bits(name: str) -> None:
    assert member("grid", name, w=8 if name == "fp8" else 4, g=-1).cost(4096, 4096) == pytest.approx(COSTS[name])


def sqnr(W: Tensor, name: str, **keys: object) -> float:
    grid = member("grid", name, **keys)
    params = grid.fit(W, None)
    E = grid.decode(grid.encode(W, params), params) - W
    return float(10 * torch.log10(W.square().sum() / E.square().sum()))


# Measured for the spec on 4096 x 256 numbers: normal, and Student's t with 5 degrees of freedom.
SQNR = {
    ("mxfp4", "floor"): (18.79, 18.01),
    ("mxfp4", "even"): (19.03, 18.15),
    ("mxfp4", "rceil"): (18.76, 17.52),
    ("nvfp4", "floor"): (20.44, 20.69),
}


@pytest.mark.parametrize(("name", "rule"), SQNR)
def test_what_is_lost_on_known_distributions(name: str, rule: str) -> None:
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(4096, 256, generator=rng)
    squares = torch.randn(5, 4096, 256, generator=rng).square().mean(0)
    student = torch.randn(4096, 256, generator=rng) / squares.sqrt()
    assert sqnr(normal, name, rule=rule) == pytest.approx(SQNR[name, rule][0], abs=0.2)
    assert sqnr(student, name, rule=rule) == pytest.approx(SQNR[name, rule][1], abs=0.3)


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), st.sampled_from([*TABLE, "nf4"]))
def test_rounding_is_monotone_and_nearest(a: float, b: float, name: str) -> None:
    kind = element(name)
    low, high = kind.round(torch.tensor([min(a, b), max(a, b)], dtype=torch.float64)).tolist()
    assert low <= high
    distance = (kind.values - a).abs()
    assert abs(float(kind.round(torch.tensor([a], dtype=torch.float64))) - a) == pytest.approx(float(distance.min()))
