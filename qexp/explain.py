"""A mistake on the command line as one line: what it got, what it needs, the override to type.

Hydra and OmegaConf say what went wrong inside them; here it is said in the words of the config. To name the nearest
valid key, the config is composed once more without the mistake (half a second).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException, ValidationError

from qexp import compose
from qexp.core.errors import UserError, nearest
from qexp.schema import BITS_FORM, COMMON_BITS, BitsConfig, QexpConfig

HYDRA_MISTAKES = (HydraException, OmegaConfBaseException)
NO_NAME = "Config group override must be"  # Hydra's ValueError for method=null or bits=4
IN_WORDS = {int: "a whole number", bool: "true or false", str: "a text"}
GRAMMAR = "key=value, lists as key=[a,b], mappings as key={a: 1}, in single quotes where the shell would split them"
GROUP_CHOICE = re.compile(r"[a-z]+(/[a-z]+)?=[\w\[\],]*")


def explain(error: BaseException, overrides: Sequence[str]) -> str:
    """Return one line for ``error``, which the command line ``overrides`` led to."""
    for one in _chain(error):
        if isinstance(one, MissingConfigException) and one.missing_cfg_file:
            return _unknown_choice(one.missing_cfg_file)
        if isinstance(one, OverrideParseException):
            return f"{one.override} cannot be read; need {GRAMMAR}"
        if isinstance(one, ValidationError) and one.full_key:
            return _wrong_type(str(one.full_key), str(one))
        if match := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", str(one)):
            return _unknown_key(match[1], overrides)
    if NO_NAME in str(error):
        nameless = [text for text in overrides if re.fullmatch(r"[\w/]+=(null|\d[\d.]*)", text)]
        return f"{' '.join(nameless)} names nothing; need the name of a config, e.g. method=gptq bits=w4a16"
    lines = str(error).splitlines()
    return " ".join(lines[:1] if isinstance(error, OmegaConfBaseException) else lines).strip()


def check_keys(config: dict[str, Any]) -> None:
    """Raise UserError for a top-level key that was added (``+x=1``) and that nothing reads."""
    known = QexpConfig.__annotations__
    for key in config.keys() - known:
        raise UserError(f"{key} is no config key, nothing would read it; {nearest(key, known)}")


def _unknown_choice(file: str) -> str:
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    if group == "bits":
        like = [*get_close_matches(name, COMMON_BITS, n=1, cutoff=0.7), "w4a16"]
        return f"bits={name} is unknown; need {BITS_FORM}, e.g. bits={like[0]}, or single keys: bits.weight=5"
    with compose.hydra():
        below = [f"+{each}={name}" for each in compose.groups(group) if name in compose.options(each)]
        if below:
            return f"{group}={name} is unknown; did you mean {below[0]}?"
        return f"{group}={name} is unknown; {nearest(name, compose.options(group))}"


def _wrong_type(key: str, text: str) -> str:
    got = re.search(r"Value '(.*?)'", text)
    need = IN_WORDS.get(_type_of(key), "another type")
    return f"{key}={got[1] if got else 'null'}; need {need}; set {key}=<{need}>"


def _type_of(key: str) -> Any:
    """Return the type of a typed key, or None."""
    group, _, leaf = key.rpartition(".")
    return get_type_hints(BitsConfig if group == "bits" else QexpConfig).get(leaf)


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """Say which key was meant: the nearest at the same place, else the nearest anywhere."""
    with compose.hydra():
        groups = [*compose.groups(), *compose.groups("method")]
        if "/" in key:
            return f"{key} is no config group; {nearest(key, groups)}"
        config = _as_chosen(overrides)
    place, _, leaf = key.rpartition(".")
    while place and not isinstance(_at(config, place), dict):
        place, _, leaf = place.rpartition(".")
    here = [name for name in _at(config, place) if not name.startswith("_")]
    whole = f"{place}." if place else ""
    if not here:
        return f"{key} is no config key: {place} is empty; choose a member first, {place.replace('.', '/')}=[<member>]"
    keys = sorted({*(whole + name for name in here), *_leaves(config)})
    close = get_close_matches(leaf, here, n=1, cutoff=0.5)
    meant = [whole + close[0]] if close else get_close_matches(key, keys, n=1, cutoff=0.5)
    question = f"did you mean {meant[0]}? " if meant else ""
    return f"{key} is no config key; {question}{place or 'the top level'} has: {', '.join(sorted(here))}"


def _as_chosen(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config with the groups chosen in ``overrides``, or the default where they do not compose."""
    try:
        return compose.composed([text for text in overrides if GROUP_CHOICE.fullmatch(text)])
    except HYDRA_MISTAKES:
        return compose.composed([])


def _at(config: dict[str, Any], place: str) -> Any:
    node: Any = config
    for name in filter(None, place.split(".")):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield prefix + name


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
