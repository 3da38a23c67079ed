"""The fine-tuning of robust conversion: a converted network learns to answer alike around its images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adjoints import nearest
from ..attacks import RFGSM
from ..attacks.checks import amount
from ..neurons import Neuron
from .base import Defense, Run, wide
from .crafting import DIRECTIONS, accuracy, answers, divergence, raising, share, single

__all__ = ["RobustTuning"]


class RobustTuning(Defense):
    """Robust fine-tuning of a converted network: `CE(f(x), y) + beta * mean KL(f(x~) || f(x))`, x~ found by RFGSM on that divergence.

    beta: 2 for CIFAR-10, 4 otherwise. eps: of RFGSM, in pixels. alpha_share: its random step, as a share of eps: 0.5 (CIFAR-10, SVHN), 0.2
        (CIFAR-100, Tiny-ImageNet), 0.25 (after adversarial training at 4/255 or 8/255).
    direction: "adversarial-clean", KL(f(x~) || f(x)) as the paper prints it, or "clean-adversarial", KL(f(x) || f(x~)) as in its public code.
    least: learned thresholds are at least this after each step, in units of potential.
    eot: gradients averaged, for models that are random at inference. seed: of the random step; None takes torch's generator.

    RFGSM meets the model in eval mode, and its answers on clean images as constants; the loss differentiates both. Both
    training forwards run in train mode, each normalised by its own batch: first the adversarial one, whose statistics other
    defenses see, then the clean one. The readout counts: divergences of summed and of averaged steps differ by the temperature T.
    Label smoothing is of the cross-entropy. Reports "kl", unweighted, "clean_accuracy" and "least_threshold".
    Source: Adversarially Robust Spiking Neural Networks Through Conversion, TMLR 2024, robust fine-tuning.

    >>> loss = RobustTuning(beta=2, eps=2 / 255).loss(model, images, labels)
    """

    name = "robust-tuning"
    crafts = True

    def __init__(
        self,
        beta: float = 2.0,
        eps: float | str = 2 / 255,
        alpha_share: float = 0.5,
        direction: str = "adversarial-clean",
        least: float = 0.03,
        eot: int = 1,
        seed: int | None = None,
    ) -> None:
        if direction not in DIRECTIONS:
            raise ValueError(f"RobustTuning: direction {direction!r} is unknown; wanted one of {', '.join(DIRECTIONS)}.{nearest(direction, DIRECTIONS)}")
        self.beta, self.least = amount("RobustTuning", "beta", beta), amount("RobustTuning", "least", least)
        self.alpha_share, self.direction = share("RobustTuning", "alpha_share", alpha_share), direction
        self.eps = RFGSM(eps, eot=eot, seed=seed).eps
        self.eot, self.seed = eot, seed

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        loss = raising(answers(model, images, self.eot), self.direction)
        attack = single(RFGSM(self.eps, alpha=self.alpha_share * self.eps, loss=loss, eot=self.eot, seed=self.seed))
        return attack(model, images, labels)

    def objective(self, run: Run) -> Tensor:
        clean = run.forward(run.clean)
        apart = divergence(clean, run.logits, self.direction).mean()
        run.notes["kl"], run.notes["clean_accuracy"] = apart, accuracy(clean, run.labels)
        return F.cross_entropy(wide(clean), run.labels, label_smoothing=run.smoothing) + self.beta * apart

    def report(self, run: Run) -> dict[str, Tensor]:
        found = {name: run.notes[name] for name in ("kl", "clean_accuracy")}
        thresholds = learned_thresholds(run.model)
        return found | ({"least_threshold": torch.stack([value.detach().min() for value in thresholds]).min()} if thresholds else {})

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for threshold in learned_thresholds(model):
            threshold.clamp_(min=self.least)


def learned_thresholds(model: nn.Module) -> list[nn.Parameter]:
    """The thresholds of spiking layers that are parameters."""
    return [layer.threshold for layer in model.modules() if isinstance(layer, Neuron) and isinstance(layer.threshold, nn.Parameter)]
