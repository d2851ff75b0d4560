"""The models that a run times: its own on packed integers, and the float one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qexp.core.cache import cache_folder
from qexp.core.method import Method
from qexp.eval.speed import Contender
from qexp.models.load import ModelSource


def contenders(view: Any, method: Method, source: ModelSource, device: str) -> tuple[Contender, Contender]:
    """Return the packed model of ``view``, which is spent by it, and the float model, both in bfloat16."""
    import torch
    from torch import nn
    from transformers import DynamicCache

    from qexp.engine.packing import pack_model

    packed = pack_model(view, method)
    nn.Module.to(packed.model, torch.bfloat16)
    plain, _ = replace(source, dtype="bfloat16").load(device, cache_folder())
    return Contender(packed.model, packed.new_cache), Contender(plain, lambda: DynamicCache(config=plain.config))
