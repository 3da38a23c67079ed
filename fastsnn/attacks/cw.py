"""CW: small perturbations by gradient descent on distance and margin together."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import Attack, whole
from .fab import only_margin
from .losses import margin
from .streams import Streams

__all__ = ["CW"]

#: How far from 0 and 1 w starts: at the ends themselves the gradient of tanh is 0, and such pixels would never move.
INSIDE = 0.03


class CW(Attack):
    """Carlini and Wagner's attack: the nearest image that is fooled, by Adam on w, `x = (tanh(w) + 1)/2`.

        minimise  D(x - x_0) + c*max(z_y - max_{i != y} z_i, -kappa)

    D is the squared l2 norm; in linf it is `sum_i max(|d_i| - tau, 0)`, tau from min(eps, 1) down to 0.9 times the smallest
    distance found. targeted: `max_{i != t} z_i - z_t` in place of the margin. w starts at x_0; for pixels within 0.03 of 0 or
    1, where tanh is flat, it starts 0.03 inside, and x is moved back by as much, then clipped.

    eps: samples leave when fooled within it (in linf x stays there); inf looks for the nearest image until the end. c: weight of the
    margin. kappa: confidence, by how much another class has to win. steps, lr: of Adam. searches: runs with a c of each
    sample's own: 10 times larger until it is fooled, then by bisection. Where nothing is found, the image of the largest
    margin is returned. Further options as in `Attack`, but norm is "l2" by default. The loss is the margin: `loss` is no option.
    Source: Carlini and Wagner, S&P 2017, sections V and VI; FEEL: c = 0.5, 10 steps. [R] the starts near 0 and 1, eps, and
    that tau changes from step to step.

    >>> adversarial = CW(c=1.0, steps=50)(model, images, labels)
    """

    name = "cw"
    norms = ("l2", "linf")
    unbounded = True

    def __init__(
        self,
        eps: float | str = math.inf,
        c: float = 1.0,
        kappa: float = 0.0,
        steps: int = 50,
        lr: float = 0.01,
        searches: int = 1,
        norm: str = "l2",
        loss: str = "margin",
        **options,
    ) -> None:
        super().__init__(eps, norm=norm, loss=only_margin("CW", loss), **options)
        self.steps, self.searches = whole("CW", "steps", steps), whole("CW", "searches", searches)
        self.c, self.kappa, self.lr = float(c), float(kappa), float(lr)
        if not (0 < self.c < math.inf and 0 <= self.kappa < math.inf and 0 < self.lr < math.inf):
            raise ValueError(f"CW: c is {c!r}, kappa {kappa!r}, lr {lr!r}; wanted finite numbers, c and lr above 0, kappa >= 0.")

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        best = _Nearest(images)
        weight, least, most = (torch.full_like(best.radius, value) for value in (self.c, 0.0, math.inf))
        for _ in range(self.searches):
            fooled = self._descend(model, images, labels, weight, best)
            least, most = torch.where(fooled, least, weight), torch.where(fooled, weight, most)
            weight = torch.where(most < math.inf, (least + most) / 2, 10 * weight)
        return best.images

    def _descend(self, model: nn.Module, images: Tensor, labels: Tensor, weight: Tensor, best: _Nearest) -> Tensor:
        """One run of Adam; [N] bool: where it found an image that is fooled."""
        ever = best.radius <= self._enough
        left = (~ever).nonzero()[:, 0]
        width = torch.float64 if images.dtype == torch.float64 else torch.float32
        clean, y, x = images[left], labels[left], images[left]
        c = weight[left].to(width).reshape(-1, *[1] * (images.dim() - 1))
        shift = clean.to(width) - clean.to(width).clamp(INSIDE, 1 - INSIDE)  # 0 but for pixels at the ends
        w = _inverse(clean.to(width) - shift)
        first = second = torch.zeros_like(w)
        for step in range(1, self.steps + 2):
            if len(left) == 0:
                break
            with self.only(left):
                if step <= self.steps:
                    gradient, logits, loss = self.gradient(model, x, y)
                else:
                    logits = self.mean_logits(model, x, y)
                    loss = margin(logits, y)
            lead = -loss if self.targeted else loss
            delta = x.to(width) - clean.to(width)
            fooled = self.succeeded(logits, y) & (lead >= self.kappa)
            ever[left] |= fooled
            best.take(left, x, fooled, lead, delta.flatten(1).double().norm(dim=1, p=math.inf if self.norm == "linf" else 2))
            if step > self.steps:
                break
            slope = self._distance_slope(delta, best.radius[left]) - c * gradient.to(width) * (lead < self.kappa).reshape(c.shape)
            slope = slope * (1 - w.tanh().square()) / 2
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope.square()
            w = w - self.lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            x = ((w.tanh() + 1) / 2 + shift).clamp(self.low, self.high).to(clean.dtype)
            if self.norm == "linf" and self.eps < math.inf:  # in l2, Adam's steps of equal size would not find the nearest point of the ball's edge
                x = self.project(x, clean)
                w = _inverse(x.to(width) - shift)
            stay = best.radius[left] > self._enough
            if not stay.all():
                state = (left, clean, y, c, x, w, first, second, shift)
                left, clean, y, c, x, w, first, second, shift = (part[stay] for part in state)
        return ever

    @property
    def _enough(self) -> float:
        """The distance at which a sample leaves."""
        return self.eps if self.eps < math.inf else 0.0

    def _distance_slope(self, delta: Tensor, radius: Tensor) -> Tensor:
        if self.norm == "l2":
            return 2 * delta
        tau = (0.9 * radius).clamp(max=min(self.eps, self.high - self.low)).to(delta.dtype)
        return delta.sign() * (delta.abs() > tau.reshape(-1, *[1] * (delta.dim() - 1)))


class _Nearest:
    """The nearest fooled image of each sample, or, where there is none yet, the one of the largest lead."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.radius = torch.full((len(images),), math.inf, dtype=torch.float64, device=images.device)
        self.lead = -self.radius

    def take(self, places: Tensor, images: Tensor, fooled: Tensor, lead: Tensor, radius: Tensor) -> None:
        nearest, highest = self.radius[places], self.lead[places]
        better = torch.where(fooled, radius < nearest, (nearest == math.inf) & (lead > highest))
        self.images[places[better]] = images[better]
        self.lead[places[better]] = lead[better].double()
        self.radius[places[better & fooled]] = radius[better & fooled]


def _inverse(x: Tensor) -> Tensor:
    """w of `x = (tanh(w) + 1)/2`."""
    return (2 * x.clamp(1e-6, 1 - 1e-6) - 1).atanh()
