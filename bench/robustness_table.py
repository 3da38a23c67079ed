"""What `robustness.py` found, as a ranked table, a picture, and beside the figures that papers print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustness_job import LOOKED_AT, NEAR, SMALL

from fastsnn.defenses import DEFENSES
from fastsnn.evaluation import wilson
from fastsnn.pictures.base import LIGHT, figure_of, percent, png, styled

__all__ = ["Summary", "markdown", "picture", "printed", "summarise"]

#: Attack -> heading; the worst case is per sample over the clean image and all attacks of the size.
ACCURACIES = {"clean": "clean", "fgsm": "FGSM", "pgd7": "PGD-7", "worst": "worst case", "uniform": "uniform", "gaussian": "gaussian"}
#: Quantity -> (name, whether a defense about it wants it larger, format).
QUANTITIES = {
    "omega": ("Omega", False, ".3f"), "guard": ("near the threshold", False, ".1%"), "singular": ("distance of singular values from 1", False, ".3f"),
    "sparsity": ("small gradient entries", True, ".1%"), "gradient": ("l1 norm of the gradient", False, ".3g"), "pgd7": ("accuracy under PGD-7", True, ".1%"), "shift": ("spikes moved by PGD-7", False, ".1%"),
}  # fmt: skip
#: What defenses are about; those that craft images are about PGD's accuracy, the others about how far an attack moves the spikes.
ABOUT = {"mpd-sgr": ["omega"], "tgo": ["guard"], "reg": ["singular"], "sr": ["sparsity", "gradient"], "dlif": ["shift"]}
#: Row -> (method, training) in the file of printed figures, where its words are others.
PRINTED = {
    "vanilla": [("vanilla", None)], "reg": [("REG", None), ("REG", "vanilla(no AT)")], "at": [("AT", None), ("AT", "AT"), ("AT", "AT pgd2 eps2/255")],
    "mpd-sgr": [("MPD-SGR", "vanilla(no AT)")], "mpd-sgr-at": [("MPD-SGR", "AT pgd2 eps2/255")], "snn-rat": [("RAT", None)],
    "pgd-rat": [("RAT(as re-run by MPD-SGR: AT+REG)", "AT pgd2 eps2/255"), ("RAT", "RAT")], "sr": [("SR", "vanilla(no AT)")], "tgo": [("TGO", "BPTT")],
    "stog": [("StoG", "vanilla(no AT)")], "dlif": [("DLIF", "vanilla(no AT)")], "feel": [("FEEL", "vanilla(no AT)")],
}  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Summary:
    """One defense over its seeds. intervals: Wilson's, 95 %, for the test images: networks of several seeds share them, and so count once."""

    name: str
    defense: str
    random: bool
    seeds: tuple[int, ...]
    accuracies: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    worst_of_each: tuple[float, ...]
    quantities: Mapping[str, float | None]
    seconds: float | None
    clock: str
    warnings: tuple[str, ...]


