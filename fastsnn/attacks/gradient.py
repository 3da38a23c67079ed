"""Attacks that follow the sign of the gradient: FGSM and PGD."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .base import Attack, parse_eps, whole
from .streams import Streams

__all__ = ["FGSM", "PGD"]


class FGSM(Attack):
    """Fast gradient sign method: `x + eps*sign(g)`, clipped to [0, 1]; g the gradient of the loss at x.

    Options as in `Attack`. Source: Goodfellow et al., ICLR 2015, section 4.

    >>> adversarial = FGSM(eps=8 / 255)(model, images, labels)
    """

    name = "fgsm"
    single_step = True

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        return images + self.eps * self.gradient(model, images, labels).gradient.sign()


class PGD(Attack):
    """Projected gradient descent: from `x + U(-eps, eps)`, k times `x' <- clip(x' + step_size*sign(g(x')))`.

    `clip` is to the ball of eps around x, then to [0, 1]; without `random_start` it begins at x (BIM).
    steps: k. step_size: in pixels; by default 2.5*eps/k. Further options as in `Attack`.
    Source: Madry et al., ICLR 2018, section 2.1; SNN-RAT: 7 steps of 0.01.

    >>> adversarial = PGD(eps=8 / 255, steps=7, step_size=0.01)(model, images, labels)
    """

    name = "pgd"

    def __init__(self, eps: float | str, steps: int = 7, step_size: float | str | None = None, random_start: bool = True, **options) -> None:
        super().__init__(eps, **options)
        self.steps = whole("PGD", "steps", steps)
        self.step_size = 2.5 * self.eps / steps if step_size is None else parse_eps(step_size)
        if not math.isfinite(self.step_size):
            raise ValueError(f"PGD: step_size is {step_size!r}; wanted a finite number of pixels, such as 2/255.")
        self.random_start = bool(random_start)

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        found = images
        if self.random_start:
            noise = generator.uniform(*images.shape[1:], dtype=images.dtype)
            found = self.project(images + self.eps * (2 * noise - 1), images)
        for _ in range(self.steps):
            found = self.project(found + self.step_size * self.gradient(model, found, labels).gradient.sign(), images)
        return found
