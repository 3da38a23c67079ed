"""Run folders as the report reads them, and what it misses in them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .. import checkpoints
from ..activity import LayerActivity, LayerDistance
from ..adjoints import nearest
from ..attacks import parse_eps
from ..corruptions import CorruptionResult
from ..evaluation import size_text
from ..pictures import Curve

__all__ = ["Activity", "Corruptions", "Result", "Run", "read", "read_all"]

#: Settings in which the runs of a group may differ: none of them changes what is computed, but for the seed.
FREE = ("seed", "out", "device", "tensorboard", "checkpoint_every", "log_every")
#: What a line of the log says besides the terms of the loss.
PLAIN = ("kind", "epoch", "step", "loss", "accuracy", "lr", "images_per_second", "seconds", "rate", "layers")


@dataclass(frozen=True)
class Result:
    """Accuracy under one attack: a share, with the ends of its 95 % interval, over `total` images.

    weights: `best` or `last`. step: the attack's step size, as a multiple of eps over its steps (`2.5ε/7`) or in pixels.
    eot: gradients averaged at each step. tried: how many of the images it attacked, where earlier attacks' successes were left out.
    """

    attack: str
    eps: float
    accuracy: float
    low: float | None = None
    high: float | None = None
    total: int | None = None
    zero_gradient: float | None = None
    weights: str | None = None
    step: str | None = None
    eot: int | None = None
    tried: int | None = None


@dataclass(frozen=True)
class Check:
    """One check of an evaluation. suite: whose; verdict: "ok", "suspicious" or "not tested"; text: why."""

    suite: str
    name: str
    verdict: str
    text: str


@dataclass(frozen=True)
class Member:
    """One member of an ensemble: the share of all images that are right after it and those before it, and after it alone, where that is known."""

    standing: float
    alone: float | None


@dataclass(frozen=True)
class Corruptions:
    """Accuracy under common corruptions. source: the name of CIFAR-C's folder, or "generated"; mean: over corruptions of each one's mean."""

    source: str
    mean: float
    rows: Sequence[CorruptionResult]


@dataclass(frozen=True)
class Activity:
    """What spiking layers do on some images, clean and, where that is known, under an attack; distance: how far it moves their spikes."""

    images: int
    clean: Sequence[LayerActivity]
    attack: str = ""
    attacked: Sequence[LayerActivity] = ()
    distance: Sequence[LayerDistance] = ()

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Found:
    """What one attacks-*.json holds.

    results: attacks that met every image, and clean ones. others: attacks that met only images that earlier ones had not fooled, or that
    keep to no size. worst: per image over all attacks of one norm and at most one size. members: by (attack, eps), in order. steps:
    attack -> (steps, accuracy, low, high). corruptions, activity: None where there are none.
    """

    results: Sequence[Result] = ()
    others: Sequence[Result] = ()
    worst: Sequence[Result] = ()
    checks: Sequence[Check] = ()
    members: dict[tuple[str, float], dict[str, Member]] = field(default_factory=dict)
    steps: dict[str, Sequence[tuple]] = field(default_factory=dict)
    corruptions: Corruptions | None = None
    activity: Activity | None = None


@dataclass(frozen=True)
class Run:
    """One run folder: run.json, the lines of log.jsonl, and the results in attacks-*.json.

    name: short, and unlike that of every other run of the report. missing: sentences that say what the folder lacks or
    what in it cannot be read, each with the command that makes it. warnings: of the attacks, in words. others, worst, checks,
    members, by_steps: as in `Found`, of all files. corruptions, activity: of the file that says most of them.
    """

    path: Path
    name: str
    document: dict
    log: Sequence[dict] = ()
    results: Sequence[Result] = ()
    missing: Sequence[str] = ()
    warnings: Sequence[str] = ()
    others: Sequence[Result] = ()
    worst: Sequence[Result] = ()
    checks: Sequence[Check] = ()
    members: dict[tuple[str, float], dict[str, Member]] = field(default_factory=dict)
    by_steps: dict[str, Sequence[tuple]] = field(default_factory=dict)
    corruptions: Corruptions | None = None
    activity: Activity | None = None
    measured: dict = field(default_factory=dict)  # omega and rate as the report found them, in place of the log's

    @property
    def config(self) -> dict:
        return self.document["config"]

    @property
    def defense(self) -> str:
        return str(self.config.get("defense", ""))

    @property
    def model(self) -> str:
        return str(self.config.get("model", ""))

    @property
    def data(self) -> str:
        return str(self.document.get("data", {}).get("name") or self.config.get("data", ""))

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def gamma(self) -> float:
        """The half-width of Omega's window in training, in units of potential."""
        return float(self.config.get("gamma", 1.0))

    @property
    def chance(self) -> float | None:
        classes = self.document.get("data", {}).get("classes")
        return 1 / classes if classes else None

    def settings(self) -> dict:
        """All that decides what the run computes, but the seed: equal for runs of one group."""
        found = {key: value for key, value in self.config.items() if key not in FREE}
        found["data"] = self.document.get("data", {}).get("fingerprint") or self.config.get("data")
        return found

    def records(self, kind: str) -> list[dict]:
        """The log's lines of one kind, `epoch` or `validation`: the last of each epoch, with finite numbers only."""
        return [record for _, record in sorted({record["epoch"]: record for record in self.log if record.get("kind") == kind and "epoch" in record}.items())]

    def curve(self, label: str, kind: str, key: str) -> Curve | None:
        """One quantity of the log against the epoch, counted from 1; None where the log has no such number."""
        points = [(record["epoch"] + 1, record[key]) for record in self.records(kind) if _is_number(record.get(key))]
        return Curve(label, *map(list, zip(*points))) if points else None

    def terms(self) -> list[str]:
        """The names of the loss's terms in the log, in their order."""
        return list(dict.fromkeys(key for record in self.records("epoch") for key in record if key not in PLAIN))

    def layer_curves(self, key: str) -> list[Curve]:
        """A quantity of each spiking layer (`omega`, `mean`, `deviation`, `rate`) against the epoch."""
        points: dict[str, tuple[list, list]] = {}
        for record in self.records("validation"):
            layers = record.get("layers") or {}
            for name, value in zip(layers.get("name", ()), layers.get(key, ())):
                if _is_number(value):
                    x, y = points.setdefault(name, ([], []))
                    x.append(record["epoch"] + 1)
                    y.append(value)
        return [Curve(name, x, y) for name, (x, y) in points.items()]

    def result(self, attack: str, eps: float) -> Result | None:
        return self._results.get((attack, round(eps, 9)))

    @cached_property
    def _results(self) -> dict[tuple[str, float], Result]:
        return {(result.attack, round(result.eps, 9)): result for result in (*self.results, *self.worst)}

    def _latest(self, key: str) -> float | None:
        """Of the weights that were run, else of the validation that chose them, else the last validation's."""
        if key in self.measured:
            return self.measured[key]
        records, best = self.records("validation"), self.document.get("best") or {}
        chosen = [record for record in records if record.get("step") == best.get("step")] or records[-1:]
        return chosen[0].get(key) if chosen else None

    @property
    def omega(self) -> float | None:
        return self._latest("omega")

    @property
    def rate(self) -> float | None:
        return self._latest("rate")

    @property
    def parameters(self) -> int | None:
        return self.document.get("parameters")

    @property
    def steps(self) -> int | None:
        return self.config.get("steps")

    @property
    def epochs(self) -> int | None:
        """How many epochs the log holds."""
        records = self.records("epoch")
        return records[-1]["epoch"] + 1 if records else None

    @property
    def seconds(self) -> float | None:
        """Spent on training."""
        records = self.records("epoch")
        return self.document.get("seconds") or (records[-1].get("seconds") if records else None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_all(paths: Sequence[Path]) -> list[Run]:
    """Every run, in the order given, with short names that differ; a folder named twice counts once."""
    unique = {Path(path).resolve(): Path(path) for path in paths}
    if not unique:
        raise ValueError("report: no run is named; wanted one run folder or more: fastsnn report runs/*")
    parts = {key: key.parts for key in unique}
    depth = 1
    while depth < max(map(len, parts.values())) and len({p[-depth:] for p in parts.values()}) < len(parts):
        depth += 1
    return [read(path, "/".join(parts[key][-depth:])) for key, path in unique.items()]


def read(path: Path, name: str) -> Run:
    """One run folder. FileNotFoundError where it is none, ValueError where run.json cannot be read."""
    if not (path / checkpoints.RUN).is_file():
        raise FileNotFoundError(_no_run(path))
    document = checkpoints.read_run(path)
    missing, warnings = [], []
    log = checkpoints.read_lines(path / checkpoints.LOG)
    if "converted" in document:
        missing.append(f"{name}: the network was converted, not trained, so there are no curves over training. `fastsnn train --init {path} --out ANOTHER` fine-tunes it.")
    elif not log:
        missing.append(f"{name}: the log is empty, so there are no curves over training. `fastsnn train --resume --out {path}` goes on with the run.")
    elif document.get("finished") is False:
        on = " --max-steps 0" * bool(document.get("config", {}).get("max_steps"))
        missing.append(f"{name}: the training is not finished. `fastsnn train --resume --out {path}{on}` goes on with it.")
    for file in sorted(path.glob("attacks-*.part")):
        if "." not in file.stem:  # else what a killed process was writing
            command = f"`fastsnn attack {path} --suite {file.stem.removeprefix('attacks-').partition('+')[0]}`"
            missing.append(f"{name}: an attack was interrupted ({file.name}); {command} with the other options of then, but without --again, goes on with it.")
    files: list[Found] = []
    for file in sorted(path.glob("attacks-*.json")):
        suite = file.stem.removeprefix("attacks-")
        again = f"`fastsnn attack {path} --suite {suite} --again` makes it anew."
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            rows = found_in(found, suite)
        except (ValueError, KeyError, TypeError, AttributeError):
            missing.append(f"{name}: {file.name} cannot be read. {again}")
            continue
        if (old := _of_other_weights(path, found)) is not None:
            missing.append(f"{name}: {file.name} is of other weights than {old} holds now, and is left out. {again}")
            continue
        warnings += [f"{name}: {text}" for text in found.get("warnings", ())]
        files.append(rows)
    results = _best((row for rows in files for row in rows.results), lambda row: row.total or 0)
    if not any(row.attack != "clean" for row in results):
        missing.append(f"{name}: there are no attacks. `fastsnn attack {path} --suite quick --eps 2/255 8/255` makes them.")
    return Run(
        path, name, document, log, results, tuple(missing), tuple(dict.fromkeys(warnings)),
        others=tuple(row for rows in files for row in rows.others),
        # Of several suites the one that leaves least: each is an upper bound.
        worst=_best((row for rows in files for row in rows.worst), lambda row: (row.total or 0, -row.accuracy)),
        checks=tuple(check for rows in files for check in rows.checks),
        members={key: value for rows in files for key, value in rows.members.items()},
        by_steps={key: value for rows in files for key, value in rows.steps.items()},
        corruptions=max((rows.corruptions for rows in files if rows.corruptions), key=lambda found: len(found.rows), default=None),
        activity=max((rows.activity for rows in files if rows.activity), key=lambda found: (bool(found.attack), found.images), default=None),
    )  # fmt: skip


def _best(rows: Iterable[Result], merit: Callable[[Result], object]) -> tuple[Result, ...]:
    """One row for each attack and size: of several the one of most merit, the last of equals."""
    found: dict[tuple[str, float], Result] = {}
    for row in rows:
        before = found.get((row.attack, round(row.eps, 9)))
        if before is None or merit(row) >= merit(before):
            found[row.attack, round(row.eps, 9)] = row
    return tuple(found.values())


def _no_run(path: Path) -> str:
    """Why a path is no run folder, and which is."""
    inside = sorted(found.parent for found in path.glob(f"*/{checkpoints.RUN}")) if path.is_dir() else []
    if inside:
        return f"report: {path} is no run folder itself; it holds the runs {', '.join(found.name for found in inside)}. Name those: fastsnn report {path}/*"
    around = path if path.is_dir() else path.parent
    # Beside it and up to two folders up: where a mistyped name, or a file of a run, leads.
    near = {str(found.parent) for folder in (around, around.parent) if folder.is_dir() for found in (*folder.glob(checkpoints.RUN), *folder.glob(f"*/{checkpoints.RUN}"))}
    what = f"{path} is no run folder: it has no {checkpoints.RUN}" if path.exists() else f"{path} does not exist"
    guess = nearest(path, tuple(sorted(near))) or (f" The nearest is {min(near, key=lambda found: (len(found), found))!r}." if near else "")
    return f"report: {what}; wanted a folder that `fastsnn train` wrote.{guess}"


def found_in(document: dict, suite: str = "") -> Found:
    """What an attacks-*.json holds: what `Evaluation.to_dict` writes."""
    results, others, members = [], [], {}
    weights = document.get("weights")
    weights = Path(str(weights.get("file", ""))).stem or None if isinstance(weights, dict) else None
    for name, row in document["results"].items():
        attack = row.get("attack") or {}
        low, high = row.get("interval") or (None, None)
        eps = float(attack.get("eps", 0.0))
        label = "clean" if name == "clean" else _label(name, attack)
        of_attack = (_step(attack), attack.get("eot")) if attack else (None, None)
        apart = bool(row.get("skips")) or math.isinf(eps)
        found = Result(label, eps, float(row["accuracy"]), low, high, row.get("total"), row.get("zero_gradient"), weights, *of_attack)
        if apart:
            others.append(dataclasses.replace(found, tried=row.get("tried")))
        else:
            results.append(found)
        if row.get("members"):
            members[label, round(eps, 9)] = {key: Member(float(one["accuracy"]), one.get("alone")) for key, one in row["members"].items()}
    worst = []
    for name, row in (document.get("worst_cases") or {}).items():
        norm, _, size = name.partition(" ")
        label = "worst case" if norm == "linf" else f"worst case ({norm})"
        worst.append(Result(label, parse_eps(size), float(row["accuracy"]), *row["interval"], row.get("total"), None, weights))
    checks = [Check(suite, str(one["name"]), str(one["verdict"]), str(one.get("text", ""))) for one in document.get("checks") or ()]
    curves = (document.get("curves") or {}).get("steps") or {}
    steps = {name: [tuple(map(float, point)) for point in points] for name, points in curves.items() if points}
    return Found(results, others, worst, checks, members, steps, _corruptions(document.get("corruptions")), _activity(document))


def _corruptions(found: dict | None) -> Corruptions | None:
    return Corruptions(str(found["source"]), float(found["mean"]), [CorruptionResult.from_dict(row) for row in found["rows"]]) if found else None


def _activity(document: dict) -> Activity | None:
    found = document.get("activity")
    if not found or "clean" not in found:
        return None

    def rows(kind: type, saved: Sequence[dict]) -> list:
        return [kind(**{entry.name: row[entry.name] for entry in dataclasses.fields(kind)}) for row in saved]

    clean, attacked = rows(LayerActivity, found["clean"]["layers"]), found.get("attacked")
    if not attacked:
        return Activity(int(found["images"]), clean)
    attack = document["results"][attacked["attack"]]["attack"]
    label = f"{_label(attacked['attack'], attack)}, {size_text(float(attack['eps']))}"
    return Activity(int(found["images"]), clean, label, rows(LayerActivity, attacked["layers"]), rows(LayerDistance, attacked["distance"]))


def _step(attack: dict) -> str | None:
    """The step size of an attack in many steps: `2.5ε/7` where it is PGD's usual share of eps, else in pixels."""
    size, steps, eps = (attack.get(key) for key in ("step_size", "steps", "eps"))
    if not (_is_number(size) and _is_number(steps) and _is_number(eps)):
        return None
    return f"2.5ε/{steps}" if math.isclose(size, 2.5 * eps / steps, rel_tol=1e-9) else size_text(size)


#: Parts of attacks' names that are no abbreviations, or more than one.
WRITTEN = {
    "autoattack": "AutoAttack", "ensemble": "ensemble", "gaussian": "Gaussian", "mifgsm": "MI-FGSM", "mtpgd": "MT-PGD", "rays": "RayS", "square": "square",
    "tapgd": "T-APGD", "uniform": "uniform",
}  # fmt: skip


def _written(part: str) -> str:
    """`pgd7` as `PGD-7`."""
    letters, digits = re.fullmatch(r"(.*?)(\d*)", part).groups()
    return "-".join(filter(None, [WRITTEN.get(letters, letters.upper()), digits]))


def _label(name: str, attack: dict) -> str:
    """`pgd7-8/255` as `PGD-7`; an attack in another norm than the maximum says so."""
    first = name.removesuffix(f"-{size_text(float(attack.get('eps', 0.0)))}")
    # What follows "transfer" is the name of a run.
    label = f"transfer from {first.removeprefix('transfer-')}" if first.startswith("transfer-") else "-".join(map(_written, first.split("-")))
    norm = attack.get("norm", "linf")
    return label if norm == "linf" else f"{label} ({norm})"


def _of_other_weights(path: Path, document: dict) -> str | None:
    """The file whose weights were attacked, where it has changed since."""
    weights = document.get("settings", {}).get("weights")
    if not isinstance(weights, dict) or "file" not in weights or "fingerprint" not in weights:
        return None
    file = path / Path(str(weights["file"])).name
    try:
        return file.name if file.is_file() and checkpoints.fingerprint(file) != weights["fingerprint"] else None
    except ImportError:  # of what reads checkpoints: the weights cannot be compared
        return None
    except (ValueError, OSError):  # no longer a checkpoint
        return file.name
