"""Surfaces of the loss, seen from above."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import axes_at, figure_of, png, styled

#: Inches of a panel with its scale.
WIDE, HIGH = 4.1, 3.4


@dataclass(frozen=True)
class Ground:
    """A surface over two directions: heights [B, A] in nats at the coordinates b [B] and a [A]; x, y name the axes of a and b."""

    title: str
    x: str
    y: str
    a: np.ndarray
    b: np.ndarray
    heights: np.ndarray


def landscapes(grounds: Sequence[Ground], dark: bool = False) -> bytes:
    """Each surface by colour and lines of equal height, with a cross at its middle; its scale is logarithmic where it is steep."""
    with styled(dark):
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import MaxNLocator

        columns = min(2, len(grounds))
        figure = figure_of(columns * WIDE, -(-len(grounds) // columns) * HIGH, layout=None)
        for place, ground in enumerate(grounds):
            left, top = place % columns * WIDE, place // columns * HIGH
            axes, beside = axes_at(figure, left + 0.68, top + 0.3, 2.5, 2.5), axes_at(figure, left + 3.26, top + 0.3, 0.12, 2.5)
            levels, norm = _levels(ground.heights)
            shown = np.clip(ground.heights, levels[0], levels[-1])
            filled = axes.contourf(ground.a, ground.b, shown, levels=levels, norm=norm, cmap="viridis")
            axes.contour(ground.a, ground.b, shown, levels=levels[1:-1:2], colors="#FFFFFF", linewidths=0.5, alpha=0.6)
            axes.plot([0], [0], marker="+", markersize=9, markeredgewidth=1.6, color="#FFFFFF")
            # Levels of equal width are round numbers, those of equal ratio are not.
            bar = figure.colorbar(filled, cax=beside, ticks=levels[::2], format=lambda value, _, log=isinstance(norm, LogNorm): _number(value, log))
            beside.minorticks_off()
            beside.tick_params(labelsize=8)
            bar.outline.set_visible(False)
            bar.set_label("loss (nats)", fontsize=8.5)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4))
            axes.set_title(ground.title)
            axes.set_xlabel(ground.x)
            axes.set_ylabel(ground.y)
            axes.grid(False)
        return png(figure)


def _number(value: float, log: bool) -> str:
    return f"{value:.6g}" if not log else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def _levels(heights: np.ndarray):
    """Some twelve bands from the lowest to the highest, of equal width, or of equal ratio where the highest is far above the middle."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    low, high = float(np.min(heights)), float(np.max(heights))
    if not high > low * (1 + 1e-6) + 1e-6:  # flat
        low, high = low - 0.5, high + 0.5
    if low > 0 and high > 20 * np.median(heights) or high > 1000 * max(low, 1e-12) > 0:
        low = max(low, high / 1e5)
        return np.geomspace(low, high, 13), LogNorm(low, high)
    levels = MaxNLocator(12).tick_values(low, high)
    return levels, Normalize(levels[0], levels[-1])
