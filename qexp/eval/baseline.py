"""What the float model answers, computed once per model and kept: window losses, hidden states, accuracies.

One folder, one safetensors file per evaluation set and one JSON file per list of tasks, each named by a hash of what
determines it (a sample of every weight included, so that a folder shared by two models is safe) and moved into place
when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qexp.data.generated import digest, stored
from qexp.eval.divergence import Teacher, score_window
from qexp.eval.perplexity import Loop, Reader, device_of, hidden_states

Namer = Callable[[dict[str, Any]], Path]
VERSION = 1
SAMPLED = 64


@dataclass(frozen=True)
class Baseline:
    """The float model's window losses per set, accuracies, and a teacher per set where divergence is wanted."""

    losses: dict[str, list[float]]
    accuracies: dict[str, float]
    teachers: dict[str, Teacher]


def fingerprint(model: Any) -> str:
    """Return a hash of the model's class, configuration, device type and of 64 values of every parameter."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in {"_name_or_path", "transformers_version"}}
    about = [type(model).__name__, config, device_of(model).type]
    state = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu()
        state.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + some.numpy().tobytes())
    return state.hexdigest()[:24]


def float_windows(
    source: Reader, windows_WS: Tensor, loop: Loop, name: Namer, *, keep: bool
) -> tuple[list[float], Path]:
    """Return the float model's window losses and their file; with ``keep`` it has the hidden states [W, S, C] too."""
    content = hashlib.sha256(windows_WS.contiguous().numpy().tobytes()).hexdigest()
    path = name({"windows": content, "shape": list(windows_WS.shape), "batch": loop.batch, "hidden": keep})
    return stored(path, "losses", lambda: _score(source, windows_WS, loop, keep)).tolist(), path


@torch.no_grad()
def _score(source: Reader, windows_WS: Tensor, loop: Loop, keep: bool) -> dict[str, Tensor]:
    """Run the windows once; losses float64 [W] and, with ``keep``, hidden states [W, S, C] in the model's dtype."""
    losses, hidden = [], []
    for ids, hidden_SC in hidden_states(source, windows_WS, loop, "evaluate the float model, batches"):
        losses.append(score_window(source, hidden_SC, ids, None, None)[0])
        if keep:
            hidden.append(hidden_SC.cpu())
    made = {"losses": torch.tensor(losses, dtype=torch.float64)}
    return made | {"hidden": torch.stack(hidden)} if keep else made


def float_accuracies(file: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return the accuracies of ``file``, or make and keep them."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_text(json.dumps(make(), indent=1))
        part.replace(file)
    values: dict[str, float] = json.loads(file.read_text())
    return values


def namer(folder: Path, model: Any, suffix: str) -> Namer:
    """Return how files of ``folder`` are named for one model: by a hash of its fingerprint and of what they hold."""
    model_hash = fingerprint(model)
    return lambda key: folder / f"{digest({**key, 'model': model_hash, 'version': VERSION})}{suffix}"
