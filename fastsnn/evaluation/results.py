"""What an evaluation returns: a result for each attack, intervals, and the per-sample worst case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..corruptions import CorruptionResult

__all__ = ["Check", "Evaluation", "Result", "flags_text", "size_text", "wilson"]

#: What the JSON says about attacks whose row has "skips" true.
SKIPPED = (
    "Rows with skips = true count in the per-sample worst case only: they attack the samples that are classified right and that no row before them "
    "has fooled at the same size or a smaller one in the same norm (tried: how many). The others count as wrong, so the accuracy of such a row is "
    "what is left after it and all rows before it."
)


def wilson(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of `correct` out of `total`, as (low, high) in [0, 1].

        (p + z^2/2n -+ z*sqrt(p*(1-p)/n + z^2/4n^2)) / (1 + z^2/n),  p = correct/n, z the normal quantile of (1 + level)/2

    Source: Wilson 1927; Newcombe 1998, method 3. A ValueError for 0 samples.

    >>> wilson(81, 263)  # 0.2553 to 0.3662
    """
    if not 0 < total or not 0 <= correct <= total:
        raise ValueError(f"wilson: got {correct} correct of {total}; wanted 0 <= correct <= total and total >= 1.")
    if not 0 < level < 1:
        raise ValueError(f"wilson: level is {level}; wanted a number between 0 and 1, such as 0.95.")
    z, p = NormalDist().inv_cdf((1 + level) / 2), correct / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the bound is 0 or 1 exactly; rounding would miss it.
    return 0.0 if correct == 0 else (middle - half) / scale, 1.0 if correct == total else (middle + half) / scale


def size_text(eps: float) -> str:
    """A size as papers write it: 8/255 where it is one, else the number."""
    if math.isinf(eps):
        return "inf"
    parts = round(eps * 255)
    return f"{parts}/255" if math.isclose(eps * 255, parts, abs_tol=1e-9) else f"{eps:g}"


def flags_text(correct: Sequence[bool]) -> str:
    """Flags as a text of 0 and 1."""
    return "".join("01"[flag] for flag in correct)


@dataclass(frozen=True)
class Result:
    """One row of an evaluation. correct: for each sample, whether the model was right. interval: Wilson's, 95 %.

    attack: its options, None for clean images. zero_gradient: the share of samples whose first gradient was zero
    everywhere, None where none was taken. largest: the largest perturbation found, in the attack's norm. seconds: spent.
    skips: whether samples that earlier rows had fooled were left out; they count as wrong. tried: how many were attacked, None: all.
    members: of an attack made of several, for each member in order: `tried` and `fooled` samples, `accuracy` (the share of all
    samples that are right after this member and those before it) and `alone` (after this one only; None unless it attacked every sample).
    """

    correct: tuple[bool, ...]
    attack: dict | None = None
    zero_gradient: float | None = None
    largest: float = 0.0
    seconds: float = 0.0
    skips: bool = False
    tried: int | None = None
    members: dict[str, dict] | None = None

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(sum(self.correct), len(self.correct))

    def to_dict(self) -> dict:
        """As JSON holds it; `correct` as a string of 0 and 1."""
        own = {**asdict(self), "correct": flags_text(self.correct), "accuracy": self.accuracy, "interval": list(self.interval), "total": len(self.correct)}
        return {key: value for key, value in own.items() if key != "members" or value is not None}


@dataclass(frozen=True)
class Check:
    """One check of an evaluation. verdict: "ok", "suspicious" or "not tested". text: why, in a sentence. figures: the numbers behind it."""

    name: str
    verdict: str
    text: str
    figures: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def all_right(results: Sequence[Result]) -> tuple[bool, ...]:
    """Per sample: whether the model was right in every one of the results."""
    return tuple(all(flags) for flags in zip(*(result.correct for result in results)))


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: a `Result` by name, "clean" first. warnings: what makes the figures doubtful, in words.

    checks: signs that there is less robustness than the figures show, each with a verdict. curves: points [x, accuracy, low, high] against
    "eps" and "steps", by attack. corruptions: accuracy under each corruption and severity, where they were asked for. activity: what
    spiking layers do on clean and attacked images, as `spikes.activity_of` says it; None without spiking layers.
    """

    results: dict[str, Result]
    warnings: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    curves: dict[str, dict[str, list]] = field(default_factory=dict)
    corruptions: list[CorruptionResult] = field(default_factory=list)
    activity: dict | None = None

    def worst(self) -> Result:
        """Per sample over all rows: right only where the model was right on the clean image and under every attack that keeps to a ball."""
        return Result(all_right([result for result in self.results.values() if not _is_endless(result)]))

    def worst_cases(self) -> dict[str, Result]:
        """Per sample, for each norm and size: right on the clean image and under every attack of that norm and at most that size.

        By name such as `linf 8/255`: what an attack of a smaller size finds lies in the larger ball as well.
        """
        found = {}
        for norm, eps in threats(self.results):
            found[f"{norm} {size_text(eps)}"] = Result(all_right(within(self.results, norm, eps)))
        return found

    def to_dict(self) -> dict:
        """As JSON holds it."""
        worst_cases = {
            name: {"accuracy": worst.accuracy, "interval": list(worst.interval), "total": len(worst.correct)} for name, worst in self.worst_cases().items()
        }
        found = {
            "results": {name: result.to_dict() for name, result in self.results.items()},
            "worst": self.worst().to_dict(),
            "worst_cases": worst_cases,
            "warnings": list(self.warnings),
            "checks": [check.to_dict() for check in self.checks],
            "curves": self.curves,
        }
        if self.corruptions:
            from ..corruptions import mean_accuracy

            found["corruptions"] = {"mean": mean_accuracy(self.corruptions), "rows": [row.to_dict() for row in self.corruptions]}
        if self.activity is not None:
            found["activity"] = self.activity
        return found | ({"skipped": SKIPPED} if any(result.skips for result in self.results.values()) else {})


def threat(attack: Mapping) -> tuple[str, float]:
    """(norm, eps) of an attack's options; eps is infinite where it bounds no perturbation."""
    return attack.get("norm", "linf"), float(attack.get("eps", math.inf)) if attack.get("bounded", True) else math.inf


def _is_endless(result: Result) -> bool:
    return result.attack is not None and math.isinf(threat(result.attack)[1])


def threats(results: Mapping[str, Result]) -> list[tuple[str, float]]:
    """Every (norm, eps) that results are of, by norm and size; not attacks without a bound."""
    found = {threat(result.attack) for result in results.values() if result.attack is not None and not _is_endless(result)}
    return sorted(found, key=lambda pair: (pair[0] != "linf", *pair))


def within(results: Mapping[str, Result], norm: str, eps: float) -> list[Result]:
    """The clean row, and those of one norm and at most one size."""
    return [result for result in results.values() if result.attack is None or (threat(result.attack)[0] == norm and threat(result.attack)[1] <= eps)]
