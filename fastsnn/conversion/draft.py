"""A spiking network in the making: its graph, and the layers whose thresholds are still to be set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..neurons import Neuron
from .graph import Traced


@dataclass(frozen=True)
class Site:
    """A layer of neurons: its name in the network, and its node in the graph."""

    name: str
    layer: Neuron
    node: fx.Node


@dataclass
class Draft:
    """A network whose weights are set, and whose thresholds are not.

    merged: whether its signals are [T*N, ...], or else [T or 1, N, ...]. ann, relus: the network that it comes from, and the ReLU of each site in `ann`'s graph.
    encode: from images, T_c, and the number of steps from which on to the input of the graph; constant: whether that is the same at every step.
    whole: whether T_c can only be the network's own T. absorb: has the factor theta of plain conversion go into what follows.
    """

    network: nn.Module
    traced: Traced
    sites: list[Site]
    merged: bool
    ann: Traced
    relus: list[fx.Node]
    encode: Callable[[Tensor, int, int], Tensor]
    constant: bool
    whole: bool
    absorb: Callable[[], None]
    steps: int
    converted: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def calibrate(self, batches: list[Tensor]) -> None:
        """The running statistics of all norms as their mean over mini-batches, with the statistics of T steps and batch."""
        norms = [module for module in self.network.modules() if hasattr(module, "running_mean") and module.running_mean is not None]
        before = [norm.momentum for norm in norms]
        self.network.eval()
        for norm in norms:
            norm.train()
        try:
            with torch.no_grad():
                for number, images in enumerate(batches, 1):
                    for norm in norms:
                        norm.momentum = 1 / number
                    self.network(images.clone())
        finally:
            for norm, momentum in zip(norms, before):
                norm.momentum = momentum
            self.network.eval()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within this block the module is in eval mode, and nothing gets a gradient."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
