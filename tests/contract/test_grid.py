"""What every grid owes: nearest codes, codes that survive decoding, column slices, and a cost equal to its bytes."""

from __future__ import annotations

import pytest
import torch
from stage_members import assert_well_kept, member, names
from torch import Tensor

from qexp.core.errors import NumericalError, UserError
from qexp.core.stages import Grid
from qexp.core.words import FULL_BITS, Layer
from qexp.kernels.pack import pack_codes

LAYER = Layer("model.layers.0.mlp.up_proj", "up", 0, 24, 64)
every_grid = pytest.mark.parametrize("name", names("grid"))
every_group = pytest.mark.parametrize("group", [-1, 16])


def made(name: str, group: int = 32, w: int = 4) -> Grid:
    """Return the grid of a YAML at this group, also where the YAML fixes one."""
    built: Grid = member("grid", name, w=w, group=group)
    return built


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
    assert (grid.bits, grid.group) == (3, 16)
    assert grid.for_layer(LAYER, 2).bits == 2


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
    assert codes.dtype == torch.uint8 and codes.shape == (24, 64 // grid.dim) and len(codes.unique()) > 8
    assert torch.equal(grid.encode(grid.decode(codes, params), params), codes)


@every_grid
@every_group
def test_columns_slice_parameters_on_dimension_one(name, group):
    grid, W_OJ = made(name, group), weight()
    params = grid.fit(W_OJ, hessian())
    codes, decoded = grid.encode(W_OJ, params), grid.decode(grid.encode(W_OJ, params), params)
    groups = 1 if group == -1 else 64 // group
    assert all(p.shape[:2] == (24, groups) for p in params.values())
    for j in range(0, 64, grid.dim):
        g = 0 if group == -1 else j // group
        local = {key: p[:, g : g + 1] for key, p in params.items()}
        here = grid.encode(W_OJ[:, j : j + grid.dim], local)
        assert torch.equal(here, codes[:, j // grid.dim : j // grid.dim + 1])
        assert torch.equal(grid.decode(here, local), decoded[:, j : j + grid.dim])


@every_grid
@every_group
def test_rows_are_independent_and_the_weight_stays(name, group):
    grid, W_OJ = made(name, group), weight()
    params, half = grid.fit(W_OJ, hessian()), grid.fit(W_OJ[:9], hessian())
    assert torch.equal(W_OJ, weight())
    assert all(torch.equal(params[key][:9], half[key]) for key in params)


@every_grid
@every_group
def test_cost_is_the_bytes_that_are_stored(name, group):
    grid, W_OJ = made(name, group, w=3), weight()
    params = grid.fit(W_OJ, hessian())
    stored = pack_codes(grid.encode(W_OJ, params).flatten(), 3).numel() * 8
    for p in params.values():  # integers are packed at the width of a code; a scale survives its storage
        if not p.is_floating_point():
            stored += pack_codes(p.flatten(), 3).numel() * 8
            continue
        assert torch.equal(p.half().float(), p)
        stored += p.numel() * 16
    assert grid.cost(24, 64) == pytest.approx(stored / W_OJ.numel())


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
        grid = made(name, 32, w=bits)
        params = grid.fit(weight(), hessian())
        errors.append(float((grid.decode(grid.encode(weight(), params), params) - weight()).norm()))
    least = 0.1 if getattr(grid, "clip", 1.0) == 1.0 else 0.5  # what a clip cuts off stays cut off
    assert errors == sorted(errors, reverse=True) and errors[-1] < least * errors[0]


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
    with pytest.raises(UserError, match=r"48 does not divide in_features=64.*set bits\.group="):
        made(name, 48).check(LAYER)
