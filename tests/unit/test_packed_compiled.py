"""A whole packed model under torch.compile: one graph, the same logits."""

from __future__ import annotations

import pytest
import torch
from packed_models import RECIPES, rounded
from torch import Tensor

from qexp.engine.packing import pack_model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4a8g8", "w4a4_quarot", "w4a16"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_packed_model_is_one_graph(name: str) -> None:
    view = rounded("qwen3", RECIPES[name])
    pack_model(view, RECIPES[name])
    ids = torch.arange(24).view(2, 12)

    def logits(given: Tensor) -> Tensor:
        answer: Tensor = view.model(given, use_cache=False).logits
        return answer

    with torch.no_grad():
        compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids), logits(ids))
