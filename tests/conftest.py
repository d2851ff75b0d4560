"""The tiers of the suite: unmarked tests are fast, ask for nothing and get a short leash; marked ones get a longer one.

Order: fast before slow, so that a broken clone fails in the first minute.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything of Hugging Face or W&B is imported: no test may depend on an account or on a network.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
)

# Tests move the cache of runs about; kernels compiled once must stay compiled.
os.environ.setdefault(
    "QEXP_KERNEL_CACHE", str(Path(os.environ.get("QEXP_CACHE") or Path.home() / ".cache" / "qexp") / "kernels")
)
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker per core: a second thread in each would only get in the way
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import pytest
from hypothesis import settings

# Same examples on every machine, no deadline: a shared runner is slow for reasons that are not ours.
settings.register_profile("qexp", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("qexp")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Commands that run in this process set the log up for themselves; the next test finds it untouched."""
    root, own = logging.getLogger(), logging.getLogger("qexp")
    before, levels = root.handlers[:], (root.level, own.level)
    yield
    root.handlers[:] = before
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-block Llama with its tokenizer, as save_pretrained leaves it."""
    from tiny_runs import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama")


SECONDS = {"fast": 120, "slow": 1200, "gpu": 600, "bench": 1200}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by tier, give each test the time of its tier, and skip GPU tests (with the reason) where there is none."""
    items.sort(key=lambda item: list(SECONDS).index(_tier(item)))
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS[_tier(item)]))
    on_gpu = [item for item in items if _tier(item) == "gpu"]
    if on_gpu and not _cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def _tier(item: pytest.Item) -> str:
    return next((tier for tier in ("gpu", "bench", "slow") if item.get_closest_marker(tier)), "fast")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
