"""What every allocation owes: bits for every layer, a budget held, equal bits for equal sensitivity."""

from __future__ import annotations

import pytest
from stage_members import Figures, assert_well_kept, member, names

from qexp.core.stages import Allocation
from qexp.core.words import FULL_BITS, Layer

every_allocation = pytest.mark.parametrize("name", names("allocation"))
LAYERS = [
    Layer(f"model.layers.{block}.self_attn.{role}_proj", role, block, 64, 64) for block in (0, 1) for role in "qkv"
]


def test_all_allocations_are_seen():
    assert len(names("allocation")) >= 2


@every_allocation
def test_it_is_an_allocation_and_well_kept(name):
    allocation = member("allocation", name)
    assert isinstance(allocation, Allocation)
    assert_well_kept("allocation", name, allocation)


@every_allocation
@pytest.mark.parametrize("bits", [2, 4, FULL_BITS])
def test_every_layer_gets_bits_within_the_budget(name, bits):
    assigned = member("allocation", name, w=bits).assign(iter(LAYERS), Figures(lambda layer, b: layer.block + 2.0**-b))
    assert list(assigned) == [layer.name for layer in LAYERS]
    budget = FULL_BITS if name == "none" else bits
    assert sum(assigned.values()) <= budget * len(LAYERS)
    assert all(isinstance(b, int) and 2 <= b <= FULL_BITS for b in assigned.values())


@every_allocation
def test_equal_sensitivity_gives_equal_bits(name):
    assigned = member("allocation", name, w=3).assign(LAYERS, Figures(lambda _, bits: 2.0**-bits))
    assert set(assigned.values()) == {FULL_BITS if name == "none" else 3}
