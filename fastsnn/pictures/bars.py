"""Bars: what the members of an ensemble leave standing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import DARK, LIGHT, axes_at, columns_of, figure_of, inches, png, styled


@dataclass(frozen=True)
class Bars:
    """What one run keeps against the members of an ensemble, in their order, as shares of all samples.

    standing: for each size of the perturbation, the accuracy that is left after each member; None where the run has no such member.
    alone: the accuracy under that member alone; None where it is not known, since samples that were fooled before it left.
    """

    title: str
    standing: Sequence[Sequence[float | None]]
    alone: Sequence[Sequence[float | None]]


def members(names: Sequence[str], sizes: Sequence[str], runs: Sequence[Bars], dark: bool = False) -> bytes:
    """One panel for each run, in it one bar for each member (from above) and size; a tick is the accuracy under the member alone."""
    with styled(dark) as (ink, *_):
        colours = DARK if dark else LIGHT
        columns = min(3, len(runs))
        wide, thick = 2.4 if columns > 1 else 4.4, 0.8 / len(sizes)
        high = len(names) * max(0.16, 0.075 * len(sizes))
        left = inches(names, 8) + 0.15
        figure = figure_of(left + columns * (wide + 0.4), -(-len(runs) // columns) * (high + 0.6) + 0.45, layout=None)
        top = max((value for run in runs for line in (*run.standing, *run.alone) for value in line if value is not None), default=1.0)
        handles = {}
        for place, run in enumerate(runs):
            axes = axes_at(figure, left + place % columns * (wide + 0.4), 0.6 + place // columns * (high + 0.6), wide, high)
            for k, (standing, alone) in enumerate(zip(run.standing, run.alone)):
                y = [member - 0.4 + (k + 0.5) * thick for member in range(len(names))]
                shown = [float("nan") if value is None else value for value in standing]
                handles[f"ε {sizes[k]}"] = axes.barh(y, shown, height=0.92 * thick, color=colours[k % len(colours)], alpha=0.85)
                known = [(height, value) for height, value in zip(y, alone) if value is not None]
                if known:
                    heights, values = zip(*known)
                    size = 0.8 * thick * high / len(names) * 72
                    (handles["alone"],) = axes.plot(values, heights, linestyle="none", marker="|", markersize=size, markeredgewidth=1.3, color=ink)
            axes.set_title(run.title)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_xlim(0, min(1.0, 1.05 * top + 0.01))
            axes.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g} %")
            axes.tick_params(axis="y", length=0)
            axes.grid(False, axis="y")
            axes.set_yticks(range(len(names)), names if place % columns == 0 else [""] * len(names), fontsize=8)
        alone = handles.pop("alone", None)
        labels = [*handles, *(["that member alone"] if alone else [])]
        figure.legend([*handles.values(), *([alone] if alone else [])], labels, loc="upper left", ncols=columns_of(labels, figure), borderaxespad=0.2)
        figure.text(0.5, 0.04 / figure.get_figheight(), "accuracy", ha="center", va="bottom", fontsize=9)
        return png(figure)
