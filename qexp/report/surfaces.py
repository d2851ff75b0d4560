"""|activation| over tokens and channels, before and after the transforms, on one z scale.

Outliers of large models stand as walls along few channels before, and are gone where a transform did its work.
Source: the surfaces of QuaRot (arXiv:2404.00456, Fig. 1) and DuQuant (arXiv:2406.01721, Fig. 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qexp.report.record import ActivationRecord
from qexp.report.rows import Row, stages
from qexp.report.style import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

_CELLS = 96  # per side; a finer grid is reduced by maxima, which keeps a lone outlier channel visible
_GRID_LINES: Any = {
    "grid.color": (0.5, 0.5, 0.5, 0.3),
    "grid.linewidth": 0.5,
}  # 3-D axes read them once, when they are made


def figures(lines: Sequence[Row]) -> dict[str, Callable[[], Figure]]:
    """Return what draws each model, composition of transforms and recorded layer, ``activations/<model>/<row>/..``."""
    return {
        f"activations/{row.model}/{row.label}/{entry['layer']}": partial(surface, entry)
        for row, entry in distinct(lines)
    }


def surface(entry: ActivationRecord) -> Figure:
    """Draw one layer's grids [tokens][channels] side by side on equal axes, kurtosis (3 for a Gaussian) above each."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    sides = {"before": (entry["before"], entry["kurtosis_before"]), "after": (entry["after"], entry["kurtosis_after"])}
    grids = {when: np.abs(np.nan_to_num(np.asarray(x, dtype=np.float64), posinf=0.0)) for when, (x, _) in sides.items()}
    top = max(float(grid.max()) for grid in grids.values()) or 1.0
    figure = Figure(figsize=(9.6, 3.9), facecolor="none")
    for i, (when, grid) in enumerate(grids.items()):
        with matplotlib.rc_context(_GRID_LINES):
            ax = figure.add_axes((0.005 + 0.49 * i, 0.075, 0.455, 0.86), projection="3d")
        _draw(ax, grid, top)
        kurtosis = sides[when][1]
        note = f"{when}   max {grid.max():.3g}" + (f"   kurtosis {kurtosis:.3g}" if kurtosis is not None else "")
        figure.text(0.03 + 0.49 * i, 0.94, note, fontsize=10, color=INK)
    return figure


def distinct(lines: Sequence[Row]) -> Iterator[tuple[Row, ActivationRecord]]:
    """Yield each recorded layer with the first row that shows it: of rows that transform alike one is enough.

    A row without transforms is the float model twice: it stands for a model only where no row of it transforms.
    """
    transformed = {row.model for row in lines if transforms(row)}
    seen: set[tuple[str, ...]] = set()
    for row in lines:
        for entry in row.runs[0].get("diagnostics", {}).get("activations", []):
            key = (row.model, transforms(row), entry["layer"], *_transform_settings(row))
            if entry["before"] and entry["after"] and key not in seen and (key[1] or row.model not in transformed):
                seen.add(key)
                yield row, entry


def transforms(row: Row) -> str:
    """Return the row's transforms as text, empty where there are none."""
    return " + ".join(stages(row.runs[0]["config"].get("method") or {})["transform"])


def _transform_settings(row: Row) -> list[str]:
    return [f"{key}={value}" for key, value in row.settings.items() if key.startswith("method.transform.")]


def _reduce(grid: NDArray[Any]) -> NDArray[Any]:
    """Shrink [tokens, channels] to at most ``_CELLS`` a side by maxima of neighbouring cells."""
    import numpy as np

    for axis in (0, 1):
        if grid.shape[axis] > _CELLS:
            starts = np.linspace(0, grid.shape[axis], _CELLS, endpoint=False).astype(int)
            grid = np.maximum.reduceat(grid, starts, axis=axis)
    return grid


def _draw(ax: Any, grid: NDArray[Any], top: float) -> None:
    import numpy as np

    tokens, channels = grid.shape
    cells = _reduce(grid)
    x, y = np.meshgrid(np.linspace(0, channels - 1, cells.shape[1]), np.linspace(0, tokens - 1, cells.shape[0]))
    ax.plot_surface(
        x, y, cells, cmap="coolwarm", vmin=0, vmax=top, rcount=_CELLS, ccount=_CELLS, linewidth=0, antialiased=False,
        rasterized=True,
    )  # fmt: skip
    ax.set_zlim(0, top)
    ax.view_init(elev=26, azim=-58)
    ax.set_box_aspect((1.25, 1.0, 0.72), zoom=1.14)
    ax.set_facecolor("none")
    ax.set_xlabel("channel", color=INK, fontsize=9)
    ax.set_ylabel("token", color=INK, fontsize=9)
    ax.set_zlabel("|x|", color=INK, fontsize=9)
    ax.tick_params(colors=INK, labelsize=8)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_pane_color((0.5, 0.5, 0.5, 0.06))
        axis.line.set_color(INK)
