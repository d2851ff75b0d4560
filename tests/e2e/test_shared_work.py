"""What the float model does is computed once per sweep, is the same to the last bit, and stays within its bounds."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import command, tiny

from qexp.core import cache
from qexp.engine import capture, shared


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEXP_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["method=awq", "method=gptq method.inputs=float", "method=omniquant"])
def test_a_sweep_gives_the_bits_of_single_runs(recipe: str, tiny_folder: Path, tmp_path: Path) -> None:
    words = [*recipe.split(), "eval=none"]
    words += ["method.tuner.clip.training.epochs=1"] if "omniquant" in recipe else []
    for bits in ("w3a16", "w4a16"):
        assert command(*tiny(tiny_folder, tmp_path / "single", *words, f"bits={bits}")).code == 0
    assert not (tmp_path / "cache" / "float").exists()
    assert command("-m", *tiny(tiny_folder, tmp_path / "sweep", *words, "bits=w3a16,w4a16")).code == 0
    assert list((tmp_path / "cache" / "float").rglob("*-00001.safetensors"))
    files = sorted((tmp_path / "single").glob("*/blocks/*.safetensors"))
    assert len(files) == 6
    for file in files:
        ours, theirs = (
            load_file(tmp_path / who / file.relative_to(tmp_path / "single")) for who in ("sweep", "single")
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_second_run_observes_nothing_where_only_bits_differ(tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny(tiny_folder, tmp_path / "out", "method=gptq", "method.inputs=float", "eval=none")
    assert command("-m", *words, "bits=w4a16").code == 0
    refuse = mock.Mock(side_effect=AssertionError("computed again"))
    with mock.patch.object(capture, "_observed", refuse), mock.patch.object(shared, "advance", refuse):
        assert command("-m", *words, "bits=w3a16,w2a16").code == 0
    different = [word.replace("calibration.tokens=32", "calibration.tokens=31") for word in words]
    with mock.patch.object(capture, "_observed", refuse):
        assert command("-m", *different, "bits=w3a16").code == 1, "other tokens, other statistics"


@pytest.mark.parametrize("content", [b"", b"cut", None])
def test_a_damaged_file_is_made_again(content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = cache.kept(tmp_path / "float" / "it.safetensors", lambda: {"x": torch.arange(250)})
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    assert cache.kept(path, lambda: {"x": torch.arange(250)}) == path
    assert "is damaged" in caplog.text and torch.equal(load_file(path)["x"], torch.arange(250))


def test_what_was_used_longest_ago_goes_first_and_nothing_new_while_in_use(tmp_path: Path) -> None:
    now = time.time()
    for i, name in enumerate(("old", "middle", "new")):
        path = cache.kept(tmp_path / "float" / f"{name}.safetensors", lambda: {"x": torch.zeros(250)})
        os.utime(path, (now - 300 + i, now - 300 + i))
    forgotten = cache.kept(tmp_path / "float" / "forgotten.safetensors", lambda: {"x": torch.zeros(250)})
    os.utime(forgotten, (now - 2 * cache.DAY, now - 2 * cache.DAY))
    kernels = tmp_path / "kernels" / "core.so"
    kernels.parent.mkdir()
    kernels.write_bytes(bytes(5000))
    cache.kept(tmp_path / "float" / "old.safetensors", dict)  # used again: it is the newest now
    with cache.in_use(tmp_path):
        assert cache.trim(tmp_path, 0) == 1 and not forgotten.exists()
    assert cache.trim(tmp_path, 2500) > 0
    left = {path.name for path in (tmp_path / "float").glob("*.safetensors")}
    assert left == {"old.safetensors", "new.safetensors"}
    cache.trim(tmp_path, 0)
    assert kernels.exists() and not list((tmp_path / "float").glob("*.safetensors"))


def slowly(path: Path, log: Path) -> None:
    def make() -> dict[str, torch.Tensor]:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return {"x": torch.arange(3)}

    cache.kept(path, make)


def test_of_several_processes_one_makes_a_file(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=slowly, args=(tmp_path / "x.safetensors", tmp_path / "log")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_limit_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("QEXP_CACHE_GB", "much")
    assert cache.limit() == 20e9
    assert "QEXP_CACHE_GB=much is no number" in caplog.text