def summarise(rows: Sequence[dict]) -> list[Summary]:
    """One summary for each name, the best worst case first."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"])
        count = own[0]["test_images"]
        each = {key: [row["correct"][key].count("1") / count for row in own] for key in ACCURACIES}
        means = {key: sum(values) / len(values) for key, values in each.items()}
        looked = {key: _mean([row["quantities"][key] for row in own]) for key in own[0]["quantities"]} | {"pgd7": means["pgd7"]}
        seconds = _mean([row["training"]["seconds"] for row in own])
        found.append(Summary(
            name, own[0]["defense"], own[0]["random"], tuple(row["seed"] for row in own), means,
            {key: wilson(round(value * count), count) for key, value in means.items()}, tuple(each["worst"]), looked, seconds, own[0]["training"]["clock"],
            tuple(dict.fromkeys(text for row in own for text in row["warnings"])),
        ))  # fmt: skip
    return sorted(found, key=lambda one: (-one.accuracies["worst"], -one.accuracies["clean"], one.name))


def about(defense: str) -> list[str]:
    """The quantities that the parts of a defense are about."""
    if defense == "vanilla":
        return []
    found = [ABOUT.get(part) or ["pgd7" if DEFENSES[part].crafts else "shift"] for part in defense.split("+")]
    return list(dict.fromkeys(key for keys in found for key in keys))


def intended(one: Summary, plain: Summary | None) -> str:
    """What the defense is about, without it and with it."""
    told = []
    for key in about(one.defense):
        name, larger, form = QUANTITIES[key]
        value, before = one.quantities.get(key), None if plain is None else plain.quantities.get(key)
        if value is None:
            told.append(f"{name}: none")
        elif before is None:
            told.append(f"{name} {value:{form}}")
        else:
            way = "" if value == before or (value > before) == larger else ", the other way"
            told.append(f"{name} {before:{form}} → {value:{form}}{way}")
    return "; ".join(told) or "–"


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def markdown(found: Sequence[Summary], budget: Sequence[str], failed: Mapping[str, str] = {}) -> str:
    """The budget, then the ranked table, then what its columns mean."""
    plain = next((one for one in found if one.defense == "vanilla"), None)
    lines = [*budget, ""]
    heads = ["", "defense", "clean", "FGSM", "PGD-7", "worst case", "of each seed", "noise: uniform, gaussian", "Omega", "near the threshold", "firing rate", "training time", "what it is about"]
    lines += [f"| {' | '.join(heads)} |", f"|{' ---: |'} --- |{' ---: |' * 10} --- |"]
    for rank, one in enumerate(found, 1):
        low, high = one.intervals["worst"]
        ratio = None if plain is None or not plain.seconds or one.seconds is None else one.seconds / plain.seconds
        cells = [
            str(rank), one.name + " (random)" * one.random, *(_share(one.accuracies[key]) for key in ("clean", "fgsm", "pgd7")),
            f"{_share(one.accuracies['worst'])} ({_share(low)} to {_share(high)})", ", ".join(map(_share, one.worst_of_each)),
            f"{_share(one.accuracies['uniform'])}, {_share(one.accuracies['gaussian'])}", _number(one.quantities["omega"], ".3f"),
            _number(one.quantities["guard"], ".1%"), _number(one.quantities["rate"], ".1%"), _number(ratio, ".2f"), intended(one, plain),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    clock = {"CPU": "CPU seconds", "wall": "seconds"}[found[0].clock] if found else "seconds"
    lines += [
        "",
        "Accuracies in per cent, means over seeds. Worst case: right on the clean image and under every attack of the size, sample by sample; in brackets 95 % "
        "(Wilson) for the number of test images. Omega, near the threshold, firing rate: means over spiking layers on the clean test images; near: "
        f"within {NEAR} of it. Training time: {clock} of a training, relative to vanilla. What it is about: without → with the defense; small "
        f"gradient entries: below {SMALL} in the gradient of the true class's probability against the best wrong class, on {LOOKED_AT} images; spikes moved: of the last spiking layer, relative to their norm.",
    ]  # fmt: skip
    doubtful = [f"- {one.name}: {text}" for one in found for text in one.warnings]
    if doubtful:
        lines += ["", "Signs that there is less robustness than the figures show:", *doubtful]
    if failed:
        lines += ["", "Without a result:", *(f"- {name}: {reason}" for name, reason in failed.items())]
    return "\n".join(lines)


def printed(found: Sequence[Summary], path: Path, eps: float) -> str:
    """What papers print on CIFAR-10 for the defenses of the table at the same size, beside what was measured here. path: a JSON with "rows"
    of method, dataset, arch, T, attack, grad, steps, eps, acc, source."""
    document = json.loads(path.read_text(encoding="utf-8"))
    together: dict[tuple, dict[str, float]] = {}
    for row in document["rows"]:
        size, attack = row.get("eps"), {"pgd7": "pgd"}.get(row["attack"], row["attack"])
        if row["dataset"] != "CIFAR10" or row.get("box") not in (None, "white") or row.get("grad") not in (None, "BPTT") or row.get("steps") not in (None, 7, 10):
            continue
        if attack == "clean" or (attack in ("fgsm", "pgd") and size is not None and abs(size - eps) < 5e-4):
            name = f"pgd{row.get('steps') or 7}" if attack == "pgd" else attack
            key = (row["method"], row.get("train"), row.get("arch"), row.get("T"), row["source"], row.get("surrogate"))
            together.setdefault(key, {}).setdefault(name, row["acc"])
    lines = ["| defense | clean, FGSM, PGD-7 here | printed: clean, FGSM, PGD | network | source |", "| --- | --- | --- | --- | --- |"]
    for one in found:
        here = ", ".join(_share(one.accuracies[key]) for key in ("clean", "fgsm", "pgd7"))
        for (method, train, arch, steps, source, surrogate), values in together.items():
            if (method, train) not in PRINTED.get(one.name, []) or len(values) < 2 or surrogate is not None or steps is None:
                continue
            theirs = [f"{values[key]:g}" if key in values else "–" for key in ("clean", "fgsm")]
            theirs += [f"{values[key]:g}" + (" (PGD-10)" if key == "pgd10" else "") for key in ("pgd7", "pgd10") if key in values] or ["–"]
            lines.append(f"| {one.name} | {here} | {', '.join(theirs)} | {arch}, T = {steps} | {source} |")
    if len(lines) == 2:
        return ""
    note = "Printed figures are of large networks on CIFAR-10, trained for hundreds of epochs, under attacks through the surrogate of training; those here are of the budget above."
    return "\n".join([*lines, "", note])


def picture(found: Sequence[Summary], title: str, dark: bool = False) -> bytes:
    """Clean accuracy (y) against the worst case (x), a numbered point for each defense; bars: the 95 % intervals of the worst case."""
    with styled(dark) as (ink, muted, paper):
        figure = figure_of(7.6, 4.6)
        axes = figure.add_subplot()
        for rank, one in enumerate(found, 1):
            x, y = one.accuracies["worst"], one.accuracies["clean"]
            low, high = one.intervals["worst"]
            colour = LIGHT[1] if one.random else LIGHT[0]
            axes.errorbar(x, y, xerr=[[max(0.0, x - low)], [max(0.0, high - x)]], color=muted, linewidth=0.8, zorder=2)
            axes.plot(x, y, "o", color=colour, markersize=12, markeredgecolor=paper, zorder=3)
            axes.annotate(str(rank), (x, y), ha="center", va="center", color="#FFFFFF", fontsize=7, zorder=4)
            axes.plot([], [], "o", color=colour, label=f"{rank}  {one.name}" + " (random)" * one.random)
        percent(axes)
        axes.xaxis.set_major_formatter(lambda value, _: f"{round(100 * value, 6):g} %")
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        axes.set_xlabel("worst case over all attacks, sample by sample")
        axes.set_ylabel("clean accuracy")
        axes.set_title(title)
        if found:
            figure.legend(loc="outside right upper", handlelength=1.0, labelspacing=0.35)
        return png(figure)
