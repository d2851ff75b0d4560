"""From a resolved config to objects: ``{_target_: dotted.Class, key: value}`` becomes ``Class(key=value)``.

Hydra's ``instantiate`` does the same but reports mistakes as tracebacks. Here every key and type is checked against the
dataclass first, and a mistake is one line that names the config key and the nearest valid one.
"""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qexp.core.errors import UserError, nearest

TARGET = "_target_"
MEMBERS = ConfigDict(arbitrary_types_allowed=True)  # the Protocols of the stages


def build(node: Any, path: str = "") -> Any:
    """Return ``node`` with every mapping that has a ``_target_`` replaced by an instance, innermost first.

    Raises: UserError for an unknown class, an unknown or missing key, or a value of the wrong type.
    """
    if isinstance(node, list):
        return [build(item, f"{path}[{i}]") for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    values = {key: build(value, f"{path}.{key}" if path else str(key)) for key, value in node.items() if key != TARGET}
    return _construct(_locate(node[TARGET], path), values, path) if TARGET in node else values


def _locate(target: str, path: str) -> type:
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path}._target_={target} cannot be imported ({error})", "an importable dataclass") from error
    if not (isinstance(found, type) and is_dataclass(found)):
        raise UserError(f"{path}._target_={target} is no dataclass", "a frozen keyword-only dataclass")
    return found


def _construct(cls: type, values: dict[str, Any], path: str) -> Any:
    known = {field.name for field in fields(cls)}
    for key in values.keys() - known:
        raise UserError(f"{path}.{key} is no setting of {cls.__name__}; {nearest(key, known)}")
    if missing := known - values.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}", f"every setting of {cls.__name__}")
    hints = get_type_hints(cls)
    return cls(**{key: _typed(value, hints[key], f"{path}.{key}") for key, value in values.items()})


def _typed(value: Any, hint: Any, path: str) -> Any:
    """Return ``value`` as ``hint`` (lax: "4" is an int); a member must have what its stage's Protocol names."""
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, hint):
        return value  # built from its own mapping
    try:
        return TypeAdapter(hint, config=MEMBERS).validate_python(value)
    except ValidationError as error:
        if any(problem["type"] == "sequence_str" for problem in error.errors()):
            raise UserError(f"{path}={value}", "a list", f"{path}=[{value}]") from error
        need = "; ".join(sorted({problem["msg"].removeprefix("Input should be ") for problem in error.errors()}))
        raise UserError(f"{path}={value!r}", need, f"{path}=<such a value>") from error
