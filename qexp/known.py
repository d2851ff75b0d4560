"""What is finished already, told in milliseconds: without torch, without reading weights or data.

A run that ended leaves a note in ``<output_dir>/.known/``, named by its resolved config. It says in which folder the
run is and how everything looked that the fingerprint was computed from besides the config: our code, that of other
packages' members, and every file or folder the config names, by size and time of change. Where all of it looks the
same, the fingerprint would be the same. In any other case the run computes its fingerprint as always.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qexp.core.files import write_text

FOLDER = ".known"
NOT_COMPUTED_FROM = ("output_dir", "resume", "retry", "busy", "streams")  # they change no number
HERE = Path(__file__).resolve().parent
CODE = (".py", ".json", ".safetensors")
MOST_FILES = 10_000  # that a folder may have to be looked through


@dataclass(frozen=True)
class Ended:
    """How a run ended: its folder, its fingerprint, and for one that failed the cause in one line."""

    folder: str
    fingerprint: str
    failed: str = ""


def recall(config: Mapping[str, Any]) -> Ended | None:
    """Return how the run of a resolved config ended, if it did and nothing has changed since; else None."""
    file = _file(config)
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        ended = Ended(str(file.parent.parent / note["run"]), **note["ended"])
        record = json.loads((Path(ended.folder) / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    status = "failed" if ended.failed else "completed"
    same = record.get("status") == status and record.get("fingerprint") == ended.fingerprint
    return ended if same and note["looks"] == looks(config) else None


def remember(config: Mapping[str, Any], folder: Path, before: Mapping[str, str]) -> None:
    """Leave a note of the run in ``folder``, which ended, beside the runs of its ``output_dir``.

    ``before``: how everything looked when the run began; if it looks otherwise now, there is no note.
    """
    if looks(config) != before:
        return
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    ended = {"fingerprint": record["fingerprint"], "failed": record.get("error", "")}
    write_text(_file(config), json.dumps({"run": folder.name, "ended": ended, "looks": dict(before)}))


def looks(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the fingerprint is computed from besides the config, each as a digest of sizes and times."""
    values = list(_strings({key: value for key, value in config.items() if key not in NOT_COMPUTED_FROM}))
    packages = sorted({value.partition(".")[0] for key, value in values if key == "_target_"} - {"qexp"})
    named = sorted({value for key, value in values if key != "_target_" and _is_path(value)})
    found = {"qexp": _digest(HERE, CODE), "torch": importlib.metadata.version("torch"), "gpu": _gpu()}
    for package in packages:
        spec = importlib.util.find_spec(package)
        origin = Path(spec.origin) if spec and spec.origin else None
        found[package] = _digest(origin.parent if origin and origin.name == "__init__.py" else origin, CODE)
    return found | {name: _digest(Path(name).expanduser()) for name in named}


def _file(config: Mapping[str, Any]) -> Path:
    parts = {key: value for key, value in config.items() if key not in NOT_COMPUTED_FROM}
    name = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]
    return Path(str(config["output_dir"])) / FOLDER / f"{name}.json"


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (its key, it) for every string in nested dicts and lists."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _strings(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, key)


def _is_path(value: str) -> bool:
    """Return whether a string of the config is a place on disk."""
    try:
        return bool(value) and Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _digest(place: Path | None, suffixes: tuple[str, ...] = ()) -> str:
    """Return a digest of path, size and time of change of a file, or of all (with a suffix) below a folder."""
    if place is None or not place.exists():
        return ""
    stats = list(itertools.islice(_stats(place), MOST_FILES + 1))
    if len(stats) > MOST_FILES:
        return uuid.uuid4().hex  # never the same: the run reads what it has to
    lines = [f"{name} {size} {time}" for name, size, time in sorted(stats) if name.endswith(suffixes or "")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:20]


def _stats(place: Path) -> Iterator[tuple[str, int, int]]:
    if place.is_file():
        about = place.stat()
        yield str(place.resolve()), about.st_size, about.st_mtime_ns
        return
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for path in (Path(folder) / name for name in files):
            with suppress(OSError):  # a dangling link, or gone meanwhile
                about = path.stat()
                yield str(path.relative_to(place)), about.st_size, about.st_mtime_ns


def _gpu() -> str:
    """Return what decides whether device=auto is a GPU, as far as it shows without torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return str(Path("/dev/nvidiactl").exists() and not hidden)
