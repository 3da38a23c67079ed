"""Random noise: what a perturbation of the same size does without knowing the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Attack
from .streams import Streams

__all__ = ["GaussianNoise", "UniformNoise", "within"]


def within(generator: Streams, images: Tensor, eps: float, norm: str, power: float) -> Tensor:
    """Random perturbations like `images`: in linf each pixel uniform in [-eps, eps], in l2 a uniform direction at the radius `eps*u^power`.

    With d pixels, the power 1/d is uniform over the ball, which for many pixels is nearly its surface.
    """
    if norm == "linf":
        return eps * (2 * generator.uniform(*images.shape[1:], dtype=images.dtype) - 1)
    normal, ones = generator.normal(*images.shape[1:], dtype=images.dtype), [1] * (images.dim() - 1)
    radius = eps * generator.uniform(*ones, dtype=images.dtype) ** power
    size = normal.flatten(1).norm(dim=1).clamp(min=torch.finfo(images.dtype).tiny)
    return normal * (radius / size.reshape(-1, *ones))


class GaussianNoise(Attack):
    """`x + eps*N(0, 1)`, clipped to [0, 1]: eps is the standard deviation, which bounds no pixel.

    It asks the model nothing: of the options in `Attack`, `seed` counts. Source: MPD-SGR (arXiv 2511.12199), table 3: eps = 0.1.

    >>> noisy = GaussianNoise(eps=0.1)(model, images, labels)
    """

    name = "gaussian"
    access = "nothing"
    bounded = False

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        return images + self.eps * generator.normal(*images.shape[1:], dtype=images.dtype)


class UniformNoise(Attack):
    """`x + U`, clipped to [0, 1]: U uniform over the ball of eps; in linf each pixel uniform in [-eps, eps].

    It asks the model nothing: of the options in `Attack`, `norm` and `seed` count. Source: MPD-SGR (arXiv 2511.12199), table 3: eps = 0.1.

    >>> noisy = UniformNoise(eps=0.1)(model, images, labels)
    """

    name = "uniform"
    norms = ("linf", "l2")
    access = "nothing"

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        return images + within(generator, images, self.eps, self.norm, power=1 / images[0].numel())
