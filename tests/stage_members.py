"""Every member of a stage kind, found by its YAML and built as a run would build it: what the contract tests walk."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from qexp.core.words import Layer

CONF = Path(__file__).parents[1] / "conf"


def names(kind: str) -> list[str]:
    """Return the members of ``kind``, sorted."""
    return sorted(path.stem for path in (CONF / "method" / kind).glob("*.yaml"))


def member(kind: str, name: str, w: int = 4, a: int = 4, kv: int = 4, g: int = 32, **keys: Any) -> Any:
    """Return one member at ``bits`` of weight ``w``, act ``a``, kv ``kv``, group ``g``; ``keys`` override its own."""
    config = copy.deepcopy(_composed(kind, name))
    config.bits = {"weight": w, "act": a, "kv": kv, "group": g}
    config.method[kind].update(keys)
    return instantiate(config.method[kind], _convert_="all")


def few_words(name: str) -> dict[str, int]:
    """Return the settings with which a grid of codebooks fits a weight of 24 x 64, every sum of 4 bits followed."""
    has = {field.name for field in fields(member("grid", name))}
    return {"dim": 2, "codebook_bits": 2, "beam": 64} if "codebook_bits" in has else {}


@cache
def _composed(kind: str, name: str) -> DictConfig:
    """Return what Hydra makes of the member's YAML and its parents (a tenth of a second each)."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose(config_name=f"method/{kind}/{name}", overrides=["+bits={}"])
    OmegaConf.set_struct(config, False)
    return config


def assert_well_kept(kind: str, name: str, built: Any) -> None:
    """Assert what every member owes its reader: defaults in YAML only, a docstring with its source, one page."""
    module = inspect.getmodule(type(built))
    assert module is not None and module.__doc__ and module.__file__
    assert len(Path(module.__file__).read_text(encoding="utf-8").splitlines()) < 250
    assert isinstance(built.version, int)
    settings = fields(built)
    assert all(f.kw_only and f.default is MISSING is f.default_factory for f in settings), "a default outside the YAML"
    text = (CONF / "method" / kind / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("#"), "a member's YAML opens by saying what it is"
    assert yaml.safe_load(text)
    if settings and name != "uniform":
        assert "Source:" in module.__doc__


class Figures:
    """Measures of a made-up model: each bit costs a bit."""

    def __init__(self, damage: Callable[[Layer, int], float]) -> None:
        self.damage, self.told = damage, dict[str, float]()

    def cost(self, layer: Layer, bits: int) -> float:
        return float(bits)

    def tell(self, name: str, value: float) -> None:
        self.told[name] = value
