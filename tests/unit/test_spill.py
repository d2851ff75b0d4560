"""A stack of tensors on disk gives back what it was given."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from qexp.core.spill import Spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_last_in_first_out_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(size, 3, generator=rng).mul(9).to(dtype) for size in (4, 0, 1, 7)]
    with closing(Spill(tmp_path)) as stack:
        for x in given:
            stack.push(x)
        assert len(stack) == 4
        assert torch.equal(stack.pop(), given[3])
        stack.push(given[0].T)  # a view
        for x in (given[0].T, given[2], given[1], given[0]):
            back = stack.pop()
            assert torch.equal(back, x) and back.dtype == dtype and back.shape == x.shape
        with pytest.raises(IndexError):
            stack.pop()
    assert not list(tmp_path.iterdir())


def test_it_keeps_values_not_graphs() -> None:
    x = torch.ones(2, requires_grad=True)
    with closing(Spill()) as stack:
        stack.push(x * 2)
        back = stack.pop()
    assert not back.requires_grad and back.tolist() == [2, 2]
