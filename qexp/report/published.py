"""Published numbers of the same setting as a run: same method, model, bits, data set and window length.

A near match is worse than none (GPTQ at 4 bits on LLaMA-2-7B is printed as 5.83, 6.24 and 11.3 by three papers), so a
recipe with a swapped stage, a stress-tested model or an unnamed variant of C4 matches nothing.
Source: published.yaml, each row with its paper and table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import PurePath
from typing import Any

from qexp.report.record import Published
from qexp.report.rows import stages

DEFAULT_WINDOW = 2048  # of eval.window_tokens=null, for every model that has published rows


def match(config: Mapping[str, Any]) -> list[Published]:
    """Return the published numbers that a run of this resolved config may be held against, in file order.

    Each has ``value``, ``source``, ``metric`` (the record's metric key), ``fp_value`` (the same model unquantized, or
    None) and ``note``.
    """
    if (config.get("model", {}).get("outliers") or {}).get("kind", "none") != "none":
        return []
    sets = _sets(config)
    return [_describe(row, sets, config) for row in _table()["rows"] if _same_setting(row, config, sets)]


@cache
def _table() -> dict[str, Any]:
    import yaml

    text = resources.files("qexp.report").joinpath("published.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def _same_setting(row: Mapping[str, Any], config: Mapping[str, Any], sets: Mapping[str, str]) -> bool:
    return (
        row["set"] in sets
        and row["window"] == _window(config)
        and _same_model(row["model"], config)
        and (row["method"] == "fp16" or _same_bits(row["bits"], config.get("bits", {})))  # fp16 keeps its weights
        and _same_method(row["method"], config.get("method", {}))
    )


def _sets(config: Mapping[str, Any]) -> dict[str, str]:
    """Map each published name of an evaluated set to the record's name.

    ``c4`` counts only with its variant, and no set does whose windows each begin with BOS: the papers have one at most.
    """
    settings = config.get("eval", {})
    names: dict[str, str] = {}
    for name in settings.get("perplexity") or ():
        options = settings.get(name)
        options = options if isinstance(options, Mapping) else {}
        variant = options.get("variant")
        if options.get("bos") != "every_window":
            names[f"{name}_{variant}" if name == "c4" and variant else name] = name
    return names


def _window(config: Mapping[str, Any]) -> int:
    return int(config.get("eval", {}).get("window_tokens") or DEFAULT_WINDOW)


def _same_model(published: str, config: Mapping[str, Any]) -> bool:
    model = config.get("model", {})
    spellings = {_bare(name) for name in (published, *_table()["models"].get(published, ()))}
    return bool(spellings & {_bare(str(model.get("name", ""))), _bare(PurePath(str(model.get("path") or "")).name)})


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _same_bits(published: list[float], bits: Mapping[str, Any]) -> bool:
    """Compare nominal bits: 2.02 bits of AQLM and 4.05 of SqueezeLLM are the 2 and 4 of the config."""
    group = bits.get("group")
    ours = (bits.get("weight"), bits.get("act"), bits.get("kv"), -1 if group in (None, 0) else group)
    return ours == (round(published[0]), *published[1:])


def _same_method(published: str, method: Mapping[str, Any]) -> bool:
    wanted = dict(_table()["methods"][published])
    if method.get("name") != wanted.pop("recipe"):
        return False
    settings = {key: wanted.pop(key) for key in list(wanted) if "." in key}
    ours = stages(method)
    return all(sorted(ours.get(kind, ())) == sorted(members) for kind, members in wanted.items()) and all(
        _at(method, key) == value for key, value in settings.items()
    )


def _at(node: Any, path: str) -> Any:
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _describe(row: Mapping[str, Any], sets: Mapping[str, str], config: Mapping[str, Any]) -> Published:
    notes = [row["note"]] if "note" in row else []
    if limit := config.get("eval", {}).get("limit"):
        notes.append(f"measured on {limit} windows only (eval.limit)")
    return {
        "value": row["value"],
        "source": row["source"],
        "metric": f"perplexity/{sets[row['set']]}",
        "fp_value": _float_value(row),
        "note": "; ".join(notes),
    }


def _float_value(row: Mapping[str, Any]) -> float | None:
    keys = ("model", "set", "window")
    floats = [r["value"] for r in _table()["rows"] if r["method"] == "fp16" and all(r[k] == row[k] for k in keys)]
    return floats[0] if floats else None
