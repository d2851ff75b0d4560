"""Where streams are kept between blocks: on the device, in host memory, or in a file that is mapped into memory.

Every place gives the same tensors back, bit for bit. Source: methods/block_reconstruction.md section 7.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PLACES = ("auto", "device", "host", "disk")
DEVICE_SHARE, HOST_SHARE = 0.2, 0.5  # of what is free: weights and gradients of a block need the rest


@dataclass(frozen=True)
class Shelf:
    """A place for streams: device, host or disk (nameless files in ``folder``, gone with the tensors)."""

    place: str
    folder: Path

    def keep(self, x: Tensor) -> Tensor:
        """Return ``x`` where it is kept."""
        if self.place == "device":
            return x
        if self.place == "host":
            return x.cpu().pin_memory() if x.is_cuda else x.cpu()
        with NamedTemporaryFile(dir=self.folder) as file:
            file.truncate(max(1, x.numel() * x.dtype.itemsize))
            mapped = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)  # outlives the name
        return mapped.view(x.shape).copy_(x)


def shelf_for(wanted: str, needed: int, device: torch.device, folder: Path) -> Shelf:
    """Return the place that is ``wanted``, or with "auto" the fastest that ``needed`` bytes leave room on."""
    if wanted != "auto":
        return Shelf(wanted, folder)
    if device.type == "cuda" and needed < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return Shelf("device", folder)
    if needed < HOST_SHARE * _available():
        return Shelf("host", folder)
    log.info("streams of %.1f GiB are kept on disk", needed / 2**30)
    return Shelf("disk", folder)


def _available() -> float:
    """Return the bytes of memory that can be had without swapping, infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
