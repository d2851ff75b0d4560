"""Ask Hydra outside a run: what a choice of groups composes to, and which choices there are.

For ``qexp-methods``, which looks at every recipe, and for messages about mistakes, which name what would have worked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from qexp import sources
from qexp.schema import KINDS, LISTS, QexpConfig

CONFIGS = "qexp.conf"


def register() -> None:
    """Tell Hydra our schema and where configs come from."""
    ConfigStore.instance().store(name="base_config", node=QexpConfig)
    sources.register()


@contextmanager
def hydra() -> Iterator[None]:
    """Make Hydra ready for the functions below, without a run; may be nested."""
    register()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIGS, version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def composed(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved config of ``qexp OVERRIDES``. Raises: what Hydra and OmegaConf raise."""
    return cast("dict[str, Any]", OmegaConf.to_container(compose("config", list(overrides)), resolve=True))


def job(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what one run of ``qexp OVERRIDES`` is given: the resolved config, and the option chosen per group."""
    made = compose("config", list(overrides), return_hydra_config=True)
    choices = {key: str(value) for key, value in made.hydra.runtime.choices.items() if not key.startswith("hydra")}
    return composed(overrides), choices


def alone(group: str, name: str) -> Any:
    """Return the config of a recipe (``group`` is method), or of a member (method/<kind>) at the default bits."""
    kind = group.removeprefix("method").strip("/")
    method = composed([f"{group}=[{name}]" if kind in LISTS else f"{group}={name}"])["method"]
    if not kind:
        return method
    return next(iter(method[kind].values())) if kind in LISTS else method[kind]


def members(recipe: str) -> dict[str, list[str]]:
    """Return the members of a recipe by kind, as overrides name them."""
    made = compose("config", [f"method={recipe}"], return_hydra_config=True)
    chosen = made.hydra.runtime.choices
    return {kind: list(made.method[kind]) if kind in LISTS else [chosen[f"method/{kind}"]] for kind in KINDS}


def options(group: str) -> list[str]:
    """Return the choices of a group, e.g. of method/solver, those of other packages included; sorted."""
    found = GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG)
    return sorted({name for name in found if not name.startswith("_")})


def groups(parent: str = "") -> list[str]:
    """Return the groups below ``parent``, by full name: method gives method/act, method/grid, ..."""
    found = GlobalHydra.instance().config_loader().get_group_options(parent, ObjectType.GROUP)
    return sorted({f"{parent}/{name}".strip("/") for name in found} - {"hydra"})


def text_of(group: str, name: str) -> str:
    """Return the YAML file of a choice as it was written, comments and all."""
    for entry in GlobalHydra.instance().config_loader().get_search_path().get_path():
        scheme, _, package = (entry.path or "").partition("://")
        file = files(package).joinpath(f"{group}/{name}.yaml") if scheme == "pkg" else None
        if file is not None and file.is_file():
            return file.read_text(encoding="utf-8")
    raise FileNotFoundError(f"{group}/{name}.yaml on Hydra's search path")
