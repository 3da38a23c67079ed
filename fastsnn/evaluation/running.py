"""Attacks on many images, in whole batches: dealt to processes, resumed, judged, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import distributed
from ..attacks import Attack
from ..runs import seed_of
from . import checks
from .forward import check, fetch, right_answers
from .progress import Progress, work
from .results import Check, Evaluation, Result, all_right, size_text, threats, wilson, within
from .spikes import activity_of
from .store import Part, Store, key_of
from .suites import Suite

if TYPE_CHECKING:
    from ..corruptions import Corrupted, CorruptionResult

__all__ = ["describe", "evaluate", "measure"]


@dataclass(frozen=True)
class Row:
    """One attack to run. skips: leave out samples that are fooled already. places: the samples, None: all. corrupted: images in place of the evaluation's."""

    name: str
    attack: Attack | None
    skips: bool = False
    places: tuple[int, ...] | None = None
    corrupted: Corrupted | None = None


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    batch_size: int = 256,
    device: str | torch.device | None = None,
    progress: bool | str = False,
    resume: str | Path | None = None,
    skips: Collection[str] = (),
    predictions: int = 1,
    check_images: int = 0,
    seed: int = 0,
    shard: bool = False,
    corruptions: Sequence[Corrupted] = (),
) -> Evaluation:
    """Accuracy on clean images and under each attack, sample by sample.

    model: any module from images to logits. x, y, batch_size, device: as in `accuracy`. attacks: by the name to report;
    `make_suite` makes usual ones. Every sample is attacked, those that are classified wrong anyway too, as the papers do.
    skips: names of attacks (besides those that a suite names) of which only the worst case over all attacks counts: they leave
    out samples that earlier rows have fooled within their ball; see `Result.skips`.
    progress: show a bar with the time left; "lines": a line for each row. resume: a file that is written on the way; a later
    call with the same model, images and attacks goes on from it, whatever its batch size, and leaves it complete; a ResumeError
    where the file does not fit.
    predictions: forward passes whose mean logits decide, for models that are random at inference. check_images: on so many images
    the checks run attacks of their own (`checks.CHECKS` says which), and the activity of spiking layers is measured on them, by every
    process for itself; 0: the checks that need no attack are made alone.
    seed: of a random model's own numbers where it is judged. shard: deal batches to the processes that torchrun started; each
    of them must call, and gets all results. corruptions: what `corruptions.sets` gives: each corruption at each severity is a row
    of its own, after the attacks, dealt to processes and resumed batch by batch as they are; none counts in the worst case.

    Batches have fixed boundaries, each attack's random numbers belong to the sample (those of a random model to its batch), and
    a batch counts whole or not at all: neither an interruption nor the number of processes changes a result, and batch_size
    none but by the rounding of the model itself and the numbers of random models. Perturbations are measured on the final
    images; a RuntimeError where one is larger than its attack allows or leaves [0, 1].

    >>> result = evaluate(model, x, y, make_suite("quick", ["8/255"]))
    >>> result.results["pgd7-8/255"].accuracy
    """
    check("evaluate", x, y, batch_size)
    for what, value, least in (("predictions", predictions, 1), ("check_images", check_images, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"evaluate: {what} is {value!r}; wanted an int >= {least}.")
    suite = attacks if isinstance(attacks, Suite) else Suite(attacks)
    skips = {*suite.skips, *skips}
    for name, attack in {**suite, **suite.curve}.items():
        _check_attack(name, attack)
    for name in skips:
        if name not in suite:
            raise ValueError(f"evaluate: skips names {name!r}, which is no attack here; wanted names of {', '.join(suite) or 'none'}.")
    for one in corruptions:
        _check_corrupted(one)
    if device is not None:
        model.to(device)
    described = {name: describe(attack) for name, attack in {**suite, **suite.curve}.items()}
    rank, ranks, _ = distributed.world() if shard and distributed.ranks() > 1 else (0, 1, 0)
    settings = {"attacks": described, "order": list(described), "skips": sorted(skips), "predictions": predictions, "checks": check_images, "seed": seed}
    if corruptions:
        settings["corruptions"] = [[one.corruption, one.severity, one.key] for one in corruptions]
    store = Store(resume, lambda: key_of(model, x, y, settings), len(x), rank, ranks)
    run = _Run(model, x, y, batch_size, device, store, predictions, seed, Progress(progress if rank == 0 else False))
    run.norms = {name: (attack.norm, attack.radius) for name, attack in suite.items()}
    rows = [Row("clean", None), *(Row(name, attack, name in skips) for name, attack in suite.items())]
    rows += [Row(name, attack) for name, attack in suite.curve.items()]
    changed = [Row(f"{one.corruption} severity {one.severity}", None, corrupted=one) for one in corruptions]
    try:
        run.plan([*rows, *changed])
        for row in [*rows, *changed]:
            run.fill(row)
        results = {row.name: run.result(row, described.get(row.name)) for row in rows if row.name not in suite.curve}
        probes = checks.probes(suite, results, len(x), x[0].numel(), check_images)
        extra = {name: Row(f"check {name}", attack, False, tuple(places)) for name, (attack, places) in probes.items()}
        run.plan(extra.values())
        outcomes = {}
        for name, row in extra.items():
            run.fill(row)
            correct = store.part(row.name).correct
            outcomes[name] = {place: bool(correct[place]) for place in row.places}
        store.finish()
    finally:
        store.write(now=True)  # what was found so far, where it ends early
        run.bar.close()
    points = {name: run.result(Row(name, attack), described[name]) for name, attack in suite.curve.items()}
    found = checks.verdicts(model, fetch(model, x, slice(0, batch_size), device), suite, results, outcomes, check_images, seed)
    corrupted = [run.corrupted(row) for row in changed]
    return Evaluation(results, _warnings(found), found, _curves(results, points), corrupted, activity_of(model, x, y, suite, results, check_images, device, seed))


def _check_attack(name: str, attack: object) -> None:
    if not isinstance(attack, Attack):
        raise TypeError(f"evaluate: attack {name!r} is a {type(attack).__name__}; wanted an instance from fastsnn.attacks.")
    if attack.targeted:
        raise ValueError(f"evaluate: attack {name!r} is targeted, but labels here are the true ones; wanted targeted=False.")
    if name == "clean":
        raise ValueError("evaluate: 'clean' is the row without an attack; wanted another name for the attack.")


def _check_corrupted(one: object) -> None:
    from ..corruptions import Corrupted

    if not isinstance(one, Corrupted):
        raise TypeError(f"evaluate: corruptions holds a {type(one).__name__}; wanted what fastsnn.corruptions.sets returned.")


def describe(attack: Attack) -> dict:
    """An attack's name and options, as JSON can hold them; `bounded` false where eps is no bound."""
    options = {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in attack.options().items()}
    return {"name": attack.name, **options} | ({} if attack.bounded else {"bounded": False})


class _Run:
    """What all rows of an evaluation share."""

    def __init__(self, model, x, y, batch_size, device, store, predictions, seed, bar) -> None:
        self.model, self.x, self.y, self.batch_size, self.device = model, x, y, batch_size, device
        self.store, self.predictions, self.seed, self.bar = store, predictions, seed, bar
        self.norms: dict[str, tuple[str, float]] = {}
        self.before: list[str] = []  # rows that are done, in order

    def plan(self, rows: Iterable[Row]) -> None:
        self.bar.plan(sum(work(row.attack) * self._most(row) for row in rows))

    def _most(self, row: Row) -> int:
        return len(row.places) if row.places is not None else len(self._labels(row))

    def _labels(self, row: Row) -> Tensor:
        return self.y if row.corrupted is None else row.corrupted.labels

    def fill(self, row: Row) -> None:
        """Attack what the store does not hold yet, batch by batch; then every process knows all of it."""
        wanted, part = self._candidates(row), self.store.part(row.name, len(self._labels(row)))
        pending = []
        for places in wanted.split(self.batch_size):  # boundaries do not depend on what is done
            places = places[~part.known()[places]]
            if len(places):
                pending.append(places)
        cost = work(row.attack)
        self.bar.begin(row.name, cost * self._most(row), cost * len(wanted), cost * (len(wanted) - sum(map(len, pending))))
        for places in pending[self.store.rank :: self.store.ranks]:
            self._attack(row, places)
            self.bar.advance(cost * len(places) * self.store.ranks)
        self.store.share(row.name)
        correct = self.store.part(row.name).correct
        self.bar.end(row.name, int((correct == 1).sum()) / self._most(row) if self._most(row) else 1.0)
        self.before.append(row.name)

    def _candidates(self, row: Row) -> Tensor:
        """The samples that a row attacks, in order."""
        if row.places is not None:
            return torch.tensor(row.places, dtype=torch.int64)
        if not row.skips:
            return torch.arange(self._most(row))
        norm, radius = self.norms[row.name]
        standing = self.store.part("clean").correct == 1
        for name in self.before:
            if name in self.norms and self.norms[name][0] == norm and self.norms[name][1] <= radius:
                standing &= self.store.part(name).correct == 1
        return standing.nonzero()[:, 0]

    def _attack(self, row: Row, places: Tensor) -> None:
        began = time.perf_counter()
        if row.corrupted is None:
            images = fetch(self.model, self.x, places, self.device)
        else:
            images = fetch(self.model, row.corrupted.take(places), slice(None), self.device)
        labels, indices = self._labels(row)[places].to(images.device), places.to(images.device)
        attack = row.attack
        found = images if attack is None else attack(self.model, images, labels, indices)
        right = right_answers(self.model, found, labels, self.predictions, seed_of(self.seed, row.name, int(places[0])))
        if attack is None:
            self.store.add(row.name, places, right, None, None, 0.0, time.perf_counter() - began)
            return
        largest = measure(row.name, attack, found, images)
        fooled = getattr(attack, "fooled", None)
        members = None if fooled is None else (list(attack.members), fooled)
        self.store.add(row.name, places, right, attack.zero_gradient if attack.access == "gradient" else None, members, largest, time.perf_counter() - began)

    def corrupted(self, row: Row) -> CorruptionResult:
        """The row of a corruption as it is reported."""
        from ..corruptions import CorruptionResult

        right, total = int((self.store.part(row.name).correct == 1).sum()), self._most(row)
        return CorruptionResult(row.corrupted.corruption, row.corrupted.severity, right / total, wilson(right, total), total)

    def result(self, row: Row, described: dict | None) -> Result:
        """The row as it is reported."""
        part = self.store.part(row.name)
        tried = part.known()
        zero = part.zero[part.zero >= 0]
        count = int(tried.sum())
        return Result(
            tuple((part.correct == 1).tolist()),
            described,
            float((zero == 1).double().mean()) if len(zero) else None,
            part.largest,
            part.seconds,
            row.skips,
            None if row.attack is None else count,
            _members(part, tried) if part.members else None,
        )


def _members(part: Part, tried: Tensor) -> dict[str, dict]:
    """For each member in order: samples tried and fooled, and the share of all samples right after it and alone."""
    found, standing, count = {}, tried.clone(), len(tried)
    for name, flags in part.members.items():
        standing &= flags != 1
        asked = flags >= 0
        alone = bool(asked.all())
        found[name] = {
            "tried": int(asked.sum()),
            "fooled": int((flags == 1).sum()),
            "accuracy": int(standing.sum()) / count,
            "alone": int((flags == 0).sum()) / count if alone else None,
        }
    return found


def measure(name: str, attack: Attack, found: Tensor, images: Tensor) -> float:
    """The largest perturbation of a batch, after checking it against what the attack allows."""
    moved = (found.double() - images.double()).flatten(1)
    size, radius = moved.abs().amax(1) if attack.norm == "linf" else moved.norm(dim=1), attack.radius
    if attack.norm == "linf":  # the ball of `Attack`: its bounds in the images' arithmetic
        inside = ((found >= images - radius) & (found <= images + radius)).all()
    else:  # a norm is a long sum, whose order is not the attack's own
        inside = (size <= radius * (1 + 1e-12)).all()
    largest, low, high, inside = torch.stack([size.max(), found.min().double(), found.max().double(), inside.double()]).tolist()
    if not (inside and attack.low <= low and high <= attack.high):
        raise RuntimeError(
            f"evaluate: attack {name!r} moved an image by {largest!r} into [{low:g}, {high:g}]; it promised {attack.eps!r} within "
            f"[{attack.low:g}, {attack.high:g}]. This is a defect of the attack: do not use its figures."
        )
    return largest


def _warnings(found: list[Check]) -> list[str]:
    return [check.text for check in found if check.verdict == "suspicious"]


def _curves(results: Mapping[str, Result], points: Mapping[str, Result]) -> dict[str, dict[str, list]]:
    """Accuracy against eps of the attacks that tried every sample and of the worst case, and against steps of the rows made for it."""

    def point(x: float, correct: tuple[bool, ...]) -> list:
        return [x, sum(correct) / len(correct), *wilson(sum(correct), len(correct))]

    clean, sizes = results["clean"].correct, {}
    for name, result in results.items():
        if result.attack is None or result.skips or math.isinf(float(result.attack["eps"])):
            continue  # what skips samples has no accuracy of its own
        eps = float(result.attack["eps"])
        label = name.removesuffix(f"-{size_text(eps)}")
        sizes.setdefault(label, {0.0: clean})[eps] = result.correct
    for norm, eps in threats(results):
        sizes.setdefault("worst" if norm == "linf" else f"worst ({norm})", {0.0: clean})[eps] = all_right(within(results, norm, eps))
    steps: dict[str, list] = {}
    for result in points.values():
        steps.setdefault(f"{result.attack['name']}-{size_text(float(result.attack['eps']))}", []).append(point(result.attack["steps"], result.correct))
    return {"eps": {label: [point(eps, correct) for eps, correct in sorted(found.items())] for label, found in sizes.items()}, "steps": steps}
