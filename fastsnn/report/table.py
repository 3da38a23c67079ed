"""The comparison: one row for each run, or for runs that differ only in the seed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from ..activity import totals
from .page import Cell, Column, Table
from .folders import Result, Run

__all__ = [
    *("Group", "Number", "activity_table", "attack_table", "check_table", "corruption_table", "differences", "fraction", "group_runs", "rows_of"),
    *("table", "text_table"),
]


@dataclass(frozen=True)
class Number:
    """A value with what is known of its spread: the 95 % interval of one run, or the range over the seeds of several."""

    value: float
    low: float | None = None
    high: float | None = None
    spread: str = ""  # "interval", "range" or nothing


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed; one run is a group too."""

    name: str
    runs: Sequence[Run]

    def number(self, of: Callable[[Run], float | None]) -> Number | None:
        """A value's mean and range over the runs; None unless each of them has it."""
        values = [of(run) for run in self.runs]
        if any(value is None for value in values):
            return None
        mean = sum(values) / len(values)
        return Number(mean, min(values), max(values), "range") if len(values) > 1 else Number(mean)

    def accuracy(self, attack: str, eps: float) -> Number | None:
        """Accuracy under an attack (attack "clean", eps 0: without one)."""
        found = [run.result(attack, eps) for run in self.runs]
        if any(result is None for result in found):
            return None
        if len(found) == 1:
            return Number(found[0].accuracy, found[0].low, found[0].high, "interval" if found[0].low is not None else "")
        return self.number(lambda run: run.result(attack, eps).accuracy)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first run."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps(run.settings(), sort_keys=True), []).append(run)
    return [Group(_name([run.name for run in members]), members) for members in together.values()]


def _name(names: Sequence[str]) -> str:
    """What the names of runs have in common, without the seed."""
    if len(names) == 1:
        return names[0]
    # Names end in a seed, or begin alike.
    shorter = {re.sub(r"[-_./ ]*(seed|s)?[-_=./ ]*\d+$", "", name) for name in names}
    start = shorter.pop() if len(shorter) == 1 else os.path.commonprefix(list(names)).rstrip("-_./ =")
    return start or f"{names[0]} and others"


def fraction(eps: float) -> str:
    """eps as it is written in papers: `8/255`, or a plain number; ∞ where an attack has none.

    >>> fraction(8 / 255)
    '8/255'
    """
    if math.isinf(eps):
        return "∞"
    steps = eps * 255
    return f"{round(steps)}/255" if abs(steps - round(steps)) < 1e-6 and round(steps) else f"{eps:g}"


def attacks_of(runs: Sequence[Run], worst: bool = False) -> list[tuple[str, float]]:
    """Every (attack, eps) that some run met: attacks in the order in which they were run, each with eps rising; or every worst case."""
    seen: dict[str, set[float]] = {}
    for run in runs:
        for result in run.worst if worst else run.results:
            if result.attack != "clean":
                seen.setdefault(result.attack, set()).add(result.eps)
    return [(attack, eps) for attack, sizes in seen.items() for eps in sorted(sizes)]


def conditions(results: Sequence[Result]) -> dict[str, str]:
    """How a run was attacked, in words by kind: what has to be equal for accuracies to compare.

    >>> conditions(run.results)
    {'weights': 'weights: best', 'images': '10,000 test images', 'PGD-7': 'PGD-7 in steps of 2.5ε/7', 'eot': 'EoT 1'}
    """

    def known(key: str, among: Sequence[Result] = results) -> list:
        return sorted({value for result in among if (value := getattr(result, key)) is not None})

    found = {}
    if weights := known("weights"):
        found["weights"] = f"weights: {' and '.join(weights)}"
    if totals := known("total"):
        found["images"] = f"{' or '.join(f'{total:,}' for total in totals)} test images"
    for attack in dict.fromkeys(result.attack for result in results):
        if steps := known("step", [result for result in results if result.attack == attack and result.eps]):
            found[attack] = f"{attack} in steps of {' or '.join(steps)}"
    if draws := known("eot"):
        found["eot"] = f"EoT {' or '.join(map(str, draws))}"
    return found


