"""Attacks that follow the gradient in steps of a fixed size: FGSM, RFGSM, PGD, BIM, MI-FGSM, MT-PGD."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import NORMS, Attack
from .checks import amount, parse_eps, whole
from .losses import LOSSES, TARGETED_LOSSES, Loss, margin
from .noise import within
from .streams import Streams

__all__ = ["BIM", "FGSM", "MIFGSM", "MTPGD", "PGD", "RFGSM"]

#: (its number, places of the samples that still stand, their streams) -> their images.
Attempt = Callable[[int, Tensor, Streams], Tensor]


def direction(gradient: Tensor, norm: str) -> Tensor:
    """The step of size 1 along which a linear function rises most: `sign(g)` in linf, `g/||g||` in l2; 0 where g is 0."""
    if norm == "linf":
        return gradient.sign()
    tiny, ones = torch.finfo(gradient.dtype).tiny, [1] * (gradient.dim() - 1)
    # Scaled first: the squares of a small gradient, such as one that a model hides, would be 0.
    scaled = gradient / gradient.flatten(1).abs().amax(1).clamp(min=tiny).reshape(-1, *ones)
    return scaled / scaled.flatten(1).norm(dim=1).clamp(min=tiny).reshape(-1, *ones)


class FGSM(Attack):
    """Fast gradient sign method: `x + eps*sign(g)`, clipped to [0, 1]; g the gradient of the loss at x.

    In l2 `x + eps*g/||g||` (fast gradient method). Options as in `Attack`. Source: Goodfellow et al., ICLR 2015, section 4.

    >>> adversarial = FGSM(eps=8 / 255)(model, images, labels)
    """

    name = "fgsm"
    norms = NORMS
    single_step = True

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        return images + self.eps * direction(self.gradient(model, images, labels).gradient, self.norm)


class RFGSM(Attack):
    """FGSM after a random step: `x' = clip(x + alpha*sign(N(0, 1)))`, then `x' + (eps - alpha)*sign(g(x'))`, clipped to [0, 1].

    alpha: the size of the random step in pixels, at most eps; by default eps/2. Further options as in `Attack`.
    Source: Tramer et al., ICLR 2018, section 4.1.

    >>> adversarial = RFGSM(eps=8 / 255)(model, images, labels)
    """

    name = "rfgsm"
    single_step = True

    def __init__(self, eps: float | str, alpha: float | str | None = None, **options) -> None:
        super().__init__(eps, **options)
        self.alpha = self.eps / 2 if alpha is None else parse_eps(alpha)
        if self.alpha > self.eps:
            raise ValueError(f"RFGSM: alpha is {alpha!r}, larger than eps, {self.eps:g}; wanted a part of eps, such as eps/2.")

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        found = (images + self.alpha * generator.signs(*images.shape[1:], dtype=images.dtype)).clamp(self.low, self.high)
        return found + (self.eps - self.alpha) * self.gradient(model, found, labels).gradient.sign()


class Stepwise(Attack):
    """What attacks with steps of one size share. steps: how many. step_size: in pixels."""

    norms = NORMS

    def __init__(self, eps: float | str, steps: int, step_size: float | str | None, **options) -> None:
        super().__init__(eps, **options)
        who = type(self).__name__
        self.steps = whole(who, "steps", steps)
        self.step_size = self.usual_step() if step_size is None else parse_eps(step_size)
        if not math.isfinite(self.step_size):
            raise ValueError(f"{who}: step_size is {step_size!r}; wanted a finite number of pixels, such as 2/255.")

    def usual_step(self) -> float:
        return 2.5 * self.eps / self.steps

    def climb(self, model: nn.Module, found: Tensor, images: Tensor, labels: Tensor, momentum: float = 0.0, loss: Loss | None = None) -> Tensor:
        """From `found`, each step along the gradient, or with momentum along `v <- momentum*v + g/mean|g|`; then back into the ball."""
        velocity = None
        for _ in range(self.steps):
            gradient = self.gradient(model, found, labels, loss).gradient
            if momentum:
                size = gradient.abs().mean(dim=tuple(range(1, gradient.dim())), keepdim=True)
                gradient = torch.where(size == 0, gradient, gradient / size)
                gradient = velocity = gradient if velocity is None else gradient + momentum * velocity
            found = self.project(found + self.step_size * direction(gradient, self.norm), images)
        return found

    def start(self, images: Tensor, generator: Streams) -> Tensor:
        """A random point of the ball, brought into the range: uniform in linf; in l2 of uniform direction and radius, as in torchattacks.

        Points that are uniform over an l2 ball lie at its surface, where they have used up what the attack may move.
        """
        return self.project(images + within(generator, images, self.eps, self.norm, power=1.0), images)

    def best(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams, count: int, attempt: Attempt, score: Loss) -> Tensor:
        """For each sample the best of `count` attempts: the first that fools the model, else the one of the highest score.

        Fooled samples leave.
        """
        found, left = images.clone(), torch.arange(len(images), device=images.device)
        highest = torch.full(images.shape[:1], -math.inf, dtype=torch.float64, device=images.device)
        for number in range(count):
            self.anew()
            with self.only(left):
                tried = attempt(number, left, generator)
                logits = self.mean_logits(model, tried, labels[left])
            fooled, scores = self.succeeded(logits, labels[left]), score(logits, labels[left]).double()
            better = fooled | (scores > highest[left])
            found[left[better]], highest[left[better]] = tried[better], scores[better]
            left, generator = left[~fooled], generator[~fooled]
            if len(left) == 0:
                break
        return found

    def mean_logits(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean of as many passes as gradients are averaged of."""
        return sum(self.logits(model, images, labels) for _ in range(self.eot)) / self.eot


