"""What every grid owes: nearest codes, codes that survive decoding, column slices, and a cost equal to its bytes."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stage_members import assert_well_kept, few_words, member, names
from torch import Tensor

from qexp.core.errors import NumericalError, UserError
from qexp.core.linear import InputPath, QuantLinear
from qexp.core.ranges import Uniform
from qexp.core.stages import Grid
from qexp.core.storage import pack_linear, unpack_linear
from qexp.core.words import FULL_BITS, Layer, Quantized

LAYER = Layer("model.layers.0.mlp.up_proj", "up", 0, 24, 64)
every_grid = pytest.mark.parametrize("name", names("grid"))
every_group = pytest.mark.parametrize("group", [-1, 16])


def made(name: str, group: int = 32, w: int = 4) -> Grid:
    """Return the grid of a YAML at this group, also where the YAML fixes one; skip widths that it does not have."""
    grouped = {"group": group} if "group" in {field.name for field in fields(member("grid", name))} else {}
    built: Grid = member("grid", name, w=w, **grouped, **few_words(name))
    try:
        built.check(LAYER)
    except UserError as error:
        pytest.skip(f"not its shape: {error}")
    return built


def whole(grid: Grid) -> bool:
    """Return whether the parameters are those of the whole weight."""
    return grid.group == 0


@cache
def widths(name: str) -> list[int]:
    """Return the bits that a grid has."""
    found = []
    for bits in range(2, 9):
        try:
            member("grid", name, w=bits, **few_words(name)).check(LAYER)
        except UserError:
            continue
        found.append(bits)
    return found


def weight(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hessian() -> Tensor:
    X_TI = torch.randn(99, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 64)
    return X_TI.T @ X_TI / 99


def test_all_grids_are_seen():
    assert len(names("grid")) >= 5


@every_grid
def test_it_is_a_grid_and_well_kept(name):
    grid = member("grid", name)
    assert isinstance(grid, Grid)
    assert_well_kept("grid", name, grid)


@every_grid
def test_bits_and_group_come_from_the_bits_of_the_run(name):
    grid = made(name, 16, w=3)
    assert grid.bits == 3
    assert grid.for_layer(LAYER, 2).bits == 2
    if "group" in {field.name for field in fields(grid)}:
        assert grid.group == 16


@every_grid
@every_group
@pytest.mark.parametrize("bits", [2, 4])
def test_encode_is_nearest_where_brute_force_can_tell(name, group, bits):
    grid, W_OJ = made(name, group, w=bits), weight()
    if grid.dim != 1:
        pytest.skip("brute force walks the codes of scalar grids")
    params = grid.fit(W_OJ, hessian())
    error = (grid.decode(grid.encode(W_OJ, params), params) - W_OJ).abs()
    levels = [grid.decode(torch.full((24, 64), code, dtype=torch.uint8), params) for code in range(2**bits)]
    least = torch.stack([(level - W_OJ).abs() for level in levels]).amin(0)
    torch.testing.assert_close(error, least, rtol=1e-5, atol=1e-6)


@every_grid
@every_group
def test_codes_survive_decoding(name, group):
    grid = made(name, group)
    params = grid.fit(weight(), hessian())
    codes = grid.encode(weight(seed=1), params)
    assert codes.shape[:2] == (24, 64 // grid.dim) and len(codes.unique()) >= 4
    decoded = grid.decode(codes, params)
    assert torch.equal(grid.decode(grid.encode(decoded, params), params), decoded)


@every_grid
@every_group
def test_columns_slice_parameters_on_dimension_one(name, group):
    grid, W_OJ = made(name, group), weight()
    params = grid.fit(W_OJ, hessian())
    codes, decoded = grid.encode(W_OJ, params), grid.decode(grid.encode(W_OJ, params), params)
    groups = 64 // grid.group if grid.group > 0 else 1
    assert all(p.shape[:2] == (24, groups) for p in params.values())
    for j in range(0, 64, grid.dim):
        g = j * groups // 64
        local = {key: p[:, g : g + 1] for key, p in params.items()}
        here = grid.encode(W_OJ[:, j : j + grid.dim], local)
        assert torch.equal(here, codes[:, j // grid.dim : j // grid.dim + 1])
        assert torch.equal(grid.decode(here, local), decoded[:, j : j + grid.dim])


@every_grid
@every_group
def test_rows_are_independent_and_the_weight_stays(name, group):
    grid, W_OJ = made(name, group), weight()
    if whole(grid):
        pytest.skip("all rows share its parameters")
    params, half = grid.fit(W_OJ, hessian()), grid.fit(W_OJ[:9], hessian())
    assert torch.equal(W_OJ, weight())
    assert all(torch.equal(params[key][:9], half[key]) for key in params)


@every_grid
@every_group
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_stored_in_the_bytes_it_costs_and_comes_back_exactly(name, group, bits):
    grid, W_OJ = made(name, group, w=bits), weight()
    params = grid.fit(W_OJ, hessian())
    linear, again = (QuantLinear(torch.nn.Linear(64, 24, bias=False), InputPath(1)) for _ in range(2))
    linear.install(grid, Quantized(grid.encode(W_OJ, params), params))
    tensors, facts = pack_linear(linear)
    unpack_linear(again, grid, tensors, json.loads(json.dumps(facts)))
    assert torch.equal(again.weight, linear.weight) and torch.equal(again.codes, linear.codes)
    assert all(torch.equal(again.params[key], p) and again.params[key].dtype == p.dtype for key, p in params.items())
    padding = 8 * len(tensors)  # the last byte of each tensor
    assert 0 <= 8 * sum(t.nbytes for t in tensors.values()) - grid.cost(24, 64) * W_OJ.numel() < padding


@every_grid
def test_float64_weights_give_float64_answers_as_good(name):
    grid, W_OJ = made(name), weight(torch.float64)
    params = grid.fit(W_OJ, hessian())
    decoded = grid.decode(grid.encode(W_OJ, params), params)
    assert decoded.dtype == torch.float64
    narrow = grid.fit(W_OJ.float(), hessian())
    assert (decoded - grid.decode(grid.encode(W_OJ.float(), narrow), narrow)).abs().mean() < 1e-3


@every_grid
def test_more_bits_are_closer(name):
    errors = []
    for bits in (2, 3, 4, 6, 8):
        if bits not in widths(name):
            continue
        grid = made(name, 32, w=bits)
        params = grid.fit(weight(), hessian())
        errors.append(float((grid.decode(grid.encode(weight(), params), params) - weight()).norm()))
    if len(errors) < 2:
        pytest.skip("it has one width")
    least = 0.1 if getattr(grid, "clip", 1.0) == 1.0 else 0.5  # what a clip cuts off stays cut off
    least = least if isinstance(grid, Uniform) else 0.9  # powers of two gain little: their tests say how much
    assert errors[-1] < least * errors[0]
    if not hasattr(grid, "elements"):  # e2m3 in small blocks is nearer than e4m3: as long a mantissa, nothing cut
        assert errors == sorted(errors, reverse=True)


@every_grid
def test_rows_of_zeros_are_fine_and_nan_is_told(name):
    grid, W_OJ = made(name), weight()
    W_OJ[5] = 0
    params = grid.fit(W_OJ, hessian())
    assert all(p.isfinite().all() for p in params.values())
    assert (grid.decode(grid.encode(W_OJ, params), params)[5] == 0).all()
    W_OJ[0, 0] = torch.nan
    with pytest.raises(NumericalError):
        grid.fit(W_OJ, hessian())


@every_grid
def test_check_refuses_a_group_that_does_not_divide(name):
    made(name, 16).check(LAYER)
    member("grid", name, w=FULL_BITS).check(LAYER)
    if "group" not in {field.name for field in fields(member("grid", name))}:
        pytest.skip("it has no groups")
    with pytest.raises(UserError, match=r"48 does not divide in_features=64.*set .*group="):
        member("grid", name, group=48).check(LAYER)


ROWS = {
    "normal": lambda x: x,
    "heavy": lambda x: x.pow(5),
    "constant": lambda x: torch.full_like(x, float(x[0])),
    "zeros": torch.zeros_like,
    "one": lambda x: torch.where(torch.arange(len(x)) == 3, 1.0, 0.0),
    "two values": lambda x: x.sign(),
    "positive": lambda x: x.abs() + 1,
}


@pytest.mark.slow
@every_grid
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(sorted(ROWS)), min_size=1, max_size=5),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    groups=st.integers(1, 3),
    rowwise=st.booleans(),
    wide=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_any_weight_is_stored_as_codes_that_stay(name, kinds, scale, groups, rowwise, wide, seed):
    columns, rows = 16 * groups, len(kinds)
    own = {"group": -1 if rowwise else 16} if "group" in {field.name for field in fields(member("grid", name))} else {}
    has = [bits for bits in widths(name) if bits <= 4 or not few_words(name)]  # where all sums are followed
    bits = has[wide % len(has)]
    layer = Layer("any", "up", 0, rows, columns)
    grid = member("grid", name, w=bits, **own, **few_words(name)).for_layer(layer, bits)
    try:
        grid.check(layer)
    except UserError:
        assume(False)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    W_OJ = scale * torch.stack([ROWS[kind](row) for kind, row in zip(kinds, x, strict=True)])
    params = grid.fit(W_OJ, None)
    codes = grid.encode(W_OJ, params)
    decoded = grid.decode(codes, params)
    assert decoded.isfinite().all() and float((decoded - W_OJ).norm()) <= 1.01 * float(W_OJ.norm())
    assert torch.equal(grid.decode(grid.encode(decoded, params), params), decoded)
    linear, again = (QuantLinear(torch.nn.Linear(columns, rows, bias=False), InputPath(1)) for _ in range(2))
    linear.install(grid, Quantized(codes, params))
    tensors, facts = pack_linear(linear)
    unpack_linear(again, grid, tensors, json.loads(json.dumps(facts)))
    assert torch.equal(again.weight, linear.weight) and torch.equal(again.codes, codes)
    padding = 64 * len(tensors)  # eight numbers are packed at once
    assert -1e-6 < 8 * sum(t.nbytes for t in tensors.values()) - grid.cost(rows, columns) * W_OJ.numel() < padding
