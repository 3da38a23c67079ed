"""Which pictures the report shows, in which order, and what each says in words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from .. import pictures
from ..pictures import Bars, Curve, Ground, Layer, Panel
from .attacked import STEPS, Attacked
from .folders import Run
from .page import Picture, Text
from .table import Group, attacks_of, fraction

__all__ = ["Studio"]

#: The title and the names of the axes of a landscape.
GROUND = {
    "pixels": ("Pixels", "along the gradient's sign (ε)", "along random signs (ε)"),
    "weights": ("Weights", "along the gradient (norms)", "along a random direction (norms)"),
}


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
        met = attacks_of(runs, worst=True) + attacks_of(runs)
        panels: dict[str, list[Curve | None]] = {}
        for attack in dict.fromkeys(attack for attack, _ in met):
            sizes = [0.0, *(eps for name, eps in met if name == attack)]
            panels[attack] = [self._line(group, attack, sizes) for group in groups]
        panels = {attack: curves for attack, curves in panels.items() if any(curves)}
        if not panels:
            return []
        labels, chance = _labels(groups), _chance(runs)
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

    def against_steps(self, groups: Sequence[Group]) -> list[Picture | Text]:
        """Accuracy against the number of steps, where a suite has measured it: one panel for each attack."""
        names = list(dict.fromkeys(name for group in groups for run in group.runs for name in run.by_steps))
        panels = {_title(name): [_mean_curve(group, name) for group in groups] for name in names}
        panels = {name: curves for name, curves in panels.items() if any(curves)}
        if not panels:
            return []
        labels, chance = _labels(groups), _chance([run for group in groups for run in group.runs])

        def told(label: str, curve: Curve) -> str:
            return f"{label} {100 * curve.y[0]:.1f} % after {curve.x[0]:g} and {100 * curve.y[-1]:.1f} % after {curve.x[-1]:g} steps"

        words = "; ".join(f"{name}: " + ", ".join(told(label, curve) for label, curve in zip(labels, curves) if curve) for name, curves in panels.items())
        return self._draw(
            "accuracy-steps",
            f"Accuracy against the number of steps of an attack. {words}.",
            "Accuracy against the number of steps of an attack; shaded: 95 % intervals, or the ranges over seeds. An attack that has found what "
            "it can find is flat at its right end.",
            lambda dark: pictures.against_steps(panels, labels, chance, dark),
        )

    def members(self, groups: Sequence[Group]) -> list[Picture | Text]:
        """What the members of each ensemble leave: one picture for each ensemble, one panel for each group of runs, three sizes at most."""
        found: list[Picture | Text] = []
        keys = list(dict.fromkeys(key for group in groups for run in group.runs for key in run.members))
        for attack in dict.fromkeys(attack for attack, _ in keys):
            sizes = sorted(eps for name, eps in keys if name == attack)
            sizes = sizes if len(sizes) <= 3 else [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
            here = [(group, label) for group, label in zip(groups, _labels(groups)) if all((attack, eps) in run.members for run in group.runs for eps in sizes)]
            if here:
                found += self._members(attack, sizes, here)
        return found

    def _members(self, attack: str, sizes: Sequence[float], groups: Sequence[tuple[Group, str]]) -> list[Picture | Text]:
        names = list(dict.fromkeys(name for group, _ in groups for run in group.runs for eps in sizes for name in run.members[attack, eps]))
        bars = [
            Bars(label, *([[_mean_member(group, attack, eps, name, what) for name in names] for eps in sizes] for what in ("standing", "alone")))
            for group, label in groups
        ]

        def told(one: Bars) -> str:
            ends = [[value for value in line if value is not None] for line in one.standing]
            at = [f"{100 * line[0]:.1f} % after the first and {100 * line[-1]:.1f} % after all at {fraction(eps)}" for line, eps in zip(ends, sizes) if line]
            return f"{one.title}: {', '.join(at)}"

        return self._draw(
            f"members-{attack.lower()}",
            f"Members of {attack}. {'; '.join(map(told, bars))}.",
            f"{attack}: the accuracy that is left after each member and those above it. Ticks: the accuracy under that member alone, where it "
            "attacked every image.",
            lambda dark: pictures.members(names, [fraction(eps) for eps in sizes], bars, dark),
        )

    def examples(self, run: Run, seen: Attacked) -> list[Picture | Text]:
        """Images before and after an attack, their differences, and the gradient by their pixels."""
        size, count = fraction(seen.eps), len(seen.examples)
        fooled = sum(one.after != one.label for one in seen.examples)
        numbers = [f"{100 * seen.sparsity['zero']:.0f} % of its entries are 0"]
        numbers += [f"Hoyer's sparsity is {seen.sparsity['hoyer']:.2f}"] if "hoyer" in seen.sparsity else []
        return self._draw(
            f"{run.name}-attacked",
            f"{run.name}: {count} test images, clean and under PGD-{STEPS} at {size}, which leaves {fooled} wrong; their differences and the gradients of the loss.",
            f"Test images before and after PGD-{STEPS} at ε = {size}, with seed 0. Differences run from −ε to ε: blue is darker, red brighter; of "
            "coloured images, colours around a middle grey. The gradient is that of the loss by the clean image's pixels, its size as a share of each "
            f"image's largest. In the mean over images {', '.join(numbers)}, its ℓ₁ norm is {seen.sparsity['l1']:.3g} nats.",
            lambda dark: pictures.examples(seen.examples, seen.eps, dark),
        )

    def landscapes(self, run: Run, seen: Attacked) -> list[Picture | Text]:
        """The loss around the images and around the weights."""
        grounds = [Ground(*GROUND[one.space], one.a, one.b, one.loss) for one in seen.surfaces]

        def told(one: Ground) -> str:
            middle = one.heights[len(one.b) // 2, len(one.a) // 2]
            return f"around the {one.title.lower()} from {one.heights.min():.3g} to {one.heights.max():.3g} nats, {middle:.3g} in the middle"

        return self._draw(
            f"{run.name}-landscapes",
            f"{run.name}, the loss {'; '.join(map(told, grounds))}.",
            f"The loss around these images (in units of ε = {fraction(seen.eps)}, along the sign of its gradient and along random signs) and around the "
            "weights (in units of each filter's norm, along the gradient and along a random direction); + is where the network stands. A surface that "
            "is flat along the gradient and rises along a random direction is a sign of masked gradients.",
            lambda dark: pictures.landscapes(grounds, dark),
        )

    def under_attack(self, run: Run, seen: Attacked) -> list[Picture | Text]:
        """How far the spikes of each layer move, where there are any, and the singular values of the weights."""
        wanted = (("distance", "Spikes that change", "‖S − S̃‖₂"), ("relative", "As a share of all spikes", "‖S − S̃‖₂ / ‖S‖₂")) if seen.distances else ()
        panels = [
            Panel(title, unit, [Curve(kind, _short([layer.name for layer in layers]), [getattr(layer, key) for layer in layers]) for kind, layers in seen.distances.items()])
            for key, title, unit in wanted
        ]
        moved = [f"‖S − S̃‖₂ under {kind} from {ends[0].distance:.3g} in {ends[0].name} to {ends[-1].distance:.3g} in {ends[-1].name}" for kind, ends in seen.distances.items()]
        widest = max(seen.spectra, key=lambda name: seen.spectra[name][0])
        largest = f"the largest singular value of the weights is {seen.spectra[widest][0]:.3g}, in {widest}"
        spikes = (
            f"Spikes S of each layer, and S̃ under PGD-{STEPS} at ε = {fraction(seen.eps)} or uniform noise of the same size: their distances, means over the images above. "
            if panels
            else ""
        )
        return self._draw(
            f"{run.name}-under-attack",
            f"{run.name}, {'; '.join([*moved, largest])}.",
            f"{spikes}Singular values of each layer's weights, those of a convolution as a matrix of output channels by the rest, from the first layer "
            "(dark) to the last (bright).",
            lambda dark: pictures.layers_under_attack(panels, seen.spectra, dark),
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


def _labels(groups: Sequence[Group]) -> list[str]:
    return [group.name + (f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else "") for group in groups]


def _chance(runs: Sequence[Run]) -> float | None:
    """The accuracy of guessing, where it is the same for all."""
    chances = {run.chance for run in runs}
    return chances.pop() if len(chances) == 1 else None


def _title(name: str) -> str:
    """`pgd-8/255` as `PGD, ε 8/255`."""
    attack, dash, size = name.rpartition("-")
    return f"{attack.upper()}, ε {size}" if dash else name.upper()


def _mean_curve(group: Group, name: str) -> Curve | None:
    """Accuracy against steps: of one run with its intervals, of several the mean and the range where all have the same steps."""
    found = [run.by_steps.get(name) for run in group.runs]
    if any(points is None for points in found) or len({tuple(point[0] for point in points) for points in found}) > 1:
        return None
    x = [point[0] for point in found[0]]
    if len(found) == 1:
        return Curve(group.name, x, [point[1] for point in found[0]], [point[2] for point in found[0]], [point[3] for point in found[0]])
    columns = [[points[k][1] for points in found] for k in range(len(x))]
    return Curve(group.name, x, [sum(column) / len(column) for column in columns], [min(column) for column in columns], [max(column) for column in columns])


def _mean_member(group: Group, attack: str, eps: float, name: str, what: str) -> float | None:
    members = [run.members[attack, eps].get(name) for run in group.runs]
    values = [None if member is None else getattr(member, what) for member in members]
    if any(value is None for value in values):
        return None
    return sum(values) / len(values)


def _short(names: Sequence[str]) -> list[str]:
    """Names without the last part, where all share it: `features.0`, not `features.0.neuron`."""
    ends = {name.rpartition(".")[2] for name in names}
    return list(names) if len(ends) > 1 or not all("." in name for name in names) else [name.rpartition(".")[0] for name in names]


def _renamed(layers: Sequence) -> list:
    """Layers or their curves by their short names."""
    key = "name" if isinstance(layers[0], Layer) else "label"
    return [dataclasses.replace(layer, **{key: name}) for layer, name in zip(layers, _short([getattr(layer, key) for layer in layers]))]


def _there(curves) -> list[Curve]:
    return [curve for curve in curves if curve is not None]


def _ends(panel: Panel) -> str:
    scale, unit = (100, " %") if panel.share else (1, "")
    return ", ".join(f"({curve.label}) from {scale * curve.y[0]:.3g}{unit} to {scale * curve.y[-1]:.3g}{unit}" for curve in panel.curves)
