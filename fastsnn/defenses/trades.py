"""TRADES: accurate on clean images, and the same answers around them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.checks import amount
from .base import Defense, Run, wide
from .crafting import Ball, accuracy, answers, divergence, raising

__all__ = ["TRADES"]


class TRADES(Defense):
    """TRADES: `CE(f(x), y) + weight * mean KL(f(x) || f(x~))`, x~ found by PGD on that divergence.

    weight: lambda, 6 for CIFAR-10, 3 otherwise. eps, step_size: of PGD, in pixels; step_size None: 2.5*eps/steps. steps: of PGD.
    start: "normal" (x + 0.001*N(0, 1), as published) or "uniform" (x + U(-eps, eps)). Where a normal start changes no spike, the
    divergence is 0 and PGD's first step follows rounding errors, as for many images of a spiking network; a uniform start is free of that.
    warmup: the share of the training in which eps and step_size rise linearly from 0. eot: gradients averaged, for models that
    are random at inference. seed: of the start; None takes torch's generator.

    PGD meets the model in eval mode and its answers on clean images as constants; the loss differentiates both terms. Both
    training forwards run in train mode, each normalised by its own batch: first the adversarial one, whose statistics other
    defenses see, then the clean one. Label smoothing is of the cross-entropy. Reports "kl", unweighted, and "clean_accuracy".
    Source: Zhang et al., ICML 2019, algorithm 1; these radii and steps are those of robust conversion.

    >>> loss = TRADES(weight=6, eps=2 / 255, start="uniform").loss(model, images, labels)
    """

    name = "trades"
    crafts = True

    def __init__(
        self,
        weight: float = 6.0,
        eps: float | str = 2 / 255,
        steps: int = 10,
        step_size: float | str | None = None,
        start: str = "normal",
        warmup: float = 0.0,
        eot: int = 1,
        seed: int | None = None,
    ) -> None:
        self.weight = amount("TRADES", "weight", weight)
        self.ball = Ball("TRADES", eps, steps, step_size, start, warmup, eot, seed)
        self.eps, self.steps, self.step_size, self.start = self.ball.eps, steps, self.ball.step_size, start
        self.warmup, self.eot, self.seed = self.ball.warmup, eot, seed

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        return self.ball.attack(progress, raising(answers(model, images, self.eot)))(model, images, labels)

    def objective(self, run: Run) -> Tensor:
        clean = run.forward(run.clean)
        apart = divergence(clean, run.logits).mean()
        run.notes["kl"], run.notes["clean_accuracy"] = apart, accuracy(clean, run.labels)
        return F.cross_entropy(wide(clean), run.labels, label_smoothing=run.smoothing) + self.weight * apart

    def report(self, run: Run) -> dict[str, Tensor]:
        return {name: run.notes[name] for name in ("kl", "clean_accuracy")}
