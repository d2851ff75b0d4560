"""kill -9 at any moment: the same command finishes with the record and the block files of a run that was left alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import assert_same_blocks, blocks_below, command, process, record_below, tiny

from qexp.models.load import EMBEDDED

# Runs the command in a process that kills itself (SIGKILL: nothing is cleaned up) at the n-th call of a function.
KILLER = """
import os, pkgutil, signal, sys

target, calls, when, *rest = sys.argv[1:]
sys.argv[1:] = rest
where, _, name = target.rpartition(".")
owner = pkgutil.resolve_name(where)
real, seen = getattr(owner, name), []

def lethal(*given, **named):
    seen.append(name)
    if len(seen) == int(calls) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    answer = real(*given, **named)
    if len(seen) == int(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

setattr(owner, name, lethal)
from qexp.cli import main

main()
"""
MOMENTS = {
    # name: (function, its n-th call, before or after it, blocks on disk then)
    "nothing yet": ("qexp.engine.blocks.embed", "1", "before", 0),
    "the first block is written but not renamed": ("qexp.engine.store.save_file", "1", "after", 0),
    "the second block is about to be written": ("qexp.engine.store.save_file", "2", "before", 1),
    "the second block is installed": ("qexp.engine.blocks.install", "2", "after", 2),
    "all blocks are there": ("qexp.eval.evaluation.Evaluation.run", "1", "before", 3),
    "the record is about to be written": ("qexp.report.record.write", "1", "before", 3),
}
RECIPES = {
    "quarot": ["method=quarot", "bits=w4a4kv4"],
    "gptq": ["method=gptq", "bits=w3a16"],
    "awq": ["method=awq", "bits=w3a16g32"],
    "gptq on rotated outliers": ["method=gptq", "bits=w3a8", "model.outliers={kind:rotate}"],
}
LONGER = {
    "spinquant": ["method=spinquant", "bits=w4a4kv4", "method.transform.learned_rotation.steps=2"],
    "flatquant": ["method=flatquant", "bits=w4a4kv4", "method.transform.kronecker.training.steps=4"],
    "duquant": ["method=duquant", "bits=w4a4kv4", "method.transform.duquant.block=8"],
    "quik": ["method=quik", "bits=w4a4"],
    "quip": ["method=quip", "bits=w2a16"],
    "ranges": ["method=gptq", "method/act=per_tensor", "bits=w4a8"],
    "omniquant": ["method=omniquant_wa", "bits=w4a4kv4", "method.transform.let.training.steps=4"],
    "affinequant": ["method=affinequant", "bits=w4a4", "method.transform.affine.training.epochs=2"],
    "lrq": ["method=lrq", "bits=w4a8kv8", "method.solver.training.steps=4"],
    "signround": ["method=signround", "bits=w3a16g32", "method.solver.training.steps=4"],
    "efficientqat": ["method=efficientqat", "bits=w2a16g32", "method.tuner.e2e_qp.training.batch=2"],
    "squeezellm": ["method=squeezellm", "bits=w3a16"],
    "aqlm": [
        *("method=aqlm", "bits=w2a16", "method.grid.dim=4", "method.grid.codebook_bits=4", "method.solver.epochs=1"),
        "method.tuner.codebook.training.steps=2",
    ],
    "power of two, scales": [
        *("method=power_of_two", "bits=w3a16", "method/tuner=[scales]", "method.tuner.scales.training.steps=2"),
    ],
    "gptqt": ["method=gptqt", "bits=w3a16"],
    "pvq": ["method=pvq", "bits=w2a16", "method.grid.dim=8"],
    "mixed precision": ["method=mixed_precision", "bits=w3a16"],
    "mxfp4": ["method=mxfp4", "bits=w4a4"],
    "norm tweaking": ["method=norm_tweaking", "bits=w3a16"],
    "all of it": [
        *(
            "method=duquant",
            "bits=w3a8kv4",
            "method.transform.duquant.block=8",
            "method/solver=block_ap",
            "streams=disk",
        ),
        *("method/tuner=[clip,norm_tweaking,norm_closed_form,e2e_qp]", "method.tuner.clip.training.steps=2"),
    ],
}
LEARNING_MOMENTS = {
    # as MOMENTS, of efficientqat
    "the second block is half learned": ("qexp.engine.reconstruct.Reconstruction.step", "5", "after", 1),
    "the second block's learned tensors are written": ("qexp.engine.store.save_file", "3", "after", 1),
    "training end to end has begun": ("qexp.engine.tuning.NextToken.descend", "1", "after", 3),
    "a state of it is written but not renamed": ("qexp.engine.store.save_file", "7", "after", 3),
    "training end to end goes on behind that state": ("qexp.engine.tuning.NextToken.descend", "3", "after", 4),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def assert_same_run(got: Path, expected: Path) -> None:
    ours, theirs = record_below(got), record_below(expected)
    for key in ("status", "fingerprint", "name", "metrics", "window_losses", "warnings", "diagnostics"):
        assert ours[key] == theirs[key], key
    layers = [[block["layers"] for block in record["blocks"]] for record in (ours, theirs)]
    assert layers[0] == layers[1]
    assert_same_blocks(got, expected)


@pytest.mark.parametrize(
    "moment",
    [pytest.param(name, marks=[] if "not renamed" in name else pytest.mark.slow) for name in MOMENTS],
)
def test_a_killed_run_continues(moment: str, tiny_folder: Path, tmp_path: Path) -> None:
    function, calls, when, there = MOMENTS[moment]
    recipe = list(RECIPES.values())[list(MOMENTS).index(moment) % len(RECIPES)]
    killed = process(function, calls, when, *tiny(tiny_folder, tmp_path / "killed", *recipe), script=KILLER)
    assert killed.code == -signal.SIGKILL, killed.err
    assert len(blocks_below(tmp_path / "killed")) == there
    assert list((tmp_path / "killed").glob("*/record.json")) == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/blocks/*.safetensors")}
    assert command(*tiny(tiny_folder, tmp_path / "killed", *recipe)).code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished block is not computed again"
    assert command(*tiny(tiny_folder, tmp_path / "whole", *recipe)).code == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert list((tmp_path / "killed").glob("*/blocks/*.part")) == [], "what a kill left half written is cleared away"


@pytest.mark.parametrize("moment", [pytest.param(name, marks=pytest.mark.slow) for name in LEARNING_MOMENTS])
def test_a_killed_run_that_learns_continues(moment: str, tiny_folder: Path, tmp_path: Path) -> None:
    function, calls, when, there = LEARNING_MOMENTS[moment]
    recipe = [*LONGER["efficientqat"], "method.tuner.e2e_qp.training.measure_every=2", "calibration.samples=6"]
    recipe += ["method.tuner.e2e_qp.training.epochs=4", "method.tuner.e2e_qp.training.micro=0"]
    killed = process(function, calls, when, *tiny(tiny_folder, tmp_path / "killed", *recipe), script=KILLER)
    assert killed.code == -signal.SIGKILL, killed.err
    assert len(blocks_below(tmp_path / "killed")) == there
    assert command(*tiny(tiny_folder, tmp_path / "killed", *recipe)).code == 0
    assert command(*tiny(tiny_folder, tmp_path / "whole", *recipe)).code == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert list((tmp_path / "killed").glob("*/*/*.part")) == []


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=pytest.mark.slow) for name in RECIPES | LONGER],
)
def test_any_prefix_of_blocks_gives_the_same_run(recipe: str, tiny_folder: Path, tmp_path: Path) -> None:
    """A kill leaves the first k blocks and no record; here for every k, without the kill."""
    words = (RECIPES | LONGER)[recipe]
    assert command(*tiny(tiny_folder, tmp_path / "whole", *words)).code == 0
    for kept in range(3):
        out = tmp_path / f"kept{kept}"
        assert command(*tiny(tiny_folder, out, *words)).code == 0
        next(out.glob("*/record.json")).unlink()
        for path in sorted(out.glob("*/blocks/*"))[kept:]:
            path.unlink()
        assert command(*tiny(tiny_folder, out, *words)).code == 0
        assert_same_run(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(), reason="the embedded weights are not in this checkout"
)
def test_three_kills_at_random_moments_on_the_embedded_model(tmp_path: Path) -> None:
    """Someone else pulls the plug, three times, each time after one block more at the earliest."""
    words = ["method=quarot", "bits=w4a4kv4", "tracking=none", "calibration.samples=8", "eval.limit=4"]
    waits = random.Random(0)
    for kill in range(3):
        run = subprocess.Popen(
            [sys.executable, "-m", "qexp", *words, f"output_dir={tmp_path}/killed"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while run.poll() is None and len(list(tmp_path.glob("killed/*/blocks/*.safetensors"))) <= kill:
            time.sleep(0.01)
        time.sleep(waits.random())
        run.kill()
        assert run.wait() == -signal.SIGKILL or kill, "the first kill at least finds it at work"
    assert command(*words, f"output_dir={tmp_path}/killed").code == 0
    assert command(*words, f"output_dir={tmp_path}/whole").code == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
