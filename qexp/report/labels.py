"""Names beside points that touch neither each other nor a point: the first free of a ring of places around each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

_RINGS = (11, 20, 32, 46, 62)  # points from the marker's centre
_DIRECTIONS = 16
_LEADER_FROM = 18  # points; a name further off gets a line to its marker


Name = tuple[float, float, str, str]  # x, y, text, and the gid that a page may find it by


def place(ax: Axes, names: Sequence[Name], colour: str) -> None:
    """Write each text beside its point, upper points first; one without room is left out.

    The figure's layout and limits must be final: room is measured in pixels.
    """
    if not names:
        return
    pixels = ax.transData.transform([(x, y) for x, y, *_ in names])
    taken = [*_drawn(ax), *(text.get_window_extent() for text in ax.texts)]
    for i in sorted(range(len(names)), key=lambda i: -pixels[i][1]):
        spot = _write(ax, names[i], colour, taken)
        if spot is not None:
            taken.append(spot)


def _drawn(ax: Axes) -> Iterator[Bbox]:
    """Yield boxes over all markers of the axes and along all lines."""
    import numpy as np

    for line in ax.lines:
        pixels = ax.transData.transform(np.asarray(line.get_xydata()))
        yield from (_box(x, y, 5) for x, y in pixels)
        for start, end in itertools.pairwise(pixels):
            steps = np.linspace(0, 1, 2 + int(np.abs(end - start).max() / 4))[:, None]
            yield from (_box(x, y, 1) for x, y in start + steps * (end - start))


def _write(ax: Axes, name: Name, colour: str, taken: Sequence[Bbox]) -> Bbox | None:
    x, y, text, gid = name
    note = ax.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8.5, color=colour, gid=gid)
    frame = ax.get_window_extent()
    for dx, dy in _offsets():
        note.set(position=(dx, dy), ha=_align(dx), va="center")
        spot = note.get_window_extent().padded(1.5)
        inside = frame.x0 < spot.x0 and spot.x1 < frame.x1 and frame.y0 < spot.y0 and spot.y1 < frame.y1
        if inside and not any(spot.overlaps(other) for other in taken):
            _lead(ax, name, (dx, dy), colour)
            return spot
    note.remove()
    return None


def _offsets() -> Iterator[tuple[float, float]]:
    """Yield offsets in points, near ones first, and right before left at equal distance."""
    turns = sorted(
        (2 * math.pi * k / _DIRECTIONS for k in range(_DIRECTIONS)),
        key=lambda a: (-round(math.cos(a), 6), -math.sin(a)),
    )
    for radius in _RINGS:
        for angle in turns:
            yield radius * math.cos(angle), radius * math.sin(angle)


def _align(dx: float) -> str:
    return "center" if abs(dx) < 3 else "left" if dx > 0 else "right"


def _lead(ax: Axes, name: Name, offset: tuple[float, float], colour: str) -> None:
    if math.hypot(*offset) < _LEADER_FROM:
        return
    arrow: dict[str, Any] = {
        "arrowstyle": "-",
        "color": colour,
        "linewidth": 0.6,
        "alpha": 0.7,
        "shrinkB": 4,
        "shrinkA": 1,
        "gid": name[3],
    }
    ax.annotate("", name[:2], xytext=offset, textcoords="offset points", arrowprops=arrow)


def _box(x: float, y: float, half: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - half, y - half, x + half, y + half)
