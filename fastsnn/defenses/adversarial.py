"""Adversarial training."""

from __future__ import annotations

from torch import Tensor, nn

from ..attacks import PGD
from .base import Defense

__all__ = ["AT"]


class AT(Defense):
    """Adversarial training: the loss on PGD's images in place of the clean ones.

    eps, step_size: in pixels; steps: of PGD, with its random start. seed: of the random start; None takes torch's
    generator, so that every batch gets its own. Source: Madry et al., ICLR 2018; these defaults are MPD-SGR's.

    >>> loss = (AT(eps=2 / 255) + MPDSGR()).loss(model, images, labels)
    """

    name = "at"
    crafts = True

    def __init__(self, eps: float | str = 2 / 255, steps: int = 2, step_size: float | str | None = 1 / 255, seed: int | None = None) -> None:
        self.attack = PGD(eps, steps=steps, step_size=step_size, seed=seed)
        self.eps, self.steps, self.step_size = self.attack.eps, steps, self.attack.step_size

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        return self.attack(model, images, labels)
