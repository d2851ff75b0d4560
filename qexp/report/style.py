"""The one look of all figures.

They are drawn on a transparent ground in one ink and colours of middle lightness, so that one drawing reads on white
and on black; the HTML report replaces the ink by the text colour of the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#60636b"  # contrast above 4.5 on white; the page's own text colour takes its place in the HTML
# After Okabe and Ito, told apart with every common colour blindness; without yellow and black, blue made lighter.
PALETTE = ("#2a86c8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")
MARKERS = "osD^vPX<>*"


def literal(text: str) -> str:
    """Keep matplotlib from reading dollar signs of a name as mathematics."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure in inches, without pyplot's global list of figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def plain_axes(ax: Axes) -> None:
    """Give axes the one look of the report: thin ink, open frame, quiet grid."""
    ax.set_facecolor("none")
    ax.tick_params(colors=INK, labelsize=9, which="both")
    for side, spine in ax.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
