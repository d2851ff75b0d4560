"""The typed top level of the config, the names of bits, and mistakes explained in one line.

Groups hold members of any package, so only what every config has is typed here; members are checked against their own
dataclasses when they are built (core/build.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from qexp.core.errors import nearest

BITS_PATTERN = re.compile(r"w(2|3|4|6|8)(?:a(4|6|8|16))?(?:kv(2|3|4|8|16))?(?:g(32|64|128))?")
BITS_FORM = "w{2,3,4,6,8}[a{4,6,8,16}][kv{2,3,4,8,16}][g{32,64,128}]"
COMMON_BITS = ("w2a16g64", "w3a16", "w3a16g128", "w4a16", "w4a16g128", "w4a4", "w4a4kv4", "w4a8", "w8a8", "w8a8kv8")


@dataclass
class BitsConfig:
    """``bits=w4a4kv4g128`` or the keys one by one; ``group`` -1 is one grid per output channel."""

    name: str = "custom"
    weight: int = 16
    act: int = 16
    kv: int = 16
    group: int = -1


@dataclass
class QexpConfig:
    """The top level of the config."""

    model: Any = MISSING
    method: Any = MISSING
    bits: BitsConfig = MISSING
    calibration: Any = MISSING
    eval: Any = MISSING
    tracking: Any = MISSING
    sweeps: Any = None
    seed: int = 0
    device: str = "auto"
    output_dir: str = "outputs"
    resume: bool = True


def bits_of(name: str) -> dict[str, Any] | None:
    """Return the config of a name like w4a4kv4g128, or None; what is left out is 16 bits, one scale per channel."""
    match = BITS_PATTERN.fullmatch(name)
    if match is None:
        return None
    weight, act, kv, group = (int(part) if part else default for part, default in zip(match.groups(), (0, 16, 16, -1), strict=True))
    shown = f"w{weight}a{act}" + (f"kv{kv}" if kv < 16 else "") + (f"g{group}" if group > 0 else "")
    return {"name": shown, "weight": weight, "act": act, "kv": kv, "group": group}


def explain(error: BaseException) -> str:
    """Return one line for a mistake: what it got, what it needs."""
    text = "\n".join(str(e) for e in _chain(error))
    if match := re.search(r"Could not find '([\w/]+)/([^'/]+)'", text):
        group, name = match.groups()
        options = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        return f"{group}={name} is unknown; " + _options(group, name, options)
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]} is no config key; " + nearest_key(match[1])
    if match := re.search(r"(Value '[^']*'.*?could not be converted to \w+|Invalid value.*)", text):
        key = re.search(r"full_key: (\S+)", text)
        return f"{key[1] if key else 'config'}: {match[1]}"
    if match := re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)", text):
        key = re.search(r"full_key: (\S+)", text)
        return f"{key[1] if key else match[1]} is no config key; " + nearest_key(key[1] if key else match[1])
    return re.sub(r"\s+", " ", str(error)).strip()[:400]


def _options(group: str, name: str, options: list[str]) -> str:
    if group == "bits":
        return f"need {BITS_FORM}, e.g. bits={nearest_name(name, COMMON_BITS)}, or single keys: bits.weight=5"
    return nearest(name, [o for o in options if not o.startswith("_")])


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return the most similar of ``known``."""
    return max(known, key=lambda option: difflib.SequenceMatcher(None, name, option).ratio())


def nearest_key(key: str) -> str:
    """Return the config keys most like ``key``, from the default composition and the groups."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from qexp.engine.fingerprint import flat

    known = {"model", "method", "bits", "calibration", "eval", "tracking"}
    if GlobalHydra.instance().is_initialized():
        config = OmegaConf.to_container(compose("config", return_hydra_config=False), resolve=False)
        known |= set(flat(config))
    near = nearest(key, known).split("known:")[0]
    return near or "qexp --cfg job shows all keys"


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