def shared_conditions(runs: Sequence[Sequence[Result]]) -> tuple[list[str], list[list[str]]]:
    """The conditions in which all runs that have results agree, and for each run the others.

    A run that did not meet an attack does not disagree about its steps.
    """
    each = [conditions(results) for results in runs]
    kinds = list(dict.fromkeys(kind for found in each for kind in found))
    texts = {kind: {found[kind] for found in each if kind in found} for kind in kinds}
    alike = [kind for kind in kinds if len(texts[kind]) == 1]
    return [text for kind in alike for text in texts[kind] if text != "EoT 1"], [[text for kind, text in found.items() if kind not in alike] for found in each]


def _by_run(groups: Sequence[Group]) -> tuple[list[str], dict[str, list[str]]]:
    runs = [run for group in groups for run in group.runs]
    alike, apart = shared_conditions([run.results for run in runs])
    return alike, {run.name: texts for run, texts in zip(runs, apart)}


def differences(groups: Sequence[Group]) -> list[str]:
    """A sentence for each run that was attacked in another way than some other run."""
    return [f"{name} was attacked otherwise than other runs, whose accuracies do not compare with its own: {'; '.join(texts)}." for name, texts in _by_run(groups)[1].items() if texts]


#: Columns after the accuracies: name, what it is of a run, how it is written.
FACTS: tuple[tuple[str, Callable[[Run], float | None], Callable[[float], str]], ...] = (
    ("Ω", lambda run: run.omega, lambda value: f"{value:.3f}"),
    ("firing rate", lambda run: run.rate, lambda value: f"{value:.3f}"),
    ("parameters", lambda run: run.parameters, lambda value: f"{value:,.0f}"),
    ("T", lambda run: run.steps, lambda value: f"{value:g}"),
    ("epochs", lambda run: run.epochs, lambda value: f"{value:g}"),
    ("time", lambda run: run.seconds, lambda value: duration(value)),
)


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `12 min` or `3 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _cell(number: Number | None, write: Callable[[float], str]) -> Cell:
    if number is None:
        return Cell("–")
    low, high = (None if value is None else write(value) for value in (number.low, number.high))
    note = "" if low is None or (low == high and number.spread == "range") else f"{low} – {high}"
    return Cell(write(number.value), note)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table(groups: Sequence[Group], gamma: float = 1.0) -> Table:
    """The table of the page: accuracies in per cent, with 95 % intervals or ranges beneath. gamma: of every Omega in it."""
    alike, apart = _by_run(groups)
    runs = [run for group in groups for run in group.runs]
    met = attacks_of(runs, worst=True) + attacks_of(runs)
    columns = [Column("run"), Column("clean")] + [Column(fraction(eps), attack) for attack, eps in met] + [Column(name) for name, *_ in FACTS]
    rows = []
    for group in groups:
        seeds = f"{len(group.runs)} seeds: {', '.join(str(run.seed) for run in group.runs)}" if len(group.runs) > 1 else ""
        first = group.runs[0]
        own = list(dict.fromkeys(", ".join(apart[run.name]) for run in group.runs))
        if len(own) > 1:  # seeds that were attacked in different ways
            own = [f"seed {run.seed}: {', '.join(apart[run.name])}" for run in group.runs if apart[run.name]]
        about = " · ".join(filter(None, [first.defense, first.model, first.data, seeds, *own]))
        cells = [Cell(group.name, about), _cell(group.accuracy("clean", 0.0), _percent)]
        cells += [_cell(group.accuracy(*each), _percent) for each in met]
        rows.append(cells + [_cell(group.number(of), write) for _, of, write in FACTS])
    several = any(len(group.runs) > 1 for group in groups)
    caption = "Accuracy in per cent, clean and under each attack by ε, with its 95 % interval beneath." + (
        " Rows of several seeds show the mean and, beneath, the range over seeds." if several else ""
    )
    if any(run.worst for run in runs):
        caption += " Worst case: per image over all attacks of one run, at this ε or a smaller one."
    caption += f" In all rows: {', '.join(alike)}." if alike else ""
    caption += (
        f" Ω: the mean over layers of the share of membranes that Gaussians put within ±{gamma:g} of the threshold; firing rate: spikes per neuron and "
        "step; both of the best weights on test images where they could be run, else on validation images. T: time steps."
    )
    return Table(caption, columns, rows)


def attack_table(run: Run) -> Table | None:
    """Every attack of a run, those too that met only what earlier ones had left; None where there is none of those."""
    if not run.others:
        return None
    rows = []
    for result in (*run.results, *run.others):
        interval = "" if result.low is None else f"{_percent(result.low)} – {_percent(result.high)}"
        zero = "–" if result.zero_gradient is None else _percent(result.zero_gradient)
        size, tried = "–" if result.attack == "clean" else fraction(result.eps), result.total if result.tried is None else result.tried
        rows.append([Cell(result.attack), Cell(size), Cell("–" if tried is None else f"{tried:,}"), Cell(_percent(result.accuracy), interval), Cell(zero)])
    caption = (
        "Every attack. Some met only the images that no earlier one had fooled, as many as images met says: their accuracy, in per cent of all images, is what "
        "was left after all attacks so far. ε ∞: the attack looks for a small perturbation and has no bound; it counts in no worst case."
    )
    return Table(caption, [Column(name) for name in ("attack", "ε", "images met", "accuracy", "zero gradients")], rows)


#: How a verdict is marked, so that it is seen without its colour or its word.
MARKS = {"ok": "✓ ok", "suspicious": "✗ suspicious", "not tested": "– not tested"}


def check_table(runs: Sequence[Run]) -> Table | None:
    """Verdicts: a row for each check, a column for each suite of each run; None where no run has checks."""
    columns = [(run, suite) for run in runs for suite in dict.fromkeys(check.suite for check in run.checks)]
    if not columns:
        return None
    names = list(dict.fromkeys(check.name for run in runs for check in run.checks))
    found = {(run.name, check.suite, check.name): check.verdict for run in runs for check in run.checks}
    rows = [[Cell(name), *(Cell(MARKS.get(verdict, verdict) if (verdict := found.get((run.name, suite, name))) else "") for run, suite in columns)] for name in names]
    caption = (
        "Checks of each evaluation: signs that a network withstands attacks less than its figures say. Suspicious: the figures contradict what must hold of "
        "attacks that do their work; not tested: the suite holds no attacks that could tell."
    )
    return Table(caption, [Column("check"), *(Column(suite, run.name) for run, suite in columns)], rows)


def corruption_table(run: Run) -> Table | None:
    """Accuracy by corruption and severity; None where a run has none."""
    found = run.corruptions
    if found is None:
        return None
    severities = sorted({row.severity for row in found.rows})
    cells = {(row.corruption, row.severity): Cell(_percent(row.accuracy), f"{_percent(row.interval[0])} – {_percent(row.interval[1])}") for row in found.rows}
    rows = []
    for name in dict.fromkeys(row.corruption for row in found.rows):
        mean = fmean(row.accuracy for row in found.rows if row.corruption == name)
        rows.append([Cell(name.replace("_", " ")), *(cells.get((name, severity), Cell("–")) for severity in severities), Cell(_percent(mean))])
    rows.append([Cell("mean of all"), *(Cell(_percent(_mean_at(run, severity))) for severity in severities), Cell(_percent(found.mean))])
    count = " or ".join(f"{total:,}" for total in sorted({row.total for row in found.rows}))
    caption = (
        f"Accuracy in per cent under common corruptions by severity, with its 95 % interval beneath, on {count} images: "
        + ("corrupted test images, of the kinds and severities of CIFAR-C." if found.source == "generated" else f"the files of {found.source}.")
    )
    return Table(caption, [Column("corruption"), *(Column(str(severity), "severity") for severity in severities), Column("mean")], rows)


def _mean_at(run: Run, severity: int) -> float:
    return fmean(row.accuracy for row in run.corruptions.rows if row.severity == severity)


def activity_table(run: Run) -> Table | None:
    """What spiking layers do on clean and attacked images; None where that is not known."""
    found = run.activity
    if found is None:
        return None

    def cells(one: dict) -> list[Cell]:
        return [Cell(f"{one['per_neuron']:.3f}"), *(Cell(_percent(one[name])) for name in ("rate", "active", "silent"))]

    kinds = {"clean": found.clean, **({f"under {found.attack}": found.attacked} if found.attack else {})}
    columns = [Column("layer"), Column("neurons")]
    columns += [Column(name, kind) for kind in kinds for name in ("spikes per neuron", "firing rate", "active", "silent")]
    rows = []
    for k, layer in enumerate(found.clean):
        own = [cell for layers in kinds.values() for cell in cells(layers[k].to_dict())]
        moved = [Cell(f"{found.distance[k].distance:.2f}"), Cell(_percent(found.distance[k].relative))] if found.attack else []
        rows.append([Cell(layer.name), Cell(f"{layer.neurons:,}"), *own, *moved])
    whole = [cell for layers in kinds.values() for cell in cells(totals(list(layers)))]
    rows.append([Cell("all"), Cell(f"{sum(layer.neurons for layer in found.clean):,}"), *whole, *[Cell("–")] * (2 * bool(found.attack))])
    caption = (
        f"Activity of the spiking layers on {found.images:,} test images: spikes per neuron and image; in per cent, the firing rate (spikes per neuron and step), "
        "neurons active (with a spike or more for an image) and silent (with none for any of the images)."
    )
    if found.attack:
        columns += [Column("‖S − S̃‖₂", "distance"), Column("of ‖S‖₂, per cent", "distance")]
        caption += " Distance: of the attacked images' spikes S̃ from the clean ones' S, the mean over images."
    return Table(caption, columns, rows)


def rows_of(groups: Sequence[Group], gamma: float = 1.0) -> list[dict]:
    """The same as JSON, with every digit, and each single run."""

    def number(value: Number | None) -> dict | None:
        return None if value is None else {key: entry for key, entry in asdict(value).items() if entry not in (None, "")}

    names = {"Ω": "omega", "firing rate": "rate", "T": "steps", "time": "seconds"}
    found = []

    def facts(of_each: Callable) -> dict:
        return {names.get(name, name): of_each(of) for name, of, _ in FACTS}

    for group in groups:
        met = attacks_of(group.runs)
        found.append(
            {
                "name": group.name,
                "defense": group.runs[0].defense,
                "model": group.runs[0].model,
                "data": group.runs[0].data,
                "clean": number(group.accuracy("clean", 0.0)),
                "attacks": [{"attack": attack, "eps": eps, "accuracy": number(group.accuracy(attack, eps))} for attack, eps in met],
                "worst": [{"attack": attack, "eps": eps, "accuracy": number(group.accuracy(attack, eps))} for attack, eps in attacks_of(group.runs, worst=True)],
                **facts(lambda of: number(group.number(of))),
                "gamma": gamma,
                "runs": [
                    {
                        "name": run.name,
                        "seed": run.seed,
                        "results": [_result(result) for result in run.results],
                        "worst": [_result(result) for result in run.worst],
                        "checks": [asdict(check) for check in run.checks],
                        **({"corruptions": asdict(run.corruptions)} if run.corruptions else {}),
                        **({"activity": run.activity.to_dict()} if run.activity else {}),
                        **facts(lambda of: of(run)),
                    }
                    for run in group.runs
                ],
            }
        )
    return found


def _result(result: Result) -> dict:
    return {key: value for key, value in asdict(result).items() if value is not None}


def text_table(rows: Sequence[dict]) -> str:
    """Every run of `rows_of` as a line of text: accuracies in per cent with their 95 % intervals, Omega, firing rate and epochs.

    Lines beneath say how the runs were attacked, those in which they differ run by run.
    """
    runs = [run for row in rows for run in row["runs"]]
    named = lambda result: "clean" if result["attack"] == "clean" else f"{result['attack']} {fraction(result['eps'])}"  # noqa: E731
    worst = sorted((result for run in runs for result in run["worst"]), key=lambda result: (result["attack"], result["eps"]))
    columns = list(dict.fromkeys(["clean", *map(named, worst), *(named(result) for run in runs for result in run["results"])]))
    lines = [["", *columns, "Omega", "firing rate", "epochs"]]
    for run in runs:
        found = {named(result): result for result in (*run["results"], *run["worst"])}
        cells = []
        for column in columns:
            result = found.get(column)
            interval = f" ({_percent(result['low'])}-{_percent(result['high'])})" if result and "low" in result else ""
            cells.append(f"{_percent(result['accuracy'])}{interval}" if result else "-")
        facts = [run["omega"], run["rate"], run["epochs"]]
        lines.append([run["name"], *cells, *("-" if value is None else write.format(value) for value, write in zip(facts, ("{:.3f}", "{:.3f}", "{}")))])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]).rstrip() for line in lines]
    alike, apart = shared_conditions([[Result(**result) for result in run["results"]] for run in runs])
    window = {f"Omega within +-{row['gamma']:g} of the threshold": None for row in rows}
    text += ["", "; ".join([*alike, *window]).replace("ε", "*eps")]
    text += [f"{run['name']}: {'; '.join(texts)}".replace("ε", "*eps") for run, texts in zip(runs, apart) if texts]
    return "\n".join(text)
