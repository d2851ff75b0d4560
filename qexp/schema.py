"""The typed top level of the config and the names of bits.

Groups hold members of any package, so only what every config has is typed here; members are checked against their own
dataclasses when they are built (core/build.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

BITS_PATTERN = re.compile(r"w(2|3|4|6|8)(?:a(4|6|8|16))?(?:kv(2|3|4|8|16))?(?:g(32|64|128))?")
BITS_FORM = "w{2,3,4,6,8}[a{4,6,8,16}][kv{2,3,4,8,16}][g{32,64,128}]"
COMMON_BITS = ("w2a16g64", "w3a16", "w3a16g128", "w4a16", "w4a16g128", "w4a4", "w4a4kv4", "w4a8", "w8a8", "w8a8kv8")

KINDS = ("transform", "grid", "solver", "act", "kv", "tuner", "allocation")
LISTS = ("transform", "tuner")  # kinds of which a recipe has any number, in order


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
    seed: int = 0
    device: str = "auto"
    output_dir: str = "outputs"
    resume: bool = True
    retry: bool = False
    busy: str = "skip"
    streams: str = "auto"


def bits_of(name: str) -> dict[str, Any] | None:
    """Return the config of a name like w4a4kv4g128, or None; what is left out is 16 bits, one scale per channel."""
    match = BITS_PATTERN.fullmatch(name)
    if match is None:
        return None
    weight, act, kv, group = (
        int(part) if part else default for part, default in zip(match.groups(), (0, 16, 16, -1), strict=True)
    )
    return {"name": bits_name(weight, act, kv, group), "weight": weight, "act": act, "kv": kv, "group": group}


def bits_name(weight: int, act: int, kv: int, group: int) -> str:
    """Return the name of these bits: w4a4kv4g128; what takes part in no quantization is left out, but for the act."""
    return f"w{weight}a{act}" + (f"kv{kv}" if kv < 16 else "") + (f"g{group}" if group > 0 else "")
