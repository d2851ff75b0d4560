"""What a run computes, as a hash: equal fingerprints mean equal results on one kind of machine.

Everything that changes the answer is in (resolved choices, member versions, contents of weights and data, seed, device
type, dtype), nothing that does not (paths, tracking, the folder of the output).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qexp.core.errors import UserError
from qexp.core.files import write_text

FILE = "fingerprint.json"


def digest(parts: dict[str, Any]) -> str:
    """Return the sha256 of a JSON-able dict, independent of key order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def flat(parts: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts and lists as one dict with dotted keys."""
    if not isinstance(parts, dict):
        return {prefix: parts}
    return {
        k: v
        for name, value in parts.items()
        for k, v in flat(value, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def claim(folder: Path, parts: dict[str, Any]) -> None:
    """Make ``folder`` the home of this computation; a folder of another one is refused, naming what differs."""
    path, text = folder / FILE, json.dumps(parts, sort_keys=True, indent=1, default=str)
    if path.exists():
        there, here = flat(json.loads(path.read_text())), flat(json.loads(text))
        differing = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
        if differing:
            raise UserError(
                f"{folder} belongs to a run that differs in {', '.join(differing[:5])}", "another output_dir"
            )
        return
    write_text(path, text)


def digest_of(path: Path, key: str) -> str:
    """Return the sha256 of a file's contents, or of all in a folder. Raises: UserError if there is none."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise UserError(f"{key}={path} does not exist, or is empty", "what a run has left there", f"{key}=''")
    return "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
