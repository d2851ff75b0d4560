"""A finished run comes back from its folder with the logits it had, whatever its grid; what is missing is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import command, tiny
from toy_models import tokens

from qexp.core.cache import cache_folder
from qexp.core.errors import UserError
from qexp.eval.evaluation import Evaluation
from qexp.finished import load

FEW = "method.tuner.e2e_qp.training.batch=4 method.tuner.e2e_qp.training.measure_every=1"
RUNS = {
    "quarot": "method=quarot bits=w4a4kv4",
    "quik": "method=quik bits=w4a4",
    "squeezellm": "method=squeezellm bits=w3a16",
    "aqlm": "method=aqlm bits=w2a16 method.grid.dim=4 method.grid.codebook_bits=4 method.solver.epochs=1 "
    "method.tuner.codebook.training.steps=1",
    "pvq": "method=pvq bits=w2a16 method.grid.dim=8",
    "gptqt": "method=gptqt bits=w3a16",
    "power_of_two": "method=power_of_two bits=w3a16 method/tuner=[scales] method.tuner.scales.training.steps=1",
    "nvfp4": "method=nvfp4 bits=w4a4",
    "mixed_precision": "method=mixed_precision bits=w3a16 method.allocation.sequences=2 method/act=per_token",
    "efficientqat": f"method=efficientqat bits=w2a16 method.solver.training.steps=2 {FEW}",
    "spinquant": "method=spinquant bits=w4a4kv4 method.transform.learned_rotation.steps=1",
}


@pytest.mark.parametrize("name", [n if n == "squeezellm" else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
@torch.no_grad()
def test_the_logits_are_the_same(name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, seen, run = tokens(3), [], Evaluation.run

    def remember(self: Evaluation, model: Any, *rest: Any) -> Any:
        seen.append(model(input_ids=ids).logits)
        return run(self, model, *rest)

    monkeypatch.setattr(Evaluation, "run", remember)
    monkeypatch.setenv("QEXP_CACHE", str(cache_folder()))  # of the kernels: built once for all tests
    outcome = command(*tiny(tiny_folder, tmp_path, *RUNS[name].split()))
    assert outcome.code == 0, outcome.err
    folder = next(tmp_path.glob("*/record.json")).parent
    assert torch.equal(load(folder).model(input_ids=ids).logits, seen[-1])
    names = {path.stem for path in (folder / "blocks").glob("*.safetensors")}
    for gone in names - {f"{block:05d}" for block in range(1, 3)} - {"fisher"}:
        kept = shutil.copytree(folder, tmp_path / "less" / gone)
        (kept / "blocks" / f"{gone}.safetensors").unlink()
        with pytest.raises(UserError, match=r"complete|lacks"):
            load(kept)
