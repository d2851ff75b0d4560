"""The integer grid against methods/rtn.md section 6, item by item, and evaluation.md section 5 for its cost."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qexp.core.errors import NumericalError, UserError
from qexp.core.words import Layer
from qexp.stages.grid import _shared_search as search
from qexp.stages.grid._shared import slices
from qexp.stages.grid._shared_scale import SYMMETRIES
from qexp.stages.grid.integer import Integer

GRID = Integer(
    bits=4,
    group=-1,
    symmetry="restricted",
    range="minmax",
    clip=1.0,
    shrink_grid=100,
    shrink_steps=80,
    exponent=2.4,
    scale_dtype="float32",
    minmax_roles=(),
)
LAYER = Layer("model.layers.0.mlp.up_proj", "up", 0, 64, 288)
each_symmetry = pytest.mark.parametrize("symmetry", SYMMETRIES)


def weight(outputs: int = 12, inputs: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hessian(inputs: int = 64, seed: int = 1) -> Tensor:
    X_TI = weight(200, inputs, seed) @ weight(inputs, inputs, seed + 1) * weight(1, inputs, seed + 2).exp()
    return X_TI.T @ X_TI / len(X_TI)


def quantize(grid: Integer, W_OI: Tensor, H_II: Tensor | None = None) -> Tensor:
    params = grid.fit(W_OI, H_II)
    return grid.decode(grid.encode(W_OI, params), params)


@each_symmetry
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, -1, 16])
def test_values_are_scale_times_integers_in_range_and_quantizing_twice_changes_nothing(symmetry, bits, group):
    grid = replace(GRID, bits=bits, symmetry=symmetry, group=group)
    W_OI = weight()
    params = grid.fit(W_OI, None)
    codes = grid.encode(W_OI, params)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    zero = params["zero"].double() if symmetry == "asymmetric" else torch.tensor(2.0 ** (bits - 1))
    assert ("zero" in params) == (symmetry == "asymmetric")
    width = 64 if group < 1 else group
    scale, zero = params["scale"].double().repeat_interleave(width, 1), zero.expand_as(params["scale"])
    expected = scale * (codes.double() - zero.repeat_interleave(width, 1))
    torch.testing.assert_close(grid.decode(codes, params).double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(grid.encode(grid.decode(codes, params), params), codes)


@each_symmetry
@pytest.mark.parametrize("bits", [2, 4])
def test_error_is_half_a_step_inside_the_range(symmetry, bits):
    grid = replace(GRID, bits=bits, symmetry=symmetry)
    W_OI = weight(dtype=torch.float64)
    params = grid.fit(W_OI, None)
    levels = grid.decode(torch.arange(2**bits, dtype=torch.uint8).expand(len(W_OI), -1), params)
    lowest, highest = levels.aminmax(dim=1, keepdim=True)
    inside = W_OI.clamp(lowest, highest) == W_OI
    error = (quantize(grid, W_OI) - W_OI).abs()
    assert inside.float().mean() > 0.3
    assert (error <= params["scale"].abs() / 2 * (1 + 1e-12))[inside].all()


@pytest.mark.parametrize("symmetry", ["restricted", "full_signed"])
def test_restricted_and_full_signed_reproduce_the_extreme_element(symmetry):
    W_OI = weight(200, 16, dtype=torch.float64)
    at = W_OI.abs().argmax(1, keepdim=True)
    error = (quantize(replace(GRID, symmetry=symmetry), W_OI) - W_OI).gather(1, at)
    assert error.abs().max() < 1e-14
    assert {True, False} == set((W_OI.gather(1, at) > 0).flatten().tolist())


@each_symmetry
@given(power=st.integers(-6, 6), seed=st.integers(0, 99))
def test_scaling_by_a_power_of_two_commutes(symmetry, power, seed):
    grid, W_OI = replace(GRID, symmetry=symmetry, range="mse", shrink_steps=5), weight(3, 16, seed)
    assert torch.equal(quantize(grid, W_OI * 2.0**power), quantize(grid, W_OI) * 2.0**power)


def test_restricted_is_odd():
    assert torch.equal(quantize(GRID, -weight()), -quantize(GRID, weight()))


@each_symmetry
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_a_group_as_wide_as_the_row_is_the_row_and_one_row_is_the_tensor(symmetry, rule):
    row = replace(GRID, symmetry=symmetry, range=rule)
    assert torch.equal(quantize(replace(row, group=64), weight()), quantize(row, weight()))
    assert torch.equal(quantize(replace(row, group=0), weight(1)), quantize(row, weight(1)))
    assert not torch.equal(quantize(replace(row, group=0), weight(2)), quantize(row, weight(2)))


@each_symmetry
@pytest.mark.parametrize("group", [-1, 16])
def test_searches_lower_their_own_error_and_start_from_the_plain_range(symmetry, group):
    W_OI, H_II = weight(), hessian()
    plain = replace(GRID, symmetry=symmetry, group=group, bits=3)
    measures = {
        "mse": search.power_error(2.4),
        "diag_h": search.weighted_error(H_II.diagonal(), len(W_OI), group),
        "output": search.output_error(H_II, group),
    }
    for rule, measure in measures.items():
        searched = replace(plain, range=rule)
        before = measure(slices(quantize(plain, W_OI) - W_OI, group))
        after = measure(slices(quantize(searched, W_OI, H_II) - W_OI, group))
        assert (after <= before).all(), rule
        assert after.sum() < 0.99 * before.sum(), rule
        only_full = replace(searched, shrink_steps=1)
        assert torch.equal(quantize(only_full, W_OI, H_II), quantize(plain, W_OI)), rule


def test_output_error_is_the_change_of_the_layers_output():
    X_TI, E_OI = weight(50, 64, 3), weight(5, 64, 4)
    H_II = X_TI.T @ X_TI / len(X_TI)
    per_group = [(X_TI[:, g : g + 16] @ E_OI[:, g : g + 16].T).square().mean(0) for g in range(0, 64, 16)]
    measured = search.output_error(H_II, 16)(slices(E_OI, 16))
    torch.testing.assert_close(measured, torch.stack(per_group, 1))


def test_diag_h_error_weighs_columns():
    E_OI, h_I = weight(5, 64, 4), weight(1, 64, 5)[0].square()
    weighted = (E_OI.square() * h_I).view(5, 4, 16).sum(-1)
    torch.testing.assert_close(search.weighted_error(h_I, 5, 16)(slices(E_OI.clone(), 16)), weighted)
    whole = search.weighted_error(h_I, 5, 0)(slices(E_OI.clone(), 0))
    torch.testing.assert_close(whole, weighted.sum().view(1, 1))


def test_clip_cuts_only_what_is_larger_than_the_limit():
    lo, hi = search.clip((torch.tensor([-1.0, -3.0]), torch.tensor([3.0, 1.0])), 0.5)
    assert (lo.tolist(), hi.tolist()) == ([-1.0, -1.5], [1.5, 1.0])


def test_ties_keep_the_wider_range():
    silent = torch.zeros(64, 64)  # inputs that never fire: every candidate has error zero
    searched, plain = (replace(GRID, range=rule).fit(weight(), silent) for rule in ("diag_h", "minmax"))
    assert torch.equal(searched["scale"], plain["scale"])


def test_asymmetric_range_contains_zero():
    params = replace(GRID, symmetry="asymmetric").fit(torch.tensor([[1.0, 2.0], [-2.0, -1.0]]), None)
    torch.testing.assert_close(params["scale"], torch.full((2, 1), 2 / 15))
    assert params["zero"].tolist() == [[0], [15]]


def test_zero_point_stays_a_code_where_the_scale_is_coarse():
    grid = replace(GRID, symmetry="asymmetric", bits=8, scale_dtype="float16")
    smallest = 2.0**-24  # of float16: 1.4 of them are stored as 1, so -lo / s is 357
    assert grid.fit(torch.full((1, 4), -1.4 * 255 * smallest), None)["zero"].tolist() == [[255]]


@each_symmetry
def test_zeros_stay_zero(symmetry):
    W_OI = weight()
    W_OI[3] = 0
    W_OI[:, ::5] = 0
    W_OI[4] = W_OI[4].abs()
    W_OI[5] = -W_OI[5].abs()
    for scale_dtype in ("float32", "float16"):
        grid = replace(GRID, symmetry=symmetry, scale_dtype=scale_dtype)
        assert (quantize(grid, W_OI)[W_OI == 0] == 0).all()
        assert grid.fit(W_OI, None)["scale"][3] == 1


SQNR_DB = {  # methods/rtn.md section 3: N(0, 1), 2000 slices of 128
    2: (2.3, 5.2, 7.2, 7.4, 5.9),
    3: (11.2, 12.5, 13.4, 13.6, 13.3),
    4: (18.6, 19.1, 19.5, 19.7, 19.9),
    8: (43.8, 43.7, 43.6, 43.8, 44.6),
}


@pytest.mark.parametrize("bits", SQNR_DB)
def test_sqnr_table(bits):
    W_OI = weight(2000, 128)
    for symmetry, expected in zip(SYMMETRIES, SQNR_DB[bits], strict=True):
        error = quantize(replace(GRID, bits=bits, symmetry=symmetry), W_OI) - W_OI
        sqnr = 10 * torch.log10(W_OI.square().sum() / error.square().sum())
        assert float(sqnr) == pytest.approx(expected, abs=0.3), symmetry


@pytest.mark.parametrize(("bits", "inputs", "expected"), [(4, 128, 0.85), (4, 4096, 0.66), (3, 4096, 0.51)])
def test_search_finds_the_ratio_of_the_spec(bits, inputs, expected):
    W_OI = weight(16 if inputs > 1000 else 256, inputs)
    plain, searched = (replace(GRID, bits=bits, range=r).fit(W_OI, None)["scale"] for r in ("minmax", "mse"))
    assert float((searched / plain).mean()) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("rule", ["mse", "diag_h", "output"])
def test_result_does_not_depend_on_the_chunks(rule, monkeypatch):
    W_OI, H_II, grid = weight(), hessian(), replace(GRID, range=rule, group=16)
    whole = grid.fit(W_OI, H_II)["scale"]
    monkeypatch.setitem(search.CHUNK_ELEMENTS, "cpu", 5 * 64)
    torch.testing.assert_close(grid.fit(W_OI, H_II)["scale"], whole, rtol=0, atol=0)


def test_scale_is_rounded_before_codes_are_derived():
    W_OI, grid = weight(), replace(GRID, scale_dtype="float16")
    params = grid.fit(W_OI, None)
    assert torch.equal(params["scale"].half().float(), params["scale"])
    assert torch.equal(grid.encode(W_OI, params), (W_OI / params["scale"]).round().add(8).clamp(0, 15).byte())


def test_tiny_scales_warn_and_huge_ones_raise(caplog):
    grid = replace(GRID, scale_dtype="float16")
    with caplog.at_level(logging.WARNING, "qexp"):
        assert (grid.fit(weight() * 1e-9, None)["scale"] > 0).all()
    assert "too small for float16" in caplog.text
    with pytest.raises(NumericalError, match=r"method\.grid\.scale_dtype=bfloat16"):
        grid.fit(weight() * 1e8, None)


def test_without_a_hessian_as_in_a_search_the_plain_rule_serves():
    for rule, instead in (("diag_h", "mse"), ("output", "minmax")):
        got = quantize(replace(GRID, range=rule), weight())
        assert torch.equal(got, quantize(replace(GRID, range=instead), weight()))


def test_hessian_is_asked_for_where_it_is_used():
    needs = {rule: replace(GRID, range=rule).needs for rule in ("minmax", "mse", "diag_h", "output")}
    assert [rule for rule, what in needs.items() if "activations" in what] == ["diag_h", "output"]


def test_weights_that_are_not_finite_raise():
    for bad in (torch.nan, torch.inf):
        W_OI = weight()
        W_OI[2, 3] = bad
        with pytest.raises(NumericalError):
            GRID.fit(W_OI, None)


def test_for_layer_sets_bits_and_keeps_the_plain_range_of_named_roles():
    grid = replace(GRID, range="output", minmax_roles=("q", "k"))
    assert (grid.for_layer(LAYER, 3).bits, grid.for_layer(LAYER, 3).range) == (3, "output")
    assert grid.for_layer(replace(LAYER, role="k"), 3).range == "minmax"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 128}, r"grid\.group=128 does not divide in_features=288 of .*up_proj; .*set bits\.group=96 or -1"),
        ({"group": -2}, r"set bits\.group=1 or -1"),
        ({"bits": 12}, r"grid\.bits=12; need 2 to 8"),
        ({"symmetry": "sym"}, r"grid\.symmetry='sym' is unknown"),
        ({"range": "max"}, r"did you mean minmax"),
        ({"scale_dtype": "half"}, r"method\.grid\.scale_dtype="),
        ({"range": "output", "group": 0}, r"set bits\.group=-1"),
    ],
)
def test_check_tells_what_it_got_what_it_needs_and_what_to_type(change, message):
    with pytest.raises(UserError, match=message):
        replace(GRID, **change).check(LAYER)


def test_check_accepts_what_fits():
    for group in (-1, 0, 96, 288):
        replace(GRID, group=group).check(LAYER)
    replace(GRID, bits=16).check(LAYER)


@pytest.mark.parametrize(
    ("bits", "group", "symmetry", "expected"),
    [
        (4, 128, "asymmetric", 4.15625),  # evaluation.md section 5
        (3, 128, "asymmetric", 3.1484375),
        (2, 64, "asymmetric", 2.28125),
        (2, 128, "asymmetric", 2.140625),
        (4, 128, "restricted", 4.125),
        (4, -1, "half_step", 4 + 16 / 4096),
        (8, 0, "full_signed", 8 + 16 / (4096 * 1000)),
    ],
)
def test_cost_matches_the_published_accounting(bits, group, symmetry, expected):
    grid = replace(GRID, bits=bits, group=group, symmetry=symmetry, scale_dtype="float16")
    assert grid.cost(1000, 4096) == pytest.approx(expected, abs=1e-12)
