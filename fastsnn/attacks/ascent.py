"""What APGD and SA-PGD share: the start, the checkpoints, what each sample has found so far, restarts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Attack, whole
from .streams import Streams

__all__ = ["Ascent", "Walk", "checkpoints"]


def checkpoints(steps: int) -> dict[int, int]:
    """After which of `steps` steps the step size is reviewed, each with the number of steps since the last review.

    The first interval is 0.22 of the steps; each is 0.03 of the steps shorter than the one before, down to 0.06 of them.
    Source: Croce and Hein, ICML 2020, section 3.2; whole numbers as in the authors' code.

    >>> checkpoints(100)
    {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    """
    width, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = {}, width
    while at <= steps:
        found[at] = width
        width = max(width - shorter, least)
        at += width
    return found


class Walk:
    """What is known of the samples that an attack still moves: tensors whose first dimension is the sample."""

    # clean, labels, targets: the task. x, gradient: where the walk is. best, best_gradient, best_loss: its highest point. step: [n, 1, ...].
    clean: Tensor
    labels: Tensor
    targets: Tensor
    x: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step: Tensor

    def __init__(self, **tensors: Tensor) -> None:
        vars(self).update(tensors)

    def __getitem__(self, samples: Tensor) -> Walk:
        return Walk(**{name: value[samples] for name, value in vars(self).items()})


class Ascent(Attack):
    """Attacks that climb from a random point on the surface of the ball, with a step size that they choose themselves.

    To write one: `move` (the next images), `review` (the step size), and `begin` for what these two remember.

    steps: gradient steps. restarts: walks from a new start, for the samples that still stand. early_stop: a sample leaves at
    the first image that fools the model; else it takes all steps, and the last image that fooled the model counts, as in
    the authors' code: as many samples are fooled, with more confidence. A sample that stands gets the image of highest loss.
    With eot > 1, losses and verdicts are means of so many passes; where those are few, early_stop takes lucky draws for success.
    """

    #: The first step, in units of eps.
    first_step: float

    def __init__(self, eps: float | str, steps: int = 100, restarts: int = 1, early_stop: bool = True, **options) -> None:
        super().__init__(eps, **options)
        self.steps, self.restarts = whole(type(self).__name__, "steps", steps), whole(type(self).__name__, "restarts", restarts)
        self.early_stop = bool(early_stop)

    @abstractmethod
    def move(self, walk: Walk, number: int) -> Tensor:
        """The images after step `number` (from 1)."""

    @abstractmethod
    def review(self, walk: Walk, number: int, loss: Tensor) -> None:
        """Look at `loss`, reached by step `number`, and change `walk.step` where it is time to."""

    def begin(self, walk: Walk) -> None:
        """Add to a walk that starts what the other two want to remember."""

    def aims(self, model: nn.Module, images: Tensor, labels: Tensor) -> Sequence[Tensor | None]:
        """The classes to go to, one after the other, each [N]; None: just away from the labels."""
        return (None,)

    def aimed_loss(self, targets: Tensor):
        """The loss of images that go to `targets`, where `aims` names some."""
        raise NotImplementedError(f"{type(self).__name__} names classes in `aims`, but writes no aimed_loss(targets); wanted the loss of going there.")

    def start(self, images: Tensor, streams: Streams) -> Tensor:
        """A random point at the distance eps: in linf uniform numbers, in l2 normal ones, scaled to that norm."""
        if self.norm == "linf":
            noise = 2 * streams.uniform(*images.shape[1:], dtype=images.dtype) - 1
            size = noise.flatten(1).abs().amax(1).clamp(min=torch.finfo(noise.dtype).tiny)
            size = size.reshape(-1, *[1] * (noise.dim() - 1))
        else:
            noise = streams.normal(*images.shape[1:], dtype=images.dtype)
            size = length(noise)
        return (images + self.eps * noise / size).clamp(self.low, self.high)

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        found, highest = images.clone(), torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
        places, streams = torch.arange(len(images), device=images.device), generator
        rounds = [targets for targets in self.aims(model, images, labels) for _ in range(self.restarts)]
        for number, targets in enumerate(rounds, 1):
            with self.only(places):
                reached, fooled, loss = self._climb(model, images[places], labels[places], None if targets is None else targets[places], streams)
            better = fooled | (loss > highest[places])
            found[places[better]] = reached[better]
            highest[places] = torch.maximum(highest[places], loss)
            if number == len(rounds) or fooled.all():
                break
            places, streams = places[~fooled], streams[~fooled]
        return found

    def _climb(self, model: nn.Module, clean: Tensor, labels: Tensor, targets: Tensor | None, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
        """One walk from a new start: images, where they fool the model, and their loss."""
        self.anew()
        x, aimed = self.start(clean, streams), targets is not None
        gradient, loss, fooled = self._look(model, x, labels, targets)
        step = torch.full((len(x), *[1] * (x.dim() - 1)), self.first_step * self.eps, dtype=x.dtype, device=x.device)
        walk = Walk(clean=clean, labels=labels, targets=targets if aimed else labels, x=x, gradient=gradient, step=step)
        walk.best, walk.best_gradient, walk.best_loss = x, gradient, loss
        self.begin(walk)
        found, rows = x.clone(), torch.arange(len(x), device=x.device)
        highest = loss.double()
        for number in range(1, self.steps + 1):
            if self.early_stop and fooled.any():
                standing = ~fooled[rows]
                rows, walk = rows[standing], walk[standing]
                if not len(rows):
                    break
            walk.x = self.move(walk, number)
            with self.only(rows):
                walk.gradient, loss, now = self._look(model, walk.x, walk.labels, walk.targets if aimed else None)
            found[rows[now]] = walk.x[now]
            fooled[rows[now]] = True
            better = loss > walk.best_loss
            shaped = better.reshape(walk.step.shape)
            walk.best, walk.best_gradient = torch.where(shaped, walk.x, walk.best), torch.where(shaped, walk.gradient, walk.best_gradient)
            walk.best_loss = torch.where(better, loss, walk.best_loss)
            self.review(walk, number, loss)
        highest[rows] = walk.best_loss.double()
        standing = ~fooled[rows]
        found[rows[standing]] = walk.best[standing]
        return found, fooled, highest

    def _look(self, model: nn.Module, x: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient and value of the objective, and where the model is fooled."""
        found = self.gradient(model, x, labels, None if targets is None else self.aimed_loss(targets))
        return found.gradient, -found.loss if self.targeted else found.loss, self.succeeded(found.logits, labels)


def length(delta: Tensor) -> Tensor:
    """[N, 1, ...] the l2 norm of each sample, a little above 0."""
    return (delta**2).sum(dim=tuple(range(1, delta.dim())), keepdim=True).sqrt() + 1e-12
