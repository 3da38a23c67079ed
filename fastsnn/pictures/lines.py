"""Pictures made of lines: accuracy against the size of the perturbation, and quantities over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import DARK, LIGHT, MARKERS, columns_of, look_of, percent, png, styled, systems_of


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
    sizes = {round(255 * x, 6) for lines in panels.values() for curve in lines if curve for x in curve.x}
    return _accuracy(panels, labels, chance, dark, 255, _apart(sizes, max(sizes) / 16), "ε (in 1/255 of the range of a pixel)")


def against_steps(panels: dict[str, Sequence[Curve | None]], labels: Sequence[str], chance: float | None = None, dark: bool = False) -> bytes:
    """Accuracy (y, a share) against the number of an attack's steps (x, on a logarithmic scale); panels, labels, chance as in `against_eps`."""
    steps = {math.log2(x) for lines in panels.values() for curve in lines if curve for x in curve.x}
    ticks = [round(2**value, 6) for value in _apart(steps, (max(steps) - min(steps)) / 16)]
    return _accuracy(panels, labels, chance, dark, 1, ticks, "steps", log=True)


def _accuracy(panels, labels, chance: float | None, dark: bool, scale: float, ticks: Sequence[float], x: str, log: bool = False) -> bytes:
    with styled(dark) as (_, muted, _paper):
        colours = DARK if dark else LIGHT
        width = 5.6 if len(panels) == 1 else 3.9 if len(panels) in (2, 4) else 3.1
        figure, systems, columns = systems_of(len(panels), 2 if len(panels) == 4 else 3, width, 3.5)
        top = max((value for lines in panels.values() for curve in lines if curve for value in (*curve.y, *(() if curve.high is None else curve.high))), default=1.0)
        for place, (axes, (attack, lines)) in enumerate(zip(systems, panels.items())):
            for index, curve in enumerate(lines):
                if curve is None:
                    continue
                points = [scale * value for value in curve.x]
                axes.plot(points, curve.y, **look_of(index, colours), label=labels[index], clip_on=False, zorder=3)
                if curve.low is not None:
                    axes.fill_between(points, curve.low, curve.high, color=colours[index % len(colours)], alpha=0.16, linewidth=0)
            if chance:
                axes.axhline(chance, color=muted, linewidth=1, linestyle=(0, (2, 3)))
                axes.annotate("chance", (0.02, chance), xycoords=("axes fraction", "data"), ha="left", va="bottom", color=muted, fontsize=8)
            axes.set_title(attack)
            if log:
                axes.set_xscale("log")
                axes.minorticks_off()
                axes.set_xlim(min(ticks) / 1.15, max(ticks) * 1.15)
            else:
                axes.set_xlim(0, 1.03 * max(ticks))
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            percent(axes, 0, min(1.0, math.ceil(top * 10 + 0.2) / 10))
            if place % columns:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel("accuracy")
        figure.supxlabel(x, fontsize=9)
        handles = {label: handle for axes in systems for handle, label in zip(*axes.get_legend_handles_labels())}
        order = [label for label in labels if label in handles]
        figure.legend([handles[label] for label in order], order, loc="outside upper left", ncols=columns_of(order, figure))
        return png(figure)


def errors_by_steps(lines: Sequence[Curve], title: str, y: str, dark: bool = False) -> bytes:
    """Errors against the number of steps T, both on logarithmic scales: one line for each layer, and a dashed one that falls like 1/T."""
    with styled(dark) as (_, muted, _paper):
        colours = DARK if dark else LIGHT
        figure, (axes,), _ = systems_of(1, 1, 5.6, 3.5)
        for index, curve in enumerate(lines):
            axes.plot(curve.x, curve.y, **look_of(index, colours), label=curve.label)
        first, last = min(min(curve.x) for curve in lines), max(max(curve.x) for curve in lines)
        start = 0.7 * min((curve.y[0] for curve in lines if curve.y[0] > 0), default=1.0)
        axes.plot([first, last], [start, start * first / last], color=muted, linewidth=1.2, linestyle=(0, (4, 3)), label="1/T")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        ticks = [round(2**value, 6) for value in _apart({math.log2(x) for curve in lines for x in curve.x}, math.log2(last / first) / 16)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title(title)
        axes.set_xlabel("steps T")
        axes.set_ylabel(y)
        axes.legend(loc="best", handlelength=1.8)
        return png(figure)


def _apart(values: set[float], gap: float) -> list[float]:
    """The values, from the largest down, without those whose labels would touch."""
    ticks: list[float] = []
    for value in sorted(values, reverse=True):
        if not ticks or ticks[-1] - value >= gap:
            ticks.append(value)
    return ticks[::-1]


def curves(panels: Sequence[Panel], x: str = "epoch", dark: bool = False) -> bytes:
    """Quantities over training (x in epochs): small panels that share the axis of x; a label names each line."""
    with styled(dark):
        colours = DARK if dark else LIGHT
        figure, systems, _ = systems_of(len(panels), 3 if len(panels) > 4 else 2, 2.9 if len(panels) > 4 else 3.7, 2.35)
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
                percent(axes)
            axes.set_xlim(left, right)
            _calm(axes)
            _whole_ticks(axes)
            if len(panel.curves) > 1:
                axes.legend(loc="best", handlelength=1.6)
        figure.supxlabel(x, fontsize=9)
        return png(figure)


def layers_over_training(panels: Sequence[Panel], x: str = "epoch", average: bool = True, dark: bool = False) -> bytes:
    """One line per spiking layer in each panel, shaded from the first layer to the last; a dashed line is their mean."""
    with styled(dark) as (ink, *_):
        from matplotlib import colormaps

        names = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
        # Viridis reads the same to colour-blind eyes; its end that would vanish on this ground is left out.
        low, high = (0.3, 1.0) if dark else (0.0, 0.85)
        shade = {name: colormaps["viridis"](low + (high - low) * i / max(1, len(names) - 1)) for i, name in enumerate(names)}
        left, right = _range(panels)
        figure, systems, _ = systems_of(len(panels), 3, 2.75, 2.75)
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
        beside = columns_of(labels, figure)
        figure.set_figheight(2.55 + 0.18 * math.ceil(len(labels) / beside))
        figure.legend(handles, labels, loc="outside upper left", ncols=beside, handlelength=1.6)
        return png(figure)
