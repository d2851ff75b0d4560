"""What the float model does with the calibration tokens, shared by the runs of a sweep.

The float stream from block to block and the statistics over it do not depend on bits, grid or solver, so the first run
of a sweep that computes them keeps them and the others read them. Files are named by what determines their content:
weights and buffers at that moment, tokens, dtype, device; a recipe that rewrites a block first gets files of its own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qexp.core.cache import kept, limit
from qexp.core.words import Group, Stats
from qexp.engine.streams import MICRO_TOKENS, Keep, Kwargs, Stream, advance
from qexp.kernels.ops import kernel_info
from qexp.models.view import ModelView

log = logging.getLogger(__name__)

VERSION = 1
SHARE = 0.25  # of the folder's limit that the stream and the statistics of one calibration may take


class KnownStream(list[Tensor]):
    """A float stream whose content has a name; ``folder`` is where it and the statistics over it are kept."""

    def __init__(self, parts: Iterable[Tensor], name: str, folder: Path) -> None:
        super().__init__(parts)
        self.name, self.folder = name, folder


def named(view: ModelView, tokens: Tensor, stream: Stream, folder: Path | None, rewritten: str) -> Stream:
    """Return the inputs of block 0 with a name, if there is a ``folder`` to share in and room for all blocks.

    ``rewritten`` tells how the model was rewritten, beyond what its weights tell (rotations of keys, say).
    """
    if folder is None:
        return stream
    size = sum(x.numel() * x.element_size() for x in stream) * len(view.blocks)
    size += sum(4 * g.layers[0].inputs ** 2 for block in range(len(view.blocks)) for g in view.groups(block))
    if size > SHARE * limit():
        log.info("the float model's stream and statistics are not shared: QEXP_CACHE_GB=%.0f would", size / SHARE / 1e9)
        return stream
    device = view.model.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.get_num_threads()}"
    place = f"{place} {kernel_info()['isa']} torch {torch.__version__}"
    about = f"{VERSION} {MICRO_TOKENS} {place} {view.model.dtype} {type(view.model).__name__} {rewritten}"
    tensors = [*view.model.state_dict().values(), tokens]
    return KnownStream(stream, _hash(about, view.model.config.to_json_string(), *tensors), folder)


def float_answers(view: ModelView, block: int, stream: Stream, kwargs: Kwargs, keep: Keep) -> Stream:
    """Return what the float block answers to the float stream, from the shared folder where it is known there."""
    if not isinstance(stream, KnownStream):
        return advance(view, block, stream, kwargs, keep)
    path = stream.folder / f"{stream.name}-{block + 1:05d}.safetensors"
    made: Stream = []

    def make() -> dict[str, Tensor]:
        made.extend(advance(view, block, stream, kwargs, keep))
        return {f"{i:06d}": x.detach().cpu().contiguous() for i, x in enumerate(made)}

    with safe_open(kept(path, make), framework="pt") as file:
        parts = made or [keep(file.get_tensor(name).to(view.model.device)) for name in sorted(file.keys())]
    return KnownStream(parts, stream.name, stream.folder)


def shared_stats(
    view: ModelView,
    block: int,
    groups: Sequence[Group],
    stream: Stream,
    about: str,
    make: Callable[[], dict[str, Stats]],
) -> dict[str, Stats]:
    """Return statistics over a stream, from the shared folder where they are known there; ``about``: how it is seen."""
    if not isinstance(stream, KnownStream):
        return make()
    maps = [t for g in groups for m in view.linear(g.layers[0].name).path.maps for t in m.state()[1].values()]
    kinds = [m.state()[::2] for g in groups for m in view.linear(g.layers[0].name).path.maps]
    sites = [group.site for group in groups]
    name = _hash(f"{stream.name} {block} {sites} {about} {kinds}", *view.blocks[block].state_dict().values(), *maps)
    path = stream.folder / f"stats-{name}.safetensors"
    made: dict[str, Stats] = {}

    def tensors() -> dict[str, Tensor]:
        made.update(make())
        named = {f"{site}/{f.name}": getattr(stats, f.name) for site, stats in made.items() for f in fields(Stats)}
        return {key: torch.as_tensor(value).cpu().contiguous() for key, value in named.items()}

    with safe_open(kept(path, tensors), framework="pt") as file:
        return made or {site: _stats(file, site, view.model.device) for site in sites}


def _stats(file: safe_open, site: str, device: torch.device) -> Stats:
    values = {f.name: file.get_tensor(f"{site}/{f.name}").to(device) for f in fields(Stats)}
    return Stats(**{**values, "tokens": int(values["tokens"])})


def _hash(*parts: str | Tensor) -> str:
    """Return 24 hex digits for texts and the bytes of tensors."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            state.update(part.encode())
        else:
            state.update(f"{tuple(part.shape)}{part.dtype}".encode())
            state.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:24]
