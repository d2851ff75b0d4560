"""A run's model on packed integers: at the end of the run, or later from its folder.

Of a finished run the record says which model and recipe, and blocks/ what was solved. Everything around the blocks is
made again as in the run (outliers, transforms of model scope); the blocks are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qexp.core.build import build
from qexp.core.errors import UserError
from qexp.core.method import Method
from qexp.engine.context import cache_folder
from qexp.engine.fingerprint import FILE, flat
from qexp.eval.speed import Contender
from qexp.models.load import ModelSource
from qexp.report import record as records
from qexp.tracking.progress import track


@dataclass(frozen=True)
class FinishedRun:
    """A simulated model as its run left it, quantizers on; ``view`` is a ModelView, ``source`` loads the float one."""

    view: Any
    method: Method
    source: ModelSource
    device: str
    record: records.Record


def load(folder: Path) -> FinishedRun:
    """Return the run of ``folder``. Raises: UserError if there is none, it failed, or the model has changed since."""
    record = _record(folder)
    config = record["config"]
    source, method = build(config["model"], "model"), build(config["method"], "method")
    source.check()
    parts = json.loads((folder / FILE).read_text())
    _check_same_model(folder, parts["model"], source.identity())
    view = _view(folder, source, method, config, parts["device"])
    return FinishedRun(view, method, source, parts["device"], record)


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


def _record(folder: Path) -> records.Record:
    file = folder / records.FILE_NAME
    need = "the folder of a finished run, with record.json, fingerprint.json and blocks/"
    if not file.is_file() or not (folder / FILE).is_file():
        raise UserError(f"{folder} is not the folder of a run", need)
    record = records.read(file)
    if record["status"] != "completed":
        raise UserError(f"the run of {folder} failed ({record.get('error', 'no reason recorded')})", need)
    return record


def _check_same_model(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    before, now = flat(there), flat(json.loads(json.dumps(here, default=str)))
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differing:
        raise UserError(f"the model of {folder} has changed since ({', '.join(differing)})", "the weights of that run")


def _view(folder: Path, source: ModelSource, method: Method, config: dict[str, Any], device: str) -> Any:
    """Return the model with the run's transforms and blocks in it."""
    from qexp.data.generated import short_sample
    from qexp.engine.acting import has_work
    from qexp.engine.blocks import activate
    from qexp.engine.solving import plan_of
    from qexp.engine.store import Store, install
    from qexp.engine.transforming import transform_model
    from qexp.engine.whole_model import Learning
    from qexp.models.outliers import inject
    from qexp.models.view import ModelView

    model, tokenizer = source.load(device, cache_folder())
    view, seed = ModelView(model), int(config["seed"])
    inject(view, source.outliers, short_sample(model, tokenizer, seed) if source.needs_text else None)
    store = Store(folder / "blocks", [])
    transform_model(view, method, seed, Learning(None, store, track))
    grids = plan_of(view, method, seed).grids
    for block in range(len(view.blocks)) if has_work(method, grids) else ():
        install(view, block, store.once(f"{block:05d}", lambda: _missing(folder)), grids)
    activate(view, range(len(view.blocks)), method)
    return view


def _missing(folder: Path) -> Any:
    raise UserError(f"{folder}/blocks is not complete", "every block of the run")
