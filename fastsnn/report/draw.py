"""Which pictures the report shows, in which order, and what each says in words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from .. import pictures
from ..pictures import Curve, Layer, Panel
from .folders import Run
from .page import Picture, Text
from .table import Group, attacks_of, fraction

__all__ = ["Studio"]


class Studio:
    """Draws pictures in light and dark and keeps their files; without matplotlib it draws none, and says so once."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.missing: list[str] = []

    def _draw(self, name: str, alt: str, caption: str, draw: Callable[[bool], bytes]) -> list[Picture | Text]:
        try:
            light, dark = draw(False), draw(True)
        except ImportError as error:
            if str(error) not in self.missing[:1]:
                self.missing.insert(0, f"There are no pictures: {str(error).replace(chr(96), chr(39))}")
                self.missing = self.missing[:1]
            return []
        file = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "picture"
        while f"{file}.png" in self.files:
            file += "-"
        self.files[f"{file}.png"] = light
        return [Picture(f"{file}.png", alt, caption, light, dark)]

    def against_eps(self, groups: Sequence[Group]) -> list[Picture | Text]:
        """All runs in one picture, one panel for each attack."""
        runs = [run for group in groups for run in group.runs]
        met = attacks_of(runs)
        panels: dict[str, list[Curve | None]] = {}
        for attack in dict.fromkeys(attack for attack, _ in met):
            sizes = [0.0, *(eps for name, eps in met if name == attack)]
            panels[attack] = [self._line(group, attack, sizes) for group in groups]
        panels = {attack: curves for attack, curves in panels.items() if any(curves)}
        if not panels:
            return []
        labels = [group.name + (f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else "") for group in groups]
        chances = {run.chance for run in runs}
        chance = chances.pop() if len(chances) == 1 else None
        words = "; ".join(f"{attack}: {self._words(curves, labels)}" for attack, curves in panels.items())
        shade = "95 % intervals" if all(len(group.runs) == 1 for group in groups) else "95 % intervals of single runs, and the ranges over seeds"
        return self._draw(
            "accuracy-eps",
            f"Accuracy against the size of the perturbation. {words}.",
            f"Accuracy against the size ε of the perturbation; shaded: {shade}.",
            lambda dark: pictures.against_eps(panels, labels, chance, dark),
        )

    @staticmethod
    def _line(group: Group, attack: str, sizes: Sequence[float]) -> Curve | None:
        found = [(eps, group.accuracy(attack if eps else "clean", eps)) for eps in sizes]
        found = [(eps, number) for eps, number in found if number is not None]
        if not any(eps for eps, _ in found):
            return None
        spread = all(number.low is not None for _, number in found)
        x, numbers = zip(*found)
        low, high = ([getattr(number, end) for number in numbers] if spread else None for end in ("low", "high"))
        return Curve(group.name, list(x), [number.value for number in numbers], low, high)

    @staticmethod
    def _words(curves: Sequence[Curve | None], labels: Sequence[str]) -> str:
        return ", ".join(
            f"{label} {100 * curve.y[0]:.1f} % at {fraction(curve.x[0]) if curve.x[0] else 'ε 0'} and {100 * curve.y[-1]:.1f} % at {fraction(curve.x[-1])}"
            for curve, label in zip(curves, labels)
            if curve
        )

    def learning(self, run: Run) -> list[Picture | Text]:
        """Accuracy, loss and its terms, firing rate and learning rate over the epochs."""
        terms = [name for name in run.terms() if name not in ("task", "omega")]
        kinds = (("training", "epoch"), ("validation", "validation"))
        wanted = [
            Panel("Accuracy", "", _there(run.curve(label, kind, "accuracy") for label, kind in kinds), share=True),
            Panel("Loss", "nats", _there([*(run.curve(label, kind, "loss") for label, kind in kinds), run.curve("task", "epoch", "task") if terms else None])),
        ]
        drawn = _there(run.curve(name, "epoch", name) for name in terms)
        if drawn:
            wanted.append(Panel(f"Term {drawn[0].label}" if len(drawn) == 1 else "Further terms", "nats", drawn))
        wanted.append(Panel("Firing rate", "spikes per neuron and step", _there([run.curve("validation", "validation", "rate")])))
        wanted.append(Panel("Learning rate", "", _there([run.curve("learning rate", "epoch", "lr")])))
        panels = [panel for panel in wanted if panel.curves]
        if not panels:
            return []
        words = "; ".join(f"{panel.title.lower()} {_ends(panel)}" for panel in panels)
        return self._draw(
            f"{run.name}-learning",
            f"{run.name} over training: {words}.",
            "Learning curves. Training values are means over an epoch, on the images as the defense changes them; validation is clean.",
            lambda dark: pictures.curves(panels, "epoch", dark),
        )

    def over_training(self, run: Run) -> list[Picture | Text]:
        """Omega, mean and deviation of each spiking layer over the epochs."""
        wanted = (("omega", f"Ω within ±{run.gamma:g}", "share of membranes"), ("mean", "Mean of z", "potential"), ("deviation", "Deviation of z", "potential"))
        panels = [Panel(title, unit, _renamed(curves)) for key, title, unit in wanted if (curves := run.layer_curves(key))]
        if not panels:
            return []
        words = "; ".join(f"{panel.title}: " + ", ".join(f"{curve.label} {curve.y[0]:.2f} to {curve.y[-1]:.2f}" for curve in panel.curves) for panel in panels)
        return self._draw(
            f"{run.name}-layers",
            f"{run.name}, spiking layers over training. {words}.",
            "Each spiking layer over training, from the first (dark) to the last (bright), on the validation images: Ω, and mean and deviation of z, the membrane's "
            "distance to the threshold.",
            lambda dark: pictures.layers_over_training(panels, "epoch", dark=dark),
        )

    def membranes(self, run: Run, layers: Sequence[Layer]) -> list[Picture | Text]:
        """The histograms of the trained network's membranes."""
        words = "; ".join(f"{layer.name}: Ω {layer.omega:.2f}, mean {layer.mean:.2f}, deviation {layer.deviation:.2f}" for layer in layers)
        return self._draw(
            f"{run.name}-membranes",
            f"{run.name}, histograms of membranes by layer. {words}.",
            "Membranes of the trained network on test images, over all steps, channels and places: z, the distance to the threshold (dotted). "
            "μ and σ are those of the Gaussian fit to all; Ω is what the Gaussians by channel and step have "
            f"within ±{layers[0].gamma:g}. The surrogate's window, shaded, is where a gradient passes; for surrogates without an end, where "
            "they exceed half their height. ▲ gives the share of a bar that is cut off.",
            lambda dark: pictures.membranes(_renamed(layers), dark),
        )


def _renamed(layers: Sequence) -> list:
    """Layers or their curves without the last part of the name that all share: `features.0`, not `features.0.neuron`."""
    key = "name" if isinstance(layers[0], Layer) else "label"
    names = [getattr(layer, key) for layer in layers]
    ends = {name.rpartition(".")[2] for name in names}
    if len(ends) > 1 or not all("." in name for name in names):
        return list(layers)
    return [dataclasses.replace(layer, **{key: name.rpartition(".")[0]}) for layer, name in zip(layers, names)]


def _there(curves) -> list[Curve]:
    return [curve for curve in curves if curve is not None]


def _ends(panel: Panel) -> str:
    scale, unit = (100, " %") if panel.share else (1, "")
    return ", ".join(f"({curve.label}) from {scale * curve.y[0]:.3g}{unit} to {scale * curve.y[-1]:.3g}{unit}" for curve in panel.curves)
