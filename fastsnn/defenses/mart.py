"""MART: adversarial training that weighs images by how well their clean versions are classified."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.checks import amount
from .base import Defense, Run, wide
from .crafting import Ball, accuracy, divergence

__all__ = ["MART", "boosted"]


def boosted(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """MART's boosted cross-entropy, `-log p_y - log(1.0001 - max over k != y of p_k + 1e-12)`, p the softmax: [N].

    logits: [N, classes] float; labels: [N] int64. smoothing: of the labels in the first term.
    """
    logits = wide(logits)
    rival = logits.softmax(1).scatter(1, labels[:, None], 0.0).amax(1)
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing) - (1.0001 - rival + 1e-12).log()


class MART(Defense):
    """Misclassification-aware adversarial training: with p = softmax f(x), p~ = softmax f(x~), x~ found by PGD on the cross-entropy,

        mean of [-log p~_y - log(1.0001 - max over k != y of p~_k + 1e-12) + weight * KL(p || p~) * (1.0000001 - p_y)]

    weight: 4 as in robust conversion. eps, step_size: of PGD, in pixels; step_size None: 2.5*eps/steps. steps: of PGD.
    start: "normal" (x + 0.001*N(0, 1), as published) or "uniform" (x + U(-eps, eps)). warmup: the share of the training in
    which eps and step_size rise linearly from 0. eot: gradients averaged, for models that are random at inference.
    seed: of the start; None takes torch's generator.

    PGD meets the model in eval mode. Both training forwards run in train mode, each normalised by its own batch: first the adversarial
    one, whose statistics other defenses see, then the clean one; the loss differentiates both. Reports "kl", unweighted, and
    "clean_accuracy". Source: Wang et al., ICLR 2020, algorithm 1; these radii and steps are those of robust conversion.

    >>> loss = MART(weight=4, eps=2 / 255).loss(model, images, labels)
    """

    name = "mart"
    crafts = True

    def __init__(
        self,
        weight: float = 4.0,
        eps: float | str = 2 / 255,
        steps: int = 10,
        step_size: float | str | None = None,
        start: str = "normal",
        warmup: float = 0.0,
        eot: int = 1,
        seed: int | None = None,
    ) -> None:
        self.weight = amount("MART", "weight", weight)
        self.ball = Ball("MART", eps, steps, step_size, start, warmup, eot, seed)
        self.eps, self.steps, self.step_size, self.start = self.ball.eps, steps, self.ball.step_size, start
        self.warmup, self.eot, self.seed = self.ball.warmup, eot, seed

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        return self.ball.attack(progress)(model, images, labels)

    def objective(self, run: Run) -> Tensor:
        clean = run.forward(run.clean)
        apart = divergence(clean, run.logits)
        right = wide(clean).softmax(1).gather(1, run.labels[:, None])[:, 0]
        run.notes["kl"], run.notes["clean_accuracy"] = apart.mean(), accuracy(clean, run.labels)
        return (boosted(run.logits, run.labels, run.smoothing) + self.weight * apart * (1.0000001 - right)).mean()

    def report(self, run: Run) -> dict[str, Tensor]:
        return {name: run.notes[name] for name in ("kl", "clean_accuracy")}
