"""What every picture shares: the look, the figure, and its way into a PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import contextmanager

from ..extras import need

#: Okabe and Ito's colours, told apart by colour-blind readers; on dark ground lightened to the same contrast.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DARK = ("#5AB4E8", "#F5833C", "#2FC79A", "#E39CC4", "#F0B840", "#9AD3F5", "#C8C8C8")
#: Beyond the colours, runs are told apart by marker and stroke.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STROKES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))
DPI = 160


@contextmanager
def styled(dark: bool):
    """The house's look on top of matplotlib's own defaults, whatever the user's settings are."""
    need("matplotlib", "train")
    from matplotlib import cycler, style

    ink, muted, grid, paper = ("#E8E8E8", "#A9AFB6", "#343B43", "#15191E") if dark else ("#1C1C1C", "#5A5F66", "#E3E5E8", "#FFFFFF")
    settings = {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False,
        "figure.facecolor": paper, "axes.facecolor": paper, "text.color": ink, "axes.titlecolor": ink,
        "axes.labelcolor": ink, "xtick.color": muted, "ytick.color": muted, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
        "axes.edgecolor": muted, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": grid, "grid.linewidth": 0.7, "lines.linewidth": 1.8, "lines.markersize": 5,
        "axes.prop_cycle": cycler(color=DARK if dark else LIGHT), "legend.labelcolor": ink,
    }  # fmt: skip
    with style.context(["default", settings]):
        yield ink, muted, paper


def figure_of(width: float, height: float, layout: str | None = "constrained"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout, dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer, metadata={"Software": None})  # savefig would draw everything twice
    return buffer.getvalue()


def systems_of(panels: int, columns: int, width: float, height: float):
    """A figure of `panels` coordinate systems, row by row; the rest of the last row stays empty."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = figure_of(width * columns, height * rows)
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[i // columns, i % columns]) for i in range(panels)], columns


def axes_at(figure, left: float, top: float, width: float, height: float):
    """Axes at a place of a figure without a layout engine: inches from its left and upper edge. A picture of fixed parts is drawn in half the time."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def inches(text: Sequence[str], size: float) -> float:
    """About how wide the longest of some texts is, in inches, at a size in points."""
    return max(map(len, text), default=0) * size * 0.6 / 72


def look_of(index: int, colours: Sequence[str]) -> dict:
    """Colour, marker and stroke of run number `index`, the same in every picture."""
    turn = index // len(colours)
    return {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)], "linestyle": STROKES[turn % len(STROKES)]}


def percent(axes, low: float | None = None, high: float | None = None) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g} %")
    if low is not None:
        axes.set_ylim(low, high)


def columns_of(labels: Sequence[str], figure, size: float = 8.5) -> int:
    """How many columns a legend of these labels can have within the figure's width."""
    longest = inches(labels, 1.03 * size) + 0.55  # the handle and the gap
    return max(1, min(len(labels), int(figure.get_figwidth() / longest)))
