"""The histograms of membranes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .base import DARK, LIGHT, columns_of, png, styled, systems_of

#: What a picture of membranes shows, in the order of its legend.
LEGEND = ("membranes", "Gaussian fit", "Gaussians by channel and step", "surrogate (scaled)", "surrogate's window")




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


def membranes(layers: Sequence[Layer], dark: bool = False) -> bytes:
    """A histogram of z = h - threshold for each layer, its Gaussian fit, and the surrogate with its window shaded."""
    with styled(dark) as (ink, muted, _):
        colours = DARK if dark else LIGHT
        figure, systems, _ = systems_of(len(layers), 3, 2.75 if len(layers) > 2 else 3.6, 2.25)
        for axes, layer in zip(systems, layers):
            _membrane(axes, layer, ink, colours)
        figure.supxlabel("z = h − θ (potential)", fontsize=9)
        figure.supylabel("density (1/potential)", fontsize=9)
        known = dict(zip(*reversed(systems[0].get_legend_handles_labels())))
        labels = [label for label in LEGEND if label in known]
        figure.legend([known[label] for label in labels], labels, loc="outside upper left", ncols=columns_of(labels, figure), handlelength=1.6)
        return png(figure)


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
