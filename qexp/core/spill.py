"""Tensors put away on disk, last in first out: what grows with the number of blocks must not grow in memory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor


class Spill:
    """A stack of tensors in a nameless file of ``folder``, gone with the process. No gradients are kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115  closed with the stack
        self._about: list[tuple[torch.Size, torch.dtype, torch.device]] = []

    def __len__(self) -> int:
        """Return how many tensors are put away."""
        return len(self._about)

    def push(self, x: Tensor) -> None:
        """Put ``x`` away; its values now are what :meth:`pop` returns."""
        self._about.append((x.shape, x.dtype, x.device))
        self._file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def pop(self) -> Tensor:
        """Return what was put away last, where it was, bit for bit. Raises: IndexError if nothing is left."""
        shape, dtype, device = self._about.pop()
        start = self._file.seek(-shape.numel() * dtype.itemsize, 2)
        raw = bytearray(self._file.read())
        self._file.seek(start)
        self._file.truncate()
        if not raw:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.frombuffer(raw, dtype=dtype).reshape(shape).to(device)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()
