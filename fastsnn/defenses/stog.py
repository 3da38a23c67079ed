"""StoG: spikes that pass random gates, whose probabilities are learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..paper_neurons import GatedLIF
from .base import Defense, Run

__all__ = ["StoG"]


class StoG(Defense):
    """Stochastic gating: cross-entropy through random gates, `+ gamma/2 * sum of p^2` over all gates in the first part of the training.

    The network is one of `neuron="stog"` (`GatedLIF`), whose gates p are random at inference too: an attack on it averages gradients
    (`attacks.default_eot`). gamma: the prior's weight. lr: the gates' learning rate, constant, without weight decay; 0: that of the
    training with its schedule, as in the public code, where both are 0.1. until: the share of the training in which the gates learn; then they
    keep their values and the prior is left out. After each step p is brought back to [lowest, 1] (a reading: the prior pulls gates
    down, and one above 1 would have no gradient to come back by).

    Reports "gate", the mean of p. Source: StoG (Ding et al., AAAI 2024): SGD 0.1, gamma 5e-6, the first 100 of 200 epochs.

    >>> model = fastsnn.models.vgg11(neuron="stog", steps=8, norm="bn")
    >>> loss = StoG().loss(model, images, labels)
    """

    name = "stog"
    needs = {"neuron": "stog"}

    def __init__(self, gamma: float = 5e-6, lr: float = 0.1, until: float = 0.5) -> None:
        if not 0 <= gamma < math.inf:
            raise ValueError(f"StoG: gamma is {gamma}; wanted a finite number >= 0, such as 5e-6.")
        if not 0 <= lr < math.inf:
            raise ValueError(f"StoG: lr is {lr}; wanted the learning rate of the gates, a finite number > 0, or 0 for that of the training.")
        if not 0 <= until <= 1:
            raise ValueError(f"StoG: until is {until}; wanted a share of the training, a number in [0, 1].")
        self.gamma, self.lr, self.until = float(gamma), float(lr), float(until)

    def prepare(self, model: nn.Module) -> None:
        layers = _gated(model)
        if not layers:
            raise ValueError("StoG: the network has no gates; wanted GatedLIF in it. Build it with neuron='stog' (fastsnn train --neuron stog).")
        if not all(layer.fitted for layer in layers):
            raise ValueError("StoG: the network has gates that are not made yet; wanted a network of fastsnn.models, or one that has run once.")

    def groups(self, model: nn.Module) -> list[dict]:
        own = {"lr": self.lr} if self.lr else {}
        return [{"params": [layer.r for layer in _gated(model)], "weight_decay": 0.0, **own}]

    def penalty(self, run: Run) -> dict[str, Tensor]:
        weight = self.gamma if run.progress < self.until else 0.0
        return {self.name: 0.5 * weight * sum(layer.probability.square().sum() for layer in _gated(run.model))}

    def report(self, run: Run) -> dict[str, Tensor]:
        return {"gate": torch.cat([layer.probability.detach().flatten() for layer in _gated(run.model)]).mean()}

    def before_step(self, model: nn.Module, progress: float) -> None:
        if progress >= self.until:
            for layer in _gated(model):
                layer.r.grad = None  # not zero: momentum would go on

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for layer in _gated(model):
            layer.r.clamp_(layer.lowest, 1.0)


def _gated(model: nn.Module) -> list[GatedLIF]:
    return [layer for layer in model.modules() if isinstance(layer, GatedLIF)]
