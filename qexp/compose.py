"""Ask Hydra outside a run: what a choice of groups composes to, and which choices there are.

For ``qexp-methods``, which looks at every recipe, and for messages about mistakes, which name what would have worked.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.resources import files
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, OmegaConf

from qexp import sources
from qexp.schema import KINDS, LISTS, QexpConfig

CONFIGS = "qexp.conf"
_NOTHING = object()


def _pick(key: Any, table: Mapping[Any, Any], otherwise: Any = _NOTHING) -> Any:
    """Return what ``table`` has for ``key``, else ``otherwise``. Raises: KeyError where neither says anything."""
    return table[key] if key in table or otherwise is _NOTHING else otherwise


# ${pick:${bits.weight},{2: 40},20}: a setting that a paper has for some models or bits only. On import, not in
# register(): a launcher's process resolves a job's config too, and imports this file alone.
OmegaConf.register_new_resolver("pick", _pick, replace=True)
# ${unlike_others:}: two machines that begin a sweep in the same second do not share its folder; one value per sweep.
OmegaConf.register_new_resolver("unlike_others", lambda: secrets.token_hex(2), use_cache=True, replace=True)


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


def composed_each(jobs: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Yield the resolved config of each job. Raises: what Hydra and OmegaConf raise.

    Jobs that choose the same options are composed once (0.1 s), and their keys set in copies, as Hydra does it last.
    """
    made: dict[tuple[str, ...], DictConfig] = {}
    for job in jobs:
        keys = [one for one in OverridesParser.create().parse_overrides(list(job)) if _is_key(one)]
        rest = {one.input_line for one in keys}
        choices = tuple(text for text in job if text not in rest)
        if choices not in made:
            made[choices] = compose("config", list(choices))
        config = deepcopy(made[choices]) if keys else made[choices]
        for one in keys:
            OmegaConf.update(config, one.key_or_group, one.value(), merge=True)
        yield cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))


def sweeps() -> list[str]:
    """Return the saved sweeps as the command names them: ``+sweeps=demo``, ``+sweeps/papers=quarot``, ..."""
    found = [sources.SWEEPS, *(group for group in groups(sources.SWEEPS) if group not in sources.SWEEP_PARTS)]
    return [f"+{group}={name}" for group in found for name in options(group)]


def jobs(sweep: str) -> list[list[str]]:
    """Return the overrides of each job of a saved sweep, the sweep itself first, as Hydra's sweeper makes them."""
    params = compose("config", [sweep], return_hydra_config=True).hydra.sweeper.get("params") or {}
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return [[sweep, *job] for job in itertools.product(*map(_choices, parsed))]


def _choices(override: Override) -> list[str]:
    """Return an override once for each of its values; of an interval, which a search draws from, its two ends."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{key}={text}" for text in override.sweep_string_iterator()]


def _is_key(override: Override) -> bool:
    """Return whether this sets a plain key: no choice of a group, and nothing added or deleted."""
    plain = override.type is not None and override.type.name == "CHANGE"
    return plain and not GlobalHydra.instance().config_loader().get_group_options(override.key_or_group)


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
