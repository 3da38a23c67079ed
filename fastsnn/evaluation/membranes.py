"""What the membranes of a network look like: Omega, mean, deviation and firing rate of each spiking layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..defenses.base import named_statistics
from ..defenses.mpd_sgr import omega
from .forward import batches, check, evaluating

__all__ = ["LayerDiagnosis", "diagnose"]


@dataclass(frozen=True)
class LayerDiagnosis:
    """One spiking layer. omega: the mean over steps and channels of Omega; mean, deviation: of z = h - threshold over
    steps, samples and neurons, channel by channel and step by step, then averaged; rate: spikes per neuron and step."""

    name: str
    omega: float
    mean: float
    deviation: float
    rate: float

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def diagnose(
    model: nn.Module, x: Tensor, gamma: float = 1.0, batch_size: int = 256, device: str | torch.device | None = None
) -> list[LayerDiagnosis]:
    """Omega, mean and deviation of the membrane and firing rate of each spiking layer, over all of x, in eval mode.

    x: as in `accuracy`. gamma: half the window of Omega, in units of potential. Batches are pooled exactly: the result
    does not depend on batch_size but for rounding. A ValueError for a model without a spiking layer.

    >>> diagnose(model, x)[0].omega
    """
    check("diagnose", x, None, batch_size)
    pools: list[tuple[str, _Pool]] = []
    with evaluating(model):
        for images, _ in batches(model, x, None, batch_size, device):
            _, entries = named_statistics(model, images, ("mean", "var", "rate"))
            if not entries:
                raise ValueError(f"diagnose: {type(model).__name__} ran no spiking layer; wanted a model with fastsnn.LIF or a relative in it.")
            pools = pools or [(name, _Pool()) for name, _ in entries]
            for (_, pool), (_, entry) in zip(pools, entries, strict=True):
                pool.add(entry, len(images))
    return [
        LayerDiagnosis(
            name, omega(pool.mean, pool.var, gamma).mean().item(), pool.mean.mean().item(), pool.var.sqrt().mean().item(), pool.rate.mean().item()
        )
        for name, pool in pools
    ]


class _Pool:
    """Mean, biased variance and rate [T, C] over batches, in float64 (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.var, self.rate = 0, 0.0, 0.0, 0.0

    def add(self, entry, count: int) -> None:
        self.count += count
        share = count / self.count
        ahead = entry.mean.double() - self.mean
        self.var = self.var + share * (entry.var.double() - self.var) + share * (1 - share) * ahead**2
        self.mean = self.mean + share * ahead
        self.rate = self.rate + share * (entry.rate.double() - self.rate)
