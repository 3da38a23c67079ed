"""Common corruptions: accuracy on CIFAR-C's files, and on corruptions generated from any images.

    sets = corruptions.from_folder("CIFAR-10-C")                     # or corruptions.generated(x, y, seed=0)
    rows = corruptions.evaluate(model, sets)
    print(corruptions.table(rows))

`corruptions.sets` gives the same to `evaluation.evaluate`, beside its attacks: resumable, and dealt to processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from ..evaluation import accuracy, wilson
from .files import from_folder, read
from .generate import CORRUPTIONS, GENERATED, corrupt, generated
from .sets import GENERATE, Corrupted, fingerprint, sets

__all__ = [
    *("CORRUPTIONS", "GENERATE", "GENERATED", "Corrupted", "CorruptionResult", "corrupt", "evaluate", "fingerprint", "from_folder"),
    *("generated", "mean_accuracy", "read", "sets", "table"),
]


@dataclass(frozen=True)
class CorruptionResult:
    """Accuracy under one corruption at one severity, of `total` images. interval: Wilson's, 95 %."""

    corruption: str
    severity: int
    accuracy: float
    interval: tuple[float, float]
    total: int

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return {**asdict(self), "interval": list(self.interval)}

    @staticmethod
    def from_dict(saved: dict) -> CorruptionResult:
        """What `to_dict` gave."""
        return CorruptionResult(saved["corruption"], saved["severity"], saved["accuracy"], tuple(saved["interval"]), saved["total"])


def evaluate(
    model: nn.Module,
    sets: Iterable[tuple[str, int, Tensor, Tensor]],
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> list[CorruptionResult]:
    """Accuracy on each set of corrupted images: (corruption, severity, x, y), as `from_folder` and `generated` give them.

    x: [N, C, H, W] uint8, or float with pixels in [0, 1]. y: [N] int64. Sets are taken one by one: one is in memory at a time.
    Source: Hendrycks and Dietterich, ICLR 2019.

    >>> rows = evaluate(model, from_folder("CIFAR-10-C", limit=1000))
    >>> 1 - mean_accuracy(rows)  # the mean corruption error, not divided by another model's
    """
    rows = []
    for name, severity, x, y in sets:
        share = accuracy(model, x, y, batch_size, device)
        rows.append(CorruptionResult(name, severity, share, wilson(round(share * len(y)), len(y)), len(y)))
    return rows


def mean_accuracy(rows: Iterable[CorruptionResult]) -> float:
    """The mean over corruptions of each one's mean over severities."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.corruption, []).append(row.accuracy)
    if not found:
        raise ValueError("mean_accuracy: got no row; wanted what evaluate returned.")
    return fmean(map(fmean, found.values()))


def table(rows: list[CorruptionResult]) -> str:
    """Accuracies as text: a line for each corruption, a column for each severity and the mean."""
    severities = sorted({row.severity for row in rows})
    names = list(dict.fromkeys(row.corruption for row in rows))
    width = max(map(len, (*names, "mean of all")))
    cells = {(row.corruption, row.severity): row.accuracy for row in rows}
    lines = [" ".join([" " * width, *(f"{severity:>7}" for severity in severities), "   mean"])]
    for name in names:
        found = [cells.get((name, severity)) for severity in severities]
        shown = [f"{value:7.2%}" if value is not None else " " * 7 for value in found]
        lines.append(" ".join([name.ljust(width), *shown, f"{fmean(value for value in found if value is not None):7.2%}"]))
    lines.append(" ".join(["mean of all".ljust(width), " " * (8 * len(severities) - 1), f"{mean_accuracy(rows):7.2%}"]))
    return "\n".join(lines)
