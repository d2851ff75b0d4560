"""Finished blocks on disk: written beside and renamed, so that a kill leaves a whole file or none.

One block is one safetensors file: packed codes and parameters per quantized layer, every other parameter of the block
as it is after the rewrites, and the online maps of its input paths. No pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qexp.core.absorb import InPlace
from qexp.core.compound_maps import map_from_state
from qexp.core.errors import UserError
from qexp.core.files import settle
from qexp.core.maps import LinearMap
from qexp.core.storage import pack_linear, unpack_linear
from qexp.core.words import BlockReport, LayerReport

if TYPE_CHECKING:
    from qexp.models.view import ModelView  # transformers: seconds that a mistake in the config need not wait for


@dataclass(frozen=True)
class Finished:
    """A block after quantization: named tensors, and JSON-able facts about them (bits, shapes, maps, report)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def report(self) -> BlockReport:
        """Return what the record says of the block."""
        about = self.facts["report"]
        layers = [LayerReport(**layer) for layer in about["layers"]]
        return BlockReport(**{**about, "layers": layers})


class Store:
    """The blocks/ folder of a run."""

    def __init__(self, folder: Path, warnings: list[str]) -> None:
        self.folder, self.warnings = folder, warnings
        folder.mkdir(parents=True, exist_ok=True)

    def once(self, key: str, make: Callable[[], Finished]) -> Finished:
        """Return the stored block ``key``, or make, store and return it."""
        path = self.folder / f"{key}.safetensors"
        if path.exists():
            finished = read(path)
            self.warnings += finished.facts["warnings"]
            return finished
        before = len(self.warnings)
        finished = make()
        finished.facts["warnings"] = self.warnings[before:]  # a resumed run must not lose them
        write(path, finished)
        return finished


def write(path: Path, finished: Finished) -> None:
    """Write a file beside its place and rename it: a kill leaves a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(finished.tensors, part, metadata={"facts": json.dumps(finished.facts)})
    settle(part, path)
    for left in path.parent.glob(f"{path.stem}.*.part"):
        left.unlink(missing_ok=True)  # of a process that was killed while it wrote


def read(path: Path) -> Finished:
    """Return what a file of the store holds. Raises: UserError if it is missing or corrupt."""
    if not path.is_file():
        raise UserError(f"{path} does not exist", "a file that a run has left in its blocks folder")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Finished(tensors, json.loads(file.metadata()["facts"]))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is corrupt ({error})", "a whole block file", "resume=false, or delete the file"
        ) from error


def pack_maps(maps: dict[str, LinearMap], facts: dict[str, Any]) -> Finished:
    """Return maps by name, and facts about them, as a :class:`Finished`."""
    tensors: dict[str, Tensor] = {}
    kept = {name: _map_facts(tensors, f"map.{name}", map) for name, map in maps.items()}
    return Finished(tensors, {**facts, "maps": kept})


def unpack_maps(finished: Finished) -> dict[str, LinearMap]:
    """Return the maps that :func:`pack_maps` packed."""
    maps = finished.facts.get("maps", {})
    return {name: _map_of(finished.tensors, f"map.{name}", about) for name, about in maps.items()}


@torch.no_grad()
def pack_block(view: ModelView, block: int, report: BlockReport) -> Finished:
    """Return the present state of a block as a :class:`Finished`."""
    quantized, paths, ranges, kept = {}, {}, {}, {}
    unmaps: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for group in view.groups(block):
        path = view.linear(group.layers[0].name).path
        paths[group.site] = [_map_facts(tensors, f"map.{group.site}.{i}", step) for i, step in enumerate(path.maps)]
        kept[group.site] = path.kept
        unmaps |= {
            layer.name: _map_facts(tensors, f"unmap.{layer.name}", unmap)
            for layer in group.layers
            if (unmap := view.linear(layer.name).unmap) is not None
        }
        ranges[group.site] = sorted(path.ranges)
        tensors |= {f"range.{group.site}.{name}": value.cpu().contiguous() for name, value in path.ranges.items()}
        for layer in group.layers:
            linear = view.linear(layer.name)
            if linear.codes is None or linear.grid is None:
                continue
            packed, quantized[layer.name] = pack_linear(linear)
            tensors |= {f"linear.{layer.name}.{part}": tensor for part, tensor in packed.items()}
    weights = {f"{view.prefix}.{block}.{n}": p for n, p in view.blocks[block].named_parameters()}
    plain = {n: p for n, p in weights.items() if n.removesuffix(".weight") not in quantized}
    tensors |= {f"plain.{name}": p.detach().cpu().clone() for name, p in plain.items()}
    facts = {"quantized": quantized, "paths": paths, "ranges": ranges, "kept": kept, "unmaps": unmaps}
    door = view.door(block)
    if door is not None and door.rotation is not None:
        facts["rotation"] = _map_facts(tensors, "rotation", door.rotation)
    facts["report"] = asdict(report)
    return Finished(tensors, facts)


def _map_facts(tensors: dict[str, Tensor], key: str, step: Any) -> dict[str, Any]:
    kind, parts, numbers = step.state()
    tensors |= {f"{key}.{name}": value.cpu().contiguous() for name, value in parts.items()}
    return {"kind": kind, "tensors": sorted(parts), "numbers": numbers}


def _map_of(tensors: dict[str, Tensor], key: str, about: dict[str, Any]) -> LinearMap:
    return map_from_state(about["kind"], {n: tensors[f"{key}.{n}"] for n in about["tensors"]}, about["numbers"])


@torch.no_grad()
def install(view: ModelView, block: int, finished: Finished, grids: dict[str, Any]) -> None:
    """Put a finished block into the model; doing it twice changes nothing."""
    tensors, facts = finished.tensors, finished.facts
    if "unmaps" not in facts:
        raise UserError("blocks written by an older version of qexp", "a run of this version", "resume=false")
    parameters = InPlace(view.model)
    for name, value in tensors.items():
        if name.startswith("plain."):
            parameters.put(name.removeprefix("plain."), value)
    for site, steps in facts["paths"].items():
        group = next(g for g in view.groups(block) if g.site == site)
        path = view.linear(group.layers[0].name).path
        path.maps = [_map_of(tensors, f"map.{site}.{i}", about) for i, about in enumerate(steps)]
        path.kept = facts["kept"][site]
        path.ranges = {n: tensors[f"range.{site}.{n}"].to(view.model.device) for n in facts["ranges"][site]}
    door = view.door(block)
    if door is not None and "rotation" in facts:
        door.rotation = _map_of(tensors, "rotation", facts["rotation"])
    for name, about in facts["unmaps"].items():
        view.linear(name).unmap = _map_of(tensors, f"unmap.{name}", about)
    for name, about in facts["quantized"].items():
        start = f"linear.{name}."
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        unpack_linear(view.linear(name), grids[name], own, about)
