"""FAB: small perturbations by steps onto the linearised boundary."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from .base import Attack, whole
from .losses import margin, targeted_margin
from .streams import Streams

__all__ = ["FAB", "onto_plane"]


class FAB(Attack):
    """Targeted fast adaptive boundary attack, FAB-T: the nearest image that is taken for one of the likeliest other classes.

    Towards a class t, with `f = z_t - z_y` and its gradient g at x_k, d(p) the smallest change that brings p onto the plane
    `f(x_k) + <g, z - x_k> = 0` within the range of pixels (`onto_plane`):

        x_{k+1} = (1 - a)*(x_k + eta*d(x_k)) + a*(x_0 + eta*d(x_0)),   a = min(alpha_max, |d(x_k)| / (|d(x_k)| + |d(x_0)|))

    An x_{k+1} that is fooled counts, then `x_0 + beta*(x_{k+1} - x_0)` takes its place.

    eps: samples leave when fooled within it; inf looks for the nearest image until the end. steps: k for each class.
    target_classes: how many t are tried for each sample, those of the highest logits first; targeted: labels are the only t, and
    `f = z_t - max_{i != t} z_i`. restarts: the further ones begin at random, at half the distance found so far or half of
    eps, whichever is smaller. Further options as in `Attack`. The gradient is that of f: `loss` is not an option.
    Source: Croce and Hein, ICML 2020 (Minimally distorted adversarial examples), algorithm 1; AutoAttack: 100 steps, 9 classes.

    >>> adversarial = FAB(eps=8 / 255, steps=20)(model, images, labels)
    """

    name = "fab"
    norms = ("linf", "l2")
    unbounded = True

    def __init__(
        self,
        eps: float | str = math.inf,
        steps: int = 100,
        restarts: int = 1,
        target_classes: int = 9,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        loss: str = "margin",
        **options,
    ) -> None:
        super().__init__(eps, loss=only_margin("FAB", loss), **options)
        self.steps, self.restarts = whole("FAB", "steps", steps), whole("FAB", "restarts", restarts)
        self.target_classes = whole("FAB", "target_classes", target_classes)
        self.alpha_max, self.eta, self.beta = float(alpha_max), float(eta), float(beta)
        if not (0 <= self.alpha_max <= 1 and self.eta >= 1 and 0 < self.beta <= 1):
            raise ValueError(f"FAB: alpha_max is {alpha_max!r}, eta {eta!r}, beta {beta!r}; wanted alpha_max in [0, 1], eta >= 1 and beta in (0, 1].")

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        logits = self.gradient(model, images, labels).logits  # tells of gradients that are zero
        others = logits.scatter(1, labels[:, None], -math.inf).argsort(dim=1, descending=True, stable=True)[:, : logits.shape[1] - 1]
        goals = labels[None] if self.targeted else others[:, : self.target_classes].T
        found, radius = images.clone(), torch.full_like(labels, math.inf, dtype=torch.float64)
        radius[self.succeeded(logits, labels)] = 0
        for restart in range(self.restarts):
            for goal in goals:
                start = images
                if restart:
                    start = self._start(images, radius, generator)
                left = (radius > (self.eps if self.eps < math.inf else 0)).nonzero()[:, 0]
                if len(left):
                    self._towards(model, images, labels, goal, start, left, found, radius)
        return found

    def _towards(self, model, images, labels, goal, start, left, found, radius) -> None:
        """The attack on the samples `left` towards the classes `goal`; better images go into `found`, their distances into `radius`."""
        clean, y, t, x = images[left], labels[left], goal[left], start[left]
        for _ in range(self.steps):
            loss = margin if self.targeted else functools.partial(targeted_margin, targets=t)
            with self.only(left):
                step = self.gradient(model, x, y, loss)
            value = -step.loss if self.targeted else step.loss
            back = (step.gradient.double() * (x - clean)).flatten(1).sum(1)  # of two large numbers the difference counts
            near, far = onto_plane(x, step.gradient, -value, self.norm), onto_plane(clean, step.gradient, back - value, self.norm)
            here, there = self._size(near).clamp(min=1e-8), self._size(far).clamp(min=1e-8)
            share = (here / (here + there)).clamp(max=self.alpha_max).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
            x = ((1 - share) * (x + self.eta * near) + share * (clean + self.eta * far)).clamp(self.low, self.high)
            with self.only(left):
                fooled = self.succeeded(self.mean_logits(model, x, y), y)
            size = self._size(x - clean)
            better = fooled & (size < radius[left])
            found[left[better]], radius[left[better]] = x[better], size[better]
            x = torch.where(fooled.reshape(share.shape), clean + self.beta * (x - clean), x)
            if self.eps < math.inf:
                stay = radius[left] > self.eps
                if not stay.all():
                    left, clean, y, t, x = (part[stay] for part in (left, clean, y, t, x))
                    if len(left) == 0:
                        return

    def _start(self, images: Tensor, radius: Tensor, streams: Streams) -> Tensor:
        shape = images.shape[1:]
        noise = 2 * streams.uniform(*shape, dtype=images.dtype) - 1 if self.norm == "linf" else streams.normal(*shape, dtype=images.dtype)
        reach = radius.clamp(max=min(self.eps, self.high - self.low)) / 2 / self._size(noise)
        return (images + reach.to(images.dtype).reshape(-1, *[1] * len(shape)) * noise).clamp(self.low, self.high)

    def _size(self, delta: Tensor) -> Tensor:
        """[N] float64: the norm of each sample."""
        return delta.flatten(1).double().norm(dim=1, p=math.inf if self.norm == "linf" else 2)


def onto_plane(points: Tensor, normals: Tensor, gap: Tensor, norm: str = "linf", low: float = 0.0, high: float = 1.0) -> Tensor:
    """The smallest d with `<normal, d> = gap` and `low <= point + d <= high`, for each sample; like `points`.

    With u_i the room of pixel i in the direction that closes the gap, `d_i = +-min(l, u_i)` in linf and
    `+-min(l*|w_i|, u_i)` in l2; l is found exactly, as the gap closed is piecewise linear in it. Where no point of the
    range is on the plane, all pixels go to the end of their room; where the normal is 0, none moves.

    points, normals: [N, ...] float. gap: [N] float. norm: "linf" or "l2".
    Source: Croce and Hein, ICML 2020 (Minimally distorted adversarial examples), section 2.2.
    """
    point, normal = points.flatten(1).double(), normals.flatten(1).double()
    scale = normal.abs().amax(1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    normal, gap = normal / scale, gap.double()[:, None] / scale
    direction = normal.sign() * torch.where(gap < 0, -1.0, 1.0)
    weight, gap = normal.abs(), gap.abs()
    room = torch.where(direction > 0, high - point, point - low).clamp(min=0)
    # A pixel closes slope*min(l, end) of the gap.
    slope, end = (weight, room) if norm == "linf" else (weight.square(), room / weight.clamp(min=1e-100))
    end, places = end.sort(1)
    slope = slope.gather(1, places)
    ended = (slope * end).cumsum(1)
    active = slope.flip(1).cumsum(1).flip(1)  # slopes of the pixels that have room from the i-th end on
    closed = ended + (active - slope) * end  # at l = end_i
    place = torch.searchsorted(closed, gap).clamp(max=end.shape[1] - 1)
    before = torch.where(place > 0, ended.gather(1, (place - 1).clamp(min=0)), 0.0)
    rate = active.gather(1, place)
    level = torch.where(rate > 0, (gap - before) / rate.clamp(min=1e-300), 0.0)
    level = torch.where(gap <= closed[:, -1:], torch.minimum(level, end.gather(1, place)), end[:, -1:])
    moved = torch.minimum(level * (1 if norm == "linf" else weight), room)
    return (direction * moved).reshape(points.shape).to(points.dtype)


def only_margin(who: str, loss: object) -> str:
    """"margin", the loss of attacks that are defined by it."""
    if loss != "margin":
        raise ValueError(f"{who}: loss is {loss!r}; this attack is defined by the margin. Leave loss out.")
    return loss
