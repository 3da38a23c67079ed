"""Layers side by side: how far an attack moves their spikes, and the singular values of their weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import DARK, LIGHT, axes_at, figure_of, inches, look_of, png, styled
from .lines import Panel


def layers_under_attack(panels: Sequence[Panel], spectra: dict[str, Sequence[float]], dark: bool = False) -> bytes:
    """Panels whose curves go over the layers, and one of the singular values of each weight, largest first.

    panels: each curve's x holds the names of layers. spectra: layer -> singular values; drawn against their rank, from 0 for the
    largest to 1 for the smallest, on a logarithmic scale, from the first layer (dark) to the last (bright).
    """
    with styled(dark) as (_, muted, _paper):
        from matplotlib import colormaps
        from matplotlib.ticker import LogLocator

        colours = DARK if dark else LIGHT
        names = list(dict.fromkeys(name for panel in panels for curve in panel.curves for name in curve.x))
        count, below = len(panels) + bool(spectra), max(0.5, 0.87 * inches(names, 7.5) + 0.15)
        figure = figure_of(3.05 * count, 2.75 + below, layout=None)
        systems = [axes_at(figure, 3.05 * i + 0.65, 0.3, 2.3, 2.35) for i in range(count)]
        for axes, panel in zip(systems, panels):
            for index, curve in enumerate(panel.curves):
                axes.plot([names.index(name) for name in curve.x], curve.y, **look_of(index, colours), label=curve.label)
            axes.set_title(panel.title)
            axes.set_ylabel(panel.y)
            axes.set_ylim(0, 1.08 * max((value for curve in panel.curves for value in curve.y), default=0) or 1)
            every = -(-len(names) // 12)
            axes.set_xticks(range(0, len(names), every), names[::every], rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5)
            if len(panel.curves) > 1:
                axes.legend(loc="best", handlelength=1.6)
        if spectra:
            axes = systems[-1]
            low, high = (0.3, 1.0) if dark else (0.0, 0.85)
            for i, (name, values) in enumerate(spectra.items()):
                colour = colormaps["viridis"](low + (high - low) * i / max(1, len(spectra) - 1))
                seen = np.asarray(values, dtype=float)
                seen = np.maximum(seen, seen.max() * 1e-6 or 1e-12)  # a zero has no place on this scale
                few = {"marker": "o", "markersize": 2.5} if len(seen) <= 12 else {}
                axes.plot(np.linspace(0, 1, len(seen)) if len(seen) > 1 else [0.0], seen, color=colour, linewidth=1.3, label=name, **few)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
            axes.set_title("Singular values of the weights")
            axes.set_xlabel("rank, largest to smallest")
            axes.axhline(1, color=muted, linewidth=1, linestyle=(0, (2, 3)))
            handles, labels = axes.get_legend_handles_labels()
            kept = range(len(labels)) if len(labels) <= 8 else sorted({round(k * (len(labels) - 1) / 7) for k in range(8)})
            axes.legend([handles[k] for k in kept], [labels[k] for k in kept], loc="lower left", fontsize=7.5, handlelength=1.2, labelspacing=0.25)
        return png(figure)
