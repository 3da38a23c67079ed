"""Auto-PGD: gradient ascent that chooses its step size itself, away from a class or towards one class after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..adjoints import nearest
from .ascent import Ascent, Walk, checkpoints, length
from .base import whole
from .losses import TARGETED_LOSSES

__all__ = ["APGD", "APGDCE", "APGDDLR", "TAPGD", "TAPGDCE", "TAPGDDLR"]


class APGD(Ascent):
    """Auto-PGD: momentum, and a step size that is halved where the loss stalls.

        u[k+1] = P(x[k] + step * sign(g[k])),  x[k+1] = P(x[k] + 0.75*(u[k+1] - x[k]) + 0.25*(x[k] - x[k-1]))

    P projects on the ball and on [0, 1]; in l2, g/||g|| takes the place of the sign. The step begins at 2*eps. At each of
    `checkpoints(steps)` it is halved for a sample whose loss grew in at most rho of the steps since the last one, or whose
    step was not halved there and whose best loss is since unchanged; such a sample goes on from its best image. [R] As in
    the authors' code, the first step counts as growth where its loss is above 0, whatever the loss of the start.

    steps, restarts, early_stop: as in `Ascent`. loss: "ce", "dlr" (three classes or more), "margin", or a function. Further
    options as in `Attack`. A sample's result is the same whatever its batch, but for the rounding of the model.
    Source: Croce and Hein, ICML 2020, algorithm 1. Equal bit for bit to `torchattacks.APGD` from the same start, with
    early_stop=False, where the model is fooled; samples that stand come back unchanged there.

    >>> adversarial = APGD(eps=8 / 255, steps=100, loss="dlr")(model, images, labels)
    """

    name = "apgd"
    norms = ("linf", "l2")
    first_step = 2.0

    def __init__(
        self, eps: float | str, steps: int = 100, loss="ce", restarts: int = 1, rho: float = 0.75, early_stop: bool = True, **options
    ) -> None:
        super().__init__(eps, steps, restarts, early_stop, loss=loss, **options)
        if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho <= 1:
            raise ValueError(f"{type(self).__name__}: rho is {rho!r}; wanted a share in [0, 1], such as 0.75.")
        self.rho = rho
        self._checkpoints = checkpoints(steps)

    def begin(self, walk: Walk) -> None:
        walk.before, walk.last_best = walk.x, walk.best_loss
        walk.previous, walk.growths = torch.zeros_like(walk.best_loss), torch.zeros_like(walk.labels)
        walk.halved = torch.ones_like(walk.labels, dtype=torch.bool)

    def move(self, walk: Walk, number: int) -> Tensor:
        share = 0.75 if number > 1 else 1.0
        if self.norm == "linf":
            low, high = (walk.clean - self.eps).clamp(min=self.low), (walk.clean + self.eps).clamp(max=self.high)
            ahead = (walk.x + walk.step * walk.gradient.sign()).clamp(low, high)
            found = (walk.x + (ahead - walk.x) * share + (walk.x - walk.before) * (1 - share)).clamp(low, high)
        else:
            ahead = self._onto_ball(walk.x + walk.step * walk.gradient / length(walk.gradient), walk.clean)
            found = self._onto_ball(walk.x + (ahead - walk.x) * share + (walk.x - walk.before) * (1 - share), walk.clean)
        walk.before = walk.x
        return found

    def _onto_ball(self, images: Tensor, clean: Tensor) -> Tensor:
        """`project` in l2, in the order of operations of the authors' code."""
        delta = images - clean
        size = length(delta)
        return (clean + delta / size * size.clamp(max=self.eps)).clamp(self.low, self.high)

    def review(self, walk: Walk, number: int, loss: Tensor) -> None:
        walk.growths = walk.growths + (loss > walk.previous)
        walk.previous = loss
        if number not in self._checkpoints:
            return
        stuck = ~walk.halved & (walk.last_best >= walk.best_loss)
        walk.halved = (walk.growths <= self.rho * self._checkpoints[number]) | stuck
        walk.last_best, walk.growths = walk.best_loss, torch.zeros_like(walk.growths)
        back = walk.halved.reshape(walk.step.shape)
        walk.step = torch.where(back, walk.step / 2, walk.step)
        walk.x, walk.gradient = torch.where(back, walk.best, walk.x), torch.where(back, walk.best_gradient, walk.gradient)


class APGDCE(APGD):
    """`APGD` on the cross-entropy."""

    name = "apgd-ce"


class APGDDLR(APGD):
    """`APGD` on the difference of logits ratio, which no scale of the logits can hide; for three classes or more."""

    name = "apgd-dlr"

    def __init__(self, eps: float | str, steps: int = 100, loss="dlr", **options) -> None:
        super().__init__(eps, steps, loss, **options)


class TAPGD(APGD):
    """Targeted Auto-PGD: `APGD` towards each of the most likely wrong classes in turn, until the model is fooled.

    Samples that another class than the label has already won leave before the next target.
    target_classes: how many, by their logits on the clean image, the highest first; at most all but the label.
    loss: "dlr" `-(z_y - z_t)/(z_(1) - (z_(3) + z_(4))/2)` (four classes or more), "ce" `log softmax(z)[t]`, or
    "margin" `z_t - z_y`. labels are the true classes. Further options as in `APGD`.
    Source: Croce and Hein, ICML 2020, section 4.2 and equation 7.

    >>> adversarial = TAPGD(eps=8 / 255, loss="dlr", target_classes=9)(model, images, labels)
    """

    name = "tapgd"

    def __init__(self, eps: float | str, steps: int = 100, loss: str = "dlr", target_classes: int = 9, **options) -> None:
        who = type(self).__name__
        if options.get("targeted"):
            raise ValueError(
                f"{who}: targeted is True; wanted the true classes as labels, for the attack chooses its targets itself. Use APGD(targeted=True)."
            )
        if not isinstance(loss, str) or loss not in TARGETED_LOSSES:
            raise ValueError(f"{who}: loss {loss!r} is unknown; wanted one of {', '.join(TARGETED_LOSSES)}.{nearest(loss, tuple(TARGETED_LOSSES))}")
        super().__init__(eps, steps, loss, **options)
        self.target_classes = whole(who, "target_classes", target_classes)

    def aims(self, model: nn.Module, images: Tensor, labels: Tensor) -> Sequence[Tensor]:
        logits = self.mean_logits(model, images, labels)
        others = logits.scatter(1, labels[:, None], -math.inf).argsort(dim=1, descending=True, stable=True)
        return others[:, : min(self.target_classes, logits.shape[1] - 1)].unbind(1)

    def aimed_loss(self, targets: Tensor):
        return lambda logits, labels: TARGETED_LOSSES[self.loss](logits, labels, targets)


class TAPGDCE(TAPGD):
    """`TAPGD` on the cross-entropy of the targets."""

    name = "tapgd-ce"

    def __init__(self, eps: float | str, steps: int = 100, loss: str = "ce", **options) -> None:
        super().__init__(eps, steps, loss, **options)


class TAPGDDLR(TAPGD):
    """`TAPGD` on the targeted difference of logits ratio; for four classes or more."""

    name = "tapgd-dlr"