class PGD(Stepwise):
    """Projected gradient descent: from `x + U(-eps, eps)`, k times `x' <- clip(x' + step_size*sign(g(x')))`.

    `clip` is to the ball of eps around x, then to [0, 1]. In l2 it starts at a uniform radius and steps along `g/||g||`.
    steps: k. step_size: in pixels; by default 2.5*eps/k. random_start: without it, it begins at x (BIM).
    restarts: attempts from other starts for the samples that still stand; of a sample's attempts the first that fools the model
        counts, else that of the highest loss. Further options as in `Attack`.
    Source: Madry et al., ICLR 2018, section 2.1; SNN-RAT: 7 steps of 0.01.

    >>> adversarial = PGD(eps=8 / 255, steps=7, step_size=0.01)(model, images, labels)
    """

    name = "pgd"

    def __init__(
        self, eps: float | str, steps: int = 7, step_size: float | str | None = None, random_start: bool = True, restarts: int = 1, **options
    ) -> None:
        super().__init__(eps, steps, step_size, **options)
        self.random_start, self.restarts = bool(random_start), whole("PGD", "restarts", restarts)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"PGD: restarts is {restarts}, but random_start is False: all would be the same; wanted restarts=1, or random_start=True.")

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        if self.restarts == 1:
            return self.climb(model, self.start(images, generator) if self.random_start else images, images, labels)

        def attempt(number: int, left: Tensor, streams: Streams) -> Tensor:
            return self.climb(model, self.start(images[left], streams), images[left], labels[left])

        def score(logits: Tensor, labels: Tensor) -> Tensor:
            value = (LOSSES[self.loss] if isinstance(self.loss, str) else self.loss)(logits, labels)
            return -value if self.targeted else value

        return self.best(model, images, labels, generator, self.restarts, attempt, score)


class BIM(Stepwise):
    """Basic iterative method: `PGD` that begins at x.

    steps, step_size as in `PGD`; further options as in `Attack`. Source: Kurakin et al., ICLR 2017 workshop, section 2.2.

    >>> adversarial = BIM(eps=8 / 255, steps=10, step_size=2 / 255)(model, images, labels)
    """

    name = "bim"

    def __init__(self, eps: float | str, steps: int = 7, step_size: float | str | None = None, **options) -> None:
        super().__init__(eps, steps, step_size, **options)

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        return self.climb(model, images, images, labels)


class MIFGSM(Stepwise):
    """Momentum iterative FGSM: from x, k times `v <- decay*v + g/mean|g|`, `x' <- clip(x' + step_size*sign(v))`.

    The paper divides g by its l1 norm, which gives the same steps. In l2 it steps along `v/||v||`.
    steps: k. step_size: in pixels; by default eps/k. decay: of the momentum. Further options as in `Attack`.
    Source: Dong et al., CVPR 2018, algorithm 1.

    >>> adversarial = MIFGSM(eps=8 / 255, steps=10)(model, images, labels)
    """

    name = "mifgsm"

    def __init__(self, eps: float | str, steps: int = 10, step_size: float | str | None = None, decay: float = 1.0, **options) -> None:
        super().__init__(eps, steps, step_size, **options)
        self.decay = amount("MIFGSM", "decay", decay)

    def usual_step(self) -> float:
        return self.eps / self.steps

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        return self.climb(model, images, images, labels, self.decay)


class MTPGD(Stepwise):
    """MultiTargeted PGD: for each wrong class t a `PGD` from a random start that raises `z_t - z_y`, z the logits.

    Classes come in the order of the clean logits, the highest first. Samples that are fooled leave between classes; of the
    others that image is kept where a wrong class comes nearest to the right one.
    steps: of each PGD. step_size: in pixels; by default 2.5*eps/steps. targets: so many classes; all others where there are fewer.
    momentum: of the gradient, as the decay of `MIFGSM`; 0 without. restarts: so many starts for each class.
    loss: a name of LOSSES in its targeted form (margin: z_t - z_y), or a function (logits, labels, targets) -> [N].
    Further options as in `Attack`, but for targeted.
    Source: Gowal et al. 2019 (arXiv 1910.09338), algorithm 1; momentum 0.9 and 7 to 40 steps: TGO (ICLR 2026) [R: the form of momentum].

    >>> adversarial = MTPGD(eps=8 / 255, steps=20)(model, images, labels)
    """

    name = "mtpgd"

    def __init__(
        self,
        eps: float | str,
        steps: int = 10,
        step_size: float | str | None = None,
        targets: int = 9,
        momentum: float = 0.9,
        restarts: int = 1,
        loss: str | Callable = "margin",
        **options,
    ) -> None:
        super().__init__(eps, steps, step_size, loss=loss, **options)
        if self.targeted:
            raise ValueError("MTPGD: targeted is True, but it goes to one class after the other; wanted False. To reach one class: PGD(targeted=True).")
        self.targets, self.restarts = whole("MTPGD", "targets", targets), whole("MTPGD", "restarts", restarts)
        self.momentum = amount("MTPGD", "momentum", momentum)

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        raised = TARGETED_LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        logits = self.mean_logits(model, images, labels)
        order = logits.scatter(1, labels[:, None], -math.inf).sort(dim=1, descending=True, stable=True).indices[:, :-1]

        def attempt(number: int, left: Tensor, streams: Streams) -> Tensor:
            towards = functools.partial(raised, targets=order[left, number // self.restarts])
            return self.climb(model, self.start(images[left], streams), images[left], labels[left], self.momentum, towards)

        count = min(self.targets, order.shape[1]) * self.restarts
        return self.best(model, images, labels, generator, count, attempt, margin)
