"""What losses on pairs of clean and adversarial images share: their divergence, and the attacks that they train on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adjoints import nearest
from ..attacks import PGD, Attack
from ..attacks.base import crafting
from ..attacks.streams import Streams
from .base import wide

__all__ = ["DIRECTIONS", "STARTS", "Ball", "accuracy", "answers", "divergence", "raising", "share", "single"]

STARTS = ("normal", "uniform")
#: Which answers stand first in the divergence: KL(f(x) || f(x~)), or KL(f(x~) || f(x)).
DIRECTIONS = ("clean-adversarial", "adversarial-clean")
#: The deviation of a normal start, in pixels.
NORMAL = 0.001


def divergence(clean: Tensor, adversarial: Tensor, direction: str = DIRECTIONS[0]) -> Tensor:
    """Kullback-Leibler divergence of two answers, `KL(p || q) = sum over k of p_k*log(p_k/q_k)`, sample by sample.

    clean, adversarial: logits [N, classes]; p and q are their softmax, p the clean one where direction is
    "clean-adversarial", else the adversarial one. Returns [N] >= 0, in nats, float32 at least; differentiable in both.

    >>> divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
    tensor([0.1201])
    """
    first, second = (F.log_softmax(wide(logits), 1) for logits in (clean, adversarial))
    if direction == DIRECTIONS[1]:
        first, second = second, first
    return F.kl_div(second, first, reduction="none", log_target=True).sum(1)


def answers(model: nn.Module, images: Tensor, passes: int = 1) -> Tensor:
    """The model's logits in eval mode, a constant; the mean of so many passes, for a model that is random at inference."""
    with torch.no_grad(), crafting(model):
        found = [model(images) for _ in range(passes)]
    return found[0] if passes == 1 else torch.stack(found).mean(0)


def raising(clean: Tensor, direction: str = DIRECTIONS[0]) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence from these answers, as attacks take a loss."""
    return lambda logits, labels: divergence(clean, logits, direction)


class FromNormal(PGD):
    """PGD that begins at `x + 0.001*N(0, 1)`."""

    def start(self, images: Tensor, generator: Streams) -> Tensor:
        return self.project(images + NORMAL * generator.normal(*images.shape[1:], dtype=images.dtype), images)


def single(attack: Attack) -> Attack:
    """The attack, without a warning where it averages one gradient of a random network: enough to train on."""
    attack._warned = True
    return attack


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of right answers, a scalar."""
    return (logits.argmax(1) == labels).double().mean()


def share(who: str, what: str, value: object) -> float:
    """`value`, if it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{who}: {what} is {value!r}; wanted a number in [0, 1], such as 0.5.")
    return float(value)


class Ball:
    """The options of the PGD that a loss trains on, checked, and the attack that they stand for at a moment of the training.

    eps, step_size: in pixels; step_size None: 2.5*eps/steps. start: "normal", x + 0.001*N(0, 1), or "uniform", x + U(-eps, eps).
    warmup: the share of the training in which eps and step_size rise linearly from 0. eot, seed: as in `fastsnn.attacks.Attack`.
    """

    def __init__(self, who: str, eps, steps: int, step_size, start: str, warmup: float, eot: int, seed: int | None) -> None:
        if start not in STARTS:
            raise ValueError(f"{who}: start {start!r} is unknown; wanted one of {', '.join(STARTS)}.{nearest(start, STARTS)}")
        self.warmup = share(who, "warmup", warmup)
        self.make = partial(PGD if start == "uniform" else FromNormal, steps=steps, eot=eot, seed=seed)
        made = self.make(eps, step_size=step_size)
        self.eps, self.step_size = made.eps, made.step_size

    def attack(self, progress: float, loss: str | Callable = "ce") -> PGD:
        """The attack at this moment. loss: what it raises, as in `fastsnn.attacks.Attack`."""
        part = min(1.0, progress / self.warmup) if self.warmup else 1.0
        return single(self.make(part * self.eps, step_size=part * self.step_size, loss=loss))
