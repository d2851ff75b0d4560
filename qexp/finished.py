"""The quantized model of a finished run, from its folder: the same numbers to the last bit.

The record says which model and recipe, and blocks/ what was solved, as the bytes that ``size/bytes`` counts. What is
around the blocks is made again as in the run (outliers, transforms of model scope); blocks, allocated bits and what was
tuned end to end are read.

    run = load(Path("outputs/gptq-w4a16-embedded-1a2b3c4d5e"))
    run.model(input_ids=...)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qexp.core.build import build
from qexp.core.cache import cache_folder
from qexp.core.errors import UserError
from qexp.core.learned import ModelTuner
from qexp.core.measures import Measured
from qexp.core.method import Method
from qexp.core.words import FULL_BITS
from qexp.engine.fingerprint import FILE, flat
from qexp.launch import VERSION, device_of
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

    @property
    def model(self) -> Any:
        """Return the transformers model."""
        return self.view.model


def load(folder: Path) -> FinishedRun:
    """Return the run of ``folder``. Raises: UserError if there is none, it failed, or the model has changed since."""
    record = _record(folder)
    config = record["config"]
    source, method = build(config["model"], "model"), build(config["method"], "method")
    source.check()
    parts = json.loads((folder / FILE).read_text())
    now = {"model": source.identity(), "engine": VERSION, "versions of members": method.versions()}
    there = {"model": parts["model"], "engine": parts["engine"], "versions of members": parts["method"]["versions"]}
    _check_same(folder, there, now)
    device = device_of(parts["device"])
    view = _view(folder, source, method, config, device)
    return FinishedRun(view, method, source, device, record)


def _record(folder: Path) -> records.Record:
    file = folder / records.FILE_NAME
    need = "the folder of a finished run, with record.json, fingerprint.json and blocks/"
    if not file.is_file() or not (folder / FILE).is_file():
        raise UserError(f"{folder} is not the folder of a run", need)
    record = records.read(file)
    if record["status"] != "completed":
        raise UserError(f"the run of {folder} failed ({record.get('error', 'no reason recorded')})", need)
    return record


def _check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    before, now = flat(there), flat(json.loads(json.dumps(here, default=str)))
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differing:
        need = "the weights of that run, and its version of qexp"
        raise UserError(f"what {folder} was made with has changed since ({', '.join(differing)})", need)


def _view(folder: Path, source: ModelSource, method: Method, config: dict[str, Any], device: str) -> Any:
    """Return the model with the run's transforms and blocks in it."""
    from qexp.data.generated import short_sample
    from qexp.engine.acting import has_work
    from qexp.engine.blocks import activate
    from qexp.engine.solving import plan_of
    from qexp.engine.store import Store, install
    from qexp.engine.transforming import transform_model
    from qexp.engine.tuning import install_tuned, tuned_key
    from qexp.engine.whole_model import Learning
    from qexp.models.outliers import inject
    from qexp.models.view import ModelView

    model, tokenizer = source.load(device, cache_folder())
    view, seed = ModelView(model), int(config["seed"])
    inject(view, source.outliers, short_sample(model, tokenizer, seed) if source.needs_text else None)
    store, missing = Store(folder / "blocks", []), partial(_missing, folder)
    transform_model(view, method, seed, Learning(None, store, track))
    if isinstance(method.allocation, Measured) and method.grid.bits < FULL_BITS:
        view.allocation = store.once("allocation", missing).facts
    grids = plan_of(view, method, seed).grids
    for block in range(len(view.blocks)) if has_work(method, grids) else ():
        install(view, block, store.once(f"{block:05d}", missing), grids)
    for name in (name for name, tuner in method.tuner.items() if isinstance(tuner, ModelTuner) and grids):
        install_tuned(view, store.once(tuned_key(name), missing))
    activate(view, range(len(view.blocks)), method)
    return view


def _missing(folder: Path) -> Any:
    raise UserError(f"{folder}/blocks is not complete", "every block of the run")
