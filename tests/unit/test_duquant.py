"""DuQuant's rotations and permutation against methods/duquant.md section 6 and against its official code's answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from toy_recipes import transform_named

from qexp.core.errors import UserError
from qexp.stages.transform.duquant import DuQuant, _spreading, zigzag
from qexp.stages.transform.smooth import factors

GOLDEN = Path(__file__).parents[1] / "golden" / "duquant" / "search.safetensors"


def searched(x: torch.Tensor, seed: int = 0, **keys: object) -> torch.Tensor:
    """Return the matrix that the greedy search finds for one block."""
    member = transform_named("duquant", permute=False, **keys)
    assert isinstance(member, DuQuant)
    map = member._rotation(x.double(), x.shape[1], torch.Generator().manual_seed(seed))
    return map.apply(torch.eye(x.shape[1], dtype=torch.float64))


def spike(channel: int, size: float = 1400.0) -> torch.Tensor:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 1e-3
    x[3, channel] = size
    return x


@pytest.mark.parametrize("channel", [0, 5, 127])
def test_the_papers_form_flattens_a_spike_in_one_step_the_codes_does_not(channel):
    x = spike(channel)
    left = (x.double() @ searched(x, steps=1)).abs().max()
    right = (x.double() @ searched(x, steps=1, side="right")).abs().max()
    assert left <= 1.2 * 1400 / 128**0.5 < right


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("index", ["channel", "row"])
@pytest.mark.parametrize("peak", ["absmax", "range"])
def test_the_peak_never_rises_and_the_matrix_is_orthogonal(side, index, peak):
    rng = torch.Generator().manual_seed(2)
    for x in (torch.randn(50, 32, generator=rng), torch.ones(50, 32), torch.zeros(5, 32)):
        R = searched(x, steps=40, side=side, index=index, peak=peak)
        measure = {"absmax": lambda v: v.abs().max(), "range": lambda v: v.max() - v.min()}[peak]
        assert float(measure(x.double() @ R)) <= float(measure(x.double())) * (1 + 1e-6) + 1e-9
        assert float((R.T @ R - torch.eye(32)).abs().max()) < 1e-5


def test_same_seed_same_matrix():
    x = spike(4)
    assert torch.equal(searched(x), searched(x)) and not torch.equal(searched(x), searched(x, seed=1))


def test_zigzag_deals_every_channel_once_and_evenly():
    magnitude = torch.cat([torch.full((16,), 50.0), torch.rand(112, generator=torch.Generator().manual_seed(0))])
    order = zigzag(magnitude, 16)
    assert torch.equal(order.sort().values, torch.arange(128).int())
    dealt, plain = magnitude[order].view(8, 16).mean(1), magnitude.view(8, 16).mean(1)
    assert dealt.var() < plain.var() / 100
    assert zigzag(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


@pytest.mark.parametrize(
    ("keys", "key"), [({"rotation": "x"}, "rotation"), ({"side": "up"}, "side"), ({"peak": "top"}, "peak")]
)
def test_unknown_choices_are_refused(keys, key):
    with pytest.raises(UserError, match=rf"transform\.duquant\.{key}"):
        transform_named("duquant", **keys)


@pytest.mark.parametrize("keys", [{"block": 0}, {"steps": -1}, {"patience": -2}])
def test_numbers_that_mean_nothing_are_refused(keys):
    with pytest.raises(UserError, match=r"duquant\.block="):
        transform_named("duquant", **keys)


@pytest.fixture
def golden():
    return load_file(GOLDEN)


def test_the_official_code_finds_the_same_rotations_and_order(golden):
    member = transform_named("duquant_code", steps=24)
    assert isinstance(member, DuQuant)
    x = golden["X"].double()
    for k, (base, official) in enumerate(zip(golden["base"], golden["R"], strict=True)):
        found = member._search(x.reshape(-1, 32), base.double())
        torch.testing.assert_close(found.float(), official, rtol=0, atol=2e-6)
        x = (x.reshape(-1, 32) @ found).reshape(x.shape)
        if k == 0:
            order = zigzag(x.abs().amax(0), 32)
            assert torch.equal(order, golden["permutation"])
            x = x[:, order.long()]
    torch.testing.assert_close(x.float(), golden["Y"], rtol=0, atol=2e-6 * 700)
    assert member._peak(x) == pytest.approx(member._peak(golden["Y"]), rel=1e-5)


def test_the_codes_base_is_of_our_family(golden):
    """Whatever its random part, a base is a mirror times diag(1, Q'): its first column is what is fixed."""
    for base in golden["base"]:
        ours = _spreading(32, "right", torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours[:, 0].float(), base[:, 0], rtol=0, atol=1e-6)


def test_the_official_code_smooths_by_the_same_factors(golden):
    about = SimpleNamespace(stats=SimpleNamespace(absmax_I=golden["X"].float().abs().amax(0)), weights=[golden["W"]])
    torch.testing.assert_close(factors(about, 0.6), golden["smooth_0.6"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [2, 4, 32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bases_are_orthogonal(side, size):
    base = _spreading(size, side, torch.Generator().manual_seed(0))
    assert float((base @ base.T - torch.eye(size)).abs().max()) < 1e-12
    if side == "left":
        torch.testing.assert_close(base[0], torch.full((size,), size**-0.5, dtype=torch.float64))
