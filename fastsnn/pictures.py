"""The pictures of `fastsnn report`: each function draws one picture, in light or in dark colours, and returns its PNG.

The same data give the same bytes: the user's matplotlib settings, the display and the clock play no part.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .extras import need

__all__ = ["Curve", "Layer", "Panel", "against_eps", "curves", "layers_over_training", "membranes", "window"]

#: Okabe and Ito's colours, told apart by colour-blind readers; on dark ground lightened to the same contrast.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DARK = ("#5AB4E8", "#F5833C", "#2FC79A", "#E39CC4", "#F0B840", "#9AD3F5", "#C8C8C8")
#: Beyond the colours, runs are told apart by marker and stroke.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STROKES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1, 1.5)))
DPI = 160
#: What a picture of membranes shows, in the order of its legend.
LEGEND = ("membranes", "Gaussian fit", "Gaussians by channel and step", "surrogate (scaled)", "surrogate's window")


@dataclass(frozen=True)
class Curve:
    """One line: x and y of equal length; low and high, where given, are the ends of its interval at each point."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One coordinate system: a title, the label of y with its unit, lines, and whether y is drawn on a logarithmic scale."""

    title: str
    y: str
    curves: Sequence[Curve]
    share: bool = False  # values are shares, drawn in per cent
    log: bool = False


@dataclass(frozen=True)
class Layer:
    """What is known of one spiking layer's membranes; z = h - threshold, in units of potential.

    edges [B + 1] and density [B]: the histogram, in 1/potential, of all membranes (those outside the edges count too).
    mixture [B]: at the middles of the bins, the mean over steps and channels of each one's Gaussian; the share of it within
    gamma is omega. mean, deviation: of z over steps, batch, channels and space. inside: the share of
    membranes with |z| < gamma. rate: spikes per step. half_width of the surrogate's window, inf where it has no end, and
    the surrogate as a function of z.
    """

    name: str
    edges: np.ndarray
    density: np.ndarray
    mixture: np.ndarray
    mean: float
    deviation: float
    omega: float
    inside: float
    rate: float
    gamma: float
    half_width: float
    surrogate: Callable[[np.ndarray], np.ndarray] = field(repr=False)


def window(derivative: Callable[[float], float]) -> float:
    """The half-width of a surrogate's window: where its derivative ends, or, for one that never ends, half its height.

    derivative: ds/dz at z. Returns inf for one that does not fall, such as straight-through.

    >>> window(lambda z: max(0.0, 2.0 - abs(z)))  # a triangle
    2.0
    """
    peak = derivative(0.0)
    far = 1e-6
    while derivative(far) > peak / 2:
        far *= 2
        if far > 1e9:
            return math.inf

    def bisect(inside: Callable[[float], bool], high: float) -> float:
        low = 0.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if inside(middle) else (low, middle)
        return round((low + high) / 2, 9)

    half = bisect(lambda z: derivative(z) > peak / 2, far)
    end = 8 * half  # further out than the end of each bounded surrogate, where bells and tails are not 0 yet
    return half if derivative(end) > 0 else bisect(lambda z: derivative(z) > 0, end)


@contextmanager
def _style(dark: bool):
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


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.canvas.print_png(buffer, metadata={"Software": None})  # savefig would draw everything twice
    return buffer.getvalue()


