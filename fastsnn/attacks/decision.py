"""RayS: a search over signs, from the model's decisions alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import Attack, parse_eps, whole
from .streams import Streams

__all__ = ["RayS"]


class RayS(Attack):
    """Ray searching: the signs s for which `clip(x + r*s)` is fooled at the smallest r, from decisions alone.

    After s = 1, the signs of one block of pixels after the other are turned: of all, of each half, of each quarter and so
    on, at last of each pixel, again and again. Where the turned signs are fooled at the r found so far, bisection looks
    for the smallest r in their direction; they stay where it is smaller. A sample leaves when it is fooled within eps.

    eps: inf looks for the smallest r until the end. budget: queries for each sample, the one of the clean image apart.
    tolerance: of r, in pixels, where bisection ends; by default 1e-3 divided by the root of the number of pixels. Where
    nothing is found, the image comes back as it was. No random number is drawn but the model's own. Further options as in `Attack`.
    Source: Chen and Gu, KDD 2020, algorithms 1 to 3.

    >>> adversarial = RayS(eps=8 / 255, budget=1000)(model, images, labels)
    """

    name = "rays"
    access = "decisions"
    unbounded = True

    def __init__(self, eps: float | str = math.inf, budget: int = 10000, tolerance: float | str | None = None, **options) -> None:
        super().__init__(eps, **options)
        self.budget = whole("RayS", "budget", budget)
        self.tolerance = None if tolerance is None else parse_eps(tolerance)
        if self.tolerance == 0:
            raise ValueError(f"RayS: tolerance is {tolerance!r}; wanted a number of pixels above 0, such as 1e-4.")

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        pixels = images[0].numel()
        tolerance = 1e-3 / math.sqrt(pixels) if self.tolerance is None else self.tolerance
        enough = self.eps if self.eps < math.inf else 0.0
        found = images.clone()
        left = (~self.succeeded(self.mean_logits(model, images, labels), labels)).nonzero()[:, 0]
        clean, y = images.flatten(1)[left], labels[left]
        signs = trial = torch.ones_like(clean)
        radius = torch.full((len(left),), math.inf, dtype=torch.float64, device=images.device)
        below = torch.zeros_like(radius)  # bisection is between below and radius
        bisecting = torch.zeros_like(radius, dtype=torch.bool)
        level, block = torch.zeros_like(left), torch.zeros_like(left)
        at = torch.arange(pixels, device=images.device)
        # Each sample asks once in every pass of the model, wherever its own search is.
        for _ in range(self.budget):
            if len(left) == 0:
                break
            reach = torch.where(bisecting, (below + radius) / 2, radius.clamp(max=self.high - self.low))
            x = (clean + reach.to(clean.dtype)[:, None] * trial).clamp(self.low, self.high)
            with self.only(left):
                fooled = self.succeeded(self.mean_logits(model, x.reshape(-1, *images.shape[1:]), y), y)
            nearer = fooled & (reach < radius)
            found.flatten(1)[left[nearer]] = x[nearer]
            radius, signs = torch.where(nearer, reach, radius), torch.where(nearer[:, None], trial, signs)
            below = torch.where(bisecting & ~fooled, reach, torch.where(bisecting, below, 0.0))
            bisecting = (bisecting | fooled) & (radius - below > tolerance)
            size = (pixels + 2**level - 1) // 2**level
            first = (block * size)[:, None]
            turned = torch.where((at >= first) & (at < first + size[:, None]), -signs, signs)
            trial = torch.where(bisecting[:, None], trial, turned)
            last = (block + 1) * size >= pixels
            level = torch.where(~bisecting & last & (size > 1), level + 1, level)
            block = torch.where(bisecting, block, torch.where(last, 0, block + 1))
            stay = radius > enough
            if not stay.all():
                state = (left, clean, y, signs, trial, radius, below, bisecting, level, block)
                left, clean, y, signs, trial, radius, below, bisecting, level, block = (part[stay] for part in state)
        return found
