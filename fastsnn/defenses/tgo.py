"""TGO: membranes held away from the threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adjoints import nearest
from .base import Defense, Run

__all__ = ["TGO"]

SCHEDULES = ("cosine", "constant")


class TGO(Defense):
    """Threshold-guarding optimisation: `loss + lambda * sum over l of C_l`, `C_l = mean over steps and neurons of max(0, delta - |z|)^power`.

    z = h - threshold, the membrane of spiking layer l before its reset. weight: the largest lambda; 0.4 (WRN-16), 0.6 (VGG-11).
    delta: how near to the threshold a membrane is pushed away, in units of potential; a reading, since no value is published: 0.1,
    0.25 and 0.5 are usual. power: 2, a reading, or 1. schedule: "cosine", lambda rises as `weight/2*(1 - cos(pi*progress))`, a
    reading of "from small to large by cosine"; or "constant". ValueErrors for values outside of these.

    Its network has neurons that fire by chance: neuron "noisy" with options sigma=0.4, or variance=0.4, both readings of the paper's
    noise, and inference="plain" for a network that is noisy in training only. Any other spiking network can be guarded as well.

    Reports "guard", the mean over layers of C_l, without lambda. The share of membranes within delta is C_l with power 0, which has no
    gradient: `forward_with_statistics(model, images, ("guard",), (delta, 0))`.
    Source: Robust Spiking Neural Networks Against Adversarial Attacks, ICLR 2026.

    >>> loss = TGO(weight=0.4, delta=0.25).loss(model, images, labels)
    """

    name = "tgo"
    statistics = ("guard",)

    def __init__(self, weight: float = 0.4, delta: float = 0.25, power: int = 2, schedule: str = "cosine") -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"TGO: weight is {weight}; wanted a finite number >= 0, such as 0.4.")
        if not 0 < delta < math.inf:
            raise ValueError(f"TGO: delta is {delta}; wanted a finite number > 0, in units of potential, such as 0.25.")
        if isinstance(power, bool) or power not in (1, 2):
            raise ValueError(f"TGO: power is {power!r}; wanted 1 or 2. Power 0 counts membranes, and has no gradient.")
        if schedule not in SCHEDULES:
            raise ValueError(f"TGO: schedule {schedule!r} is unknown; wanted one of {', '.join(SCHEDULES)}.{nearest(schedule, SCHEDULES)}")
        self.weight, self.delta, self.power, self.schedule = float(weight), float(delta), int(power), schedule
        self.guard = (self.delta, self.power)

    def strength(self, progress: float) -> float:
        """lambda at a progress of the training in [0, 1]."""
        return self.weight if self.schedule == "constant" else self.weight / 2 * (1 - math.cos(math.pi * progress))

    def penalty(self, run: Run) -> dict[str, Tensor]:
        if not run.statistics:
            raise ValueError("TGO: the model has no spiking layer; wanted one that fires, such as fastsnn.NoisyLIF. Leave the defense out for its ANN twin.")
        # Each process sees as many images: the mean over all of them is the mean of the means, which averaged gradients are those of.
        layers = torch.stack([entry.guard.mean() for entry in run.statistics])
        run.notes["guard"] = layers.detach().mean()
        return {self.name: self.strength(run.progress) * layers.sum()}

    def report(self, run: Run) -> dict[str, Tensor]:
        return {"guard": run.notes["guard"]}