def _grid(panels: int, columns: int, width: float, height: float):
    """A figure of `panels` coordinate systems, row by row; the rest of the last row stays empty."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = _figure(width * columns, height * rows)
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[i // columns, i % columns]) for i in range(panels)], columns


def _look(index: int, colours: Sequence[str]) -> dict:
    """Colour, marker and stroke of run number `index`, the same in every picture."""
    turn = index // len(colours)
    return {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)], "linestyle": STROKES[turn % len(STROKES)]}


def _percent(axes, low: float | None = None, high: float | None = None) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g} %")
    if low is not None:
        axes.set_ylim(low, high)


def _range(panels: Sequence[Panel]) -> tuple[float, float]:
    """The ends of x over all panels with a margin; half a unit on each side of a single point."""
    values = [value for panel in panels for curve in panel.curves for value in curve.x] or [0]
    left, right = min(values), max(values)
    margin = 0.03 * (right - left) or 0.5
    return left - margin, right + margin


def _calm(axes) -> None:
    """At least a tenth of the largest value from bottom to top, so that noise in the last digits stays small."""
    low, high = axes.get_ylim()
    wanted = 0.1 * max(abs(low), abs(high))
    if axes.get_yscale() == "linear" and high - low < wanted:
        axes.set_ylim((low + high - wanted) / 2, (low + high + wanted) / 2)


def _whole_ticks(axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def against_eps(panels: dict[str, Sequence[Curve | None]], labels: Sequence[str], chance: float | None = None, dark: bool = False) -> bytes:
    """Accuracy (y, a share) against the size eps of the perturbation (x, pixels in [0, 1]), one panel for each attack.

    panels: attack -> one curve for each of `labels` (None where a run has none); a point at eps 0 is the clean accuracy.
    chance: the accuracy of guessing, drawn as a line.
    """
    with _style(dark) as (_, muted, _paper):
        colours = DARK if dark else LIGHT
        width = 5.6 if len(panels) == 1 else 3.9 if len(panels) in (2, 4) else 3.1
        figure, systems, columns = _grid(len(panels), 2 if len(panels) == 4 else 3, width, 3.5)
        top = max((value for lines in panels.values() for curve in lines if curve for value in (*curve.y, *(() if curve.high is None else curve.high))), default=1.0)
        ticks = _eps_ticks({round(255 * eps, 6) for lines in panels.values() for curve in lines if curve for eps in curve.x})
        for place, (axes, (attack, lines)) in enumerate(zip(systems, panels.items())):
            for index, curve in enumerate(lines):
                if curve is None:
                    continue
                x = [255 * eps for eps in curve.x]
                axes.plot(x, curve.y, **_look(index, colours), label=labels[index], clip_on=False, zorder=3)
                if curve.low is not None:
                    axes.fill_between(x, curve.low, curve.high, color=colours[index % len(colours)], alpha=0.16, linewidth=0)
            if chance:
                axes.axhline(chance, color=muted, linewidth=1, linestyle=(0, (2, 3)))
                axes.annotate("chance", (0.02, chance), xycoords=("axes fraction", "data"), ha="left", va="bottom", color=muted, fontsize=8)
            axes.set_title(attack)
            axes.set_xlim(0, 1.03 * max(ticks))
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            _percent(axes, 0, min(1.0, math.ceil(top * 10 + 0.2) / 10))
            if place % columns:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel("accuracy")
        figure.supxlabel("ε (in 1/255 of the range of a pixel)", fontsize=9)
        handles = {label: handle for axes in systems for handle, label in zip(*axes.get_legend_handles_labels())}
        order = [label for label in labels if label in handles]
        figure.legend([handles[label] for label in order], order, loc="outside upper left", ncols=_columns_of(order, figure))
        return _png(figure)


def _eps_ticks(sizes: set[float]) -> list[float]:
    """The sizes that were attacked, without those whose labels would touch."""
    ticks: list[float] = []
    for size in sorted(sizes, reverse=True):
        if not ticks or ticks[-1] - size >= max(sizes) / 16:
            ticks.append(size)
    return ticks[::-1]


def _columns_of(labels: Sequence[str], figure, size: float = 8.5) -> int:
    """How many columns a legend of these labels can have within the figure's width."""
    longest = max(map(len, labels), default=1) * size * 0.62 / 72 + 0.55  # the handle and the gap, in inches
    return max(1, min(len(labels), int(figure.get_figwidth() / longest)))


def curves(panels: Sequence[Panel], x: str = "epoch", dark: bool = False) -> bytes:
    """Quantities over training (x in epochs): small panels that share the axis of x; a label names each line."""
    with _style(dark):
        colours = DARK if dark else LIGHT
        figure, systems, _ = _grid(len(panels), 3 if len(panels) > 4 else 2, 2.9 if len(panels) > 4 else 3.7, 2.35)
        left, right = _range(panels)
        for axes, panel in zip(systems, panels):
            for index, curve in enumerate(panel.curves):
                few = {"marker": MARKERS[index % len(MARKERS)], "markersize": 4} if len(curve.x) <= 12 else {}
                axes.plot(curve.x, curve.y, color=colours[index % len(colours)], label=curve.label, **few)
            axes.set_title(panel.title)
            axes.set_ylabel(panel.y)
            if panel.log:
                axes.set_yscale("log")
            if panel.share:
                _percent(axes)
            axes.set_xlim(left, right)
            _calm(axes)
            _whole_ticks(axes)
            if len(panel.curves) > 1:
                axes.legend(loc="best", handlelength=1.6)
        figure.supxlabel(x, fontsize=9)
        return _png(figure)


