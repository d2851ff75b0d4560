"""Screen 1: one run, from a resolved config to a record. What Hydra does before is in cli.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qexp.core.build import build
from qexp.core.cache import in_use
from qexp.engine.checks import check_method, check_model
from qexp.engine.context import Run
from qexp.engine.packing import check_packable
from qexp.launch import Setup, begin, recording, write
from qexp.ownership import check_failed_before, is_finished, owned
from qexp.packed_run import contenders
from qexp.publication import is_published, publish
from qexp.tracking.wandb import driven_by_agent

log = logging.getLogger(__name__)


def run(config: dict[str, Any], choices: Mapping[str, str], sweep: str | None, asked: Sequence[str] = ()) -> Path:
    """Carry out the run of ``config`` (or find it finished) and return the folder of its record.

    ``choices`` are the options chosen per config group and ``sweep`` the name of the sweep, both for the tracker;
    ``asked`` are the overrides, for the index of runs.

    Raises: UserError for a mistake in the configuration or its inputs, before anything heavy where it can be known;
    Elsewhere if another process computes it; in a sweep FailedBefore if it failed before.
    """
    setup = Setup(**{key: build(config[key], key) for key in Setup.__annotations__})
    setup.check()
    check_method(setup.method, calibrated=setup.calibration.source != "none")
    if setup.eval.speed:
        check_packable(setup.method)
    work = begin(setup, sweep)
    with owned(work, resume=setup.resume, busy=setup.busy):
        if is_finished(work):
            log.info("finished before, nothing to do (resume=false repeats it): %s", work.folder)
            if driven_by_agent() or not is_published(work):
                publish(work, setup, choices, sweep)
            return work.folder
        if sweep and not setup.retry:
            check_failed_before(work)
        with in_use(work.cache), recording(work, config, asked):
            write(work, config, measure(setup, work))
    publish(work, setup, choices, sweep)
    return work.folder


def measure(setup: Setup, work: Run) -> dict[str, Any]:
    """Quantize and evaluate; return the parts of the record that come from doing so."""
    from qexp.data.generated import short_sample
    from qexp.engine.blocks import activate, quantize_blocks
    from qexp.engine.diagnostics import Surfaces
    from qexp.engine.transforming import transform_model
    from qexp.engine.tuning import tune_model
    from qexp.engine.whole_model import Learning
    from qexp.eval.size import sizes
    from qexp.models.outliers import inject
    from qexp.models.view import ModelView

    model, tokenizer = setup.model.load(work.device, work.cache)
    view = ModelView(model)
    check_model(view, setup.method)
    log.info("%s -> %s", work.name, work.folder)
    tokens = setup.calibration.load(model, tokenizer, work.cache, work.model_identity, work.progress)
    sets = setup.eval.sets(model, tokenizer, work.cache, work.model_identity, work.progress)
    text = short_sample(model, tokenizer, setup.seed) if setup.model.needs_text else None
    inject(view, setup.model.outliers, text)
    baseline = setup.eval.baseline(view.model, tokenizer, sets, work.cache / "baseline", work.progress)

    surfaces, began = Surfaces(view, setup.method, tokens), time.perf_counter()
    losses = transform_model(view, setup.method, setup.seed, Learning(tokens, work.store, work.progress))
    blocks = quantize_blocks(view, tokens, setup.method, work)
    losses |= tune_model(view, tokens, setup.method, work)
    activate(view, range(len(view.blocks)), setup.method)
    middle = time.perf_counter()
    results = setup.eval.run(view.model, tokenizer, sets, baseline, work.progress)
    metrics = {**results.metrics, **sizes(view, setup.method)}
    surfaces.look_again()
    cost = {"quantize_seconds": middle - began, "evaluate_seconds": time.perf_counter() - middle}
    if setup.eval.speed:  # last, since packing spends the view
        metrics |= setup.eval.speeds(*contenders(view, setup.method, setup.model, work.device), work.progress)
    return {
        "metrics": metrics,
        "window_losses": results.window_losses,
        "blocks": blocks,
        "diagnostics": {**surfaces.found(), "losses": losses, "allocation": view.allocation},
        "cost": cost,
    }