def layers_over_training(panels: Sequence[Panel], x: str = "epoch", average: bool = True, dark: bool = False) -> bytes:
    """One line per spiking layer in each panel, shaded from the first layer to the last; a dashed line is their mean."""
    with _style(dark) as (ink, *_):
        from matplotlib import colormaps

        names = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
        # Viridis reads the same to colour-blind eyes; its end that would vanish on this ground is left out.
        low, high = (0.3, 1.0) if dark else (0.0, 0.85)
        shade = {name: colormaps["viridis"](low + (high - low) * i / max(1, len(names) - 1)) for i, name in enumerate(names)}
        left, right = _range(panels)
        figure, systems, _ = _grid(len(panels), 3, 2.75, 2.75)
        for axes, panel in zip(systems, panels):
            for curve in panel.curves:
                few = {"marker": "o", "markersize": 3} if len(curve.x) <= 12 else {}
                axes.plot(curve.x, curve.y, color=shade[curve.label], label=curve.label, linewidth=1.5, **few)
            if average and len(panel.curves) > 1 and len({tuple(curve.x) for curve in panel.curves}) == 1:
                mean = np.mean([curve.y for curve in panel.curves], axis=0)
                axes.plot(panel.curves[0].x, mean, color=ink, linestyle=(0, (4, 2)), linewidth=2, label="mean of layers")
            axes.set_title(panel.title)
            axes.set_ylabel(panel.y)
            axes.set_xlim(left, right)
            _calm(axes)
            _whole_ticks(axes)
        figure.supxlabel(x, fontsize=9)
        handles, labels = systems[0].get_legend_handles_labels()
        beside = _columns_of(labels, figure)
        figure.set_figheight(2.55 + 0.18 * math.ceil(len(labels) / beside))
        figure.legend(handles, labels, loc="outside upper left", ncols=beside, handlelength=1.6)
        return _png(figure)


def membranes(layers: Sequence[Layer], dark: bool = False) -> bytes:
    """A histogram of z = h - threshold for each layer, its Gaussian fit, and the surrogate with its window shaded."""
    with _style(dark) as (ink, muted, _):
        colours = DARK if dark else LIGHT
        figure, systems, _ = _grid(len(layers), 3, 2.75 if len(layers) > 2 else 3.6, 2.25)
        for axes, layer in zip(systems, layers):
            _membrane(axes, layer, ink, colours)
        figure.supxlabel("z = h − θ (potential)", fontsize=9)
        figure.supylabel("density (1/potential)", fontsize=9)
        known = dict(zip(*reversed(systems[0].get_legend_handles_labels())))
        labels = [label for label in LEGEND if label in known]
        figure.legend([known[label] for label in labels], labels, loc="outside upper left", ncols=_columns_of(labels, figure), handlelength=1.6)
        return _png(figure)


def _membrane(axes, layer: Layer, ink: str, colours: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    left, right = float(layer.edges[0]), float(layer.edges[-1])
    bell = np.exp(-0.5 * ((_line(left, right) - layer.mean) / layer.deviation) ** 2) / (layer.deviation * math.sqrt(2 * math.pi))
    # One value that many membranes share (no input: z = -threshold) would flatten the rest: it is cut off, and labelled.
    heights = np.sort(layer.density)[::-1]
    widths = np.diff(layer.edges)
    usual = max(float(heights[min(3, len(heights) - 1)]), float(bell.max()))
    top = 1.15 * (usual if heights[0] > 2.5 * usual else max(float(heights[0]), float(bell.max())))
    shown_half = min(layer.half_width, 2 * (right - left))
    axes.axvspan(max(-shown_half, left), min(shown_half, right), color=colours[4], alpha=0.16, linewidth=0, label=LEGEND[4], zorder=0)
    axes.stairs(layer.density, layer.edges, fill=True, color=colours[0], alpha=0.5, label=LEGEND[0], zorder=1)
    z = _line(left, right)
    height = layer.surrogate(z)
    peak = float(layer.surrogate(np.zeros(1))[0]) or 1.0
    axes.plot(z, height / peak * top * 0.86, color=colours[1], linewidth=1.3, linestyle=(0, (4, 1.5)), label=LEGEND[3], zorder=2)
    axes.plot(z, bell, color=ink, linewidth=1.4, label=LEGEND[1], zorder=3)
    middles = (layer.edges[:-1] + layer.edges[1:]) / 2
    axes.plot(middles, layer.mixture, color=colours[2], linewidth=1.4, label=LEGEND[2], zorder=3)
    axes.axvline(0, color=ink, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
    for i in np.flatnonzero(layer.density > top)[:2]:
        middle = (layer.edges[i] + layer.edges[i + 1]) / 2
        side = "left" if middle < (left + right) / 2 else "right"
        axes.annotate(f" ▲ {layer.density[i] * widths[i]:.0%} ", (middle, top), ha=side, va="top", fontsize=7.5, color=ink)
    axes.set_xlim(left, right)
    axes.set_ylim(0, top)
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.set_title(f"{layer.name}   Ω = {layer.omega:.3f}", fontsize=9)
    numbers = f"μ {layer.mean:.2f}\nσ {layer.deviation:.2f}".replace("-", "−")
    # In the corner that the bell leaves free.
    corner = 0.98 if layer.mean < (left + right) / 2 else 0.02
    axes.text(corner, 0.97, numbers, transform=axes.transAxes, ha="right" if corner > 0.5 else "left", va="top", fontsize=7.5, color=ink)


def _line(left: float, right: float) -> np.ndarray:
    return np.linspace(left, right, 801)
