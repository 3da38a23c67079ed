"""What the membranes of a trained network look like on some images, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..defenses.mpd_sgr import EPSILON, omega
from ..neurons import Neuron, spiking_layers
from ..pictures import Layer, window

__all__ = ["firing", "measure", "surrogate_of"]

BINS = 80
#: Counts of torch.histc are float32: exact up to so many values at once.
CHUNK = 1 << 24


@dataclass
class _Tally:
    """Sums over batches: of counts, and of moments [T, C] with their weights."""

    low: float = float("inf")
    high: float = float("-inf")
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    total: int = 0
    inside: int = 0
    weight: int = 0
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0  # of deviations from the mean, summed
    rate: float = 0.0

    def moments(self, mean: Tensor, var: Tensor, rate: Tensor, n: int) -> None:
        """Merge a batch of n values of each step and channel (Chan et al. 1979)."""
        mean, var = mean.double().cpu(), var.double().cpu()
        both, apart = self.weight + n, mean - self.mean
        self.square = self.square + var * n + apart**2 * (self.weight * n / both)
        self.mean = self.mean + apart * (n / both)
        self.rate += (float(rate.double().mean()) - self.rate) * n / both
        self.weight = both


@contextmanager
def _watched(model: nn.Module, see: Callable[[str, Neuron, Tensor], None]) -> Iterator[None]:
    """Within this block `see(name, layer, x)` is called with the input of every layer that fires."""

    def hook(name: str):
        return lambda layer, arguments: see(name, layer, layer._unmerged(arguments[0]))

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in firing(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def firing(model: nn.Module) -> list[tuple[str, Neuron]]:
    """The layers that fire, by name."""
    return list(spiking_layers(model).items())


def _distance(layer: Neuron, membrane: Tensor) -> Tensor:
    """z = h - threshold; the threshold is a number, a scalar, [C] or [T or 1, C, *S], h is [T, N, C, *S]."""
    threshold = layer.threshold
    if isinstance(threshold, Tensor):
        threshold = threshold.detach()
        if threshold.dim() == 1:
            threshold = threshold.view(-1, *[1] * (membrane.dim() - 3))
        elif threshold.dim() > 1:
            threshold = threshold.unsqueeze(1)
    return membrane - threshold


def surrogate_of(layer: Neuron) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """The layer's surrogate as a function of z, and the half-width of its window in units of potential.

    Parameters and thresholds that differ between channels or neurons enter with their mean.
    """
    one = layer.surrogate
    a, b = (float(value.double().mean()) if isinstance(value, Tensor) else value for value in one.values)
    threshold = layer.threshold
    scale = 1.0 if not one.relative else float(threshold.detach().double().mean()) if isinstance(threshold, Tensor) else float(threshold)

    def derivative(z: np.ndarray) -> np.ndarray:
        return (one.derivative(torch.as_tensor(z, dtype=torch.float64) / scale, a, b) / scale).numpy()

    return derivative, window(lambda z: float(derivative(np.array([z]))[0]))


def measure(model: nn.Module, images: Tensor, gamma: float = 1.0, batch_size: int = 32) -> list[Layer]:
    """Histograms and moments of z = h - threshold in every firing layer of a network, in the order of the layers.

    images: [N, C, H, W] float in [0, 1], on the model's device. gamma: the half-width of Omega's window, in units of
    potential. The network runs in eval mode and is left as it was; random numbers do not advance torch's generators.
    """
    tallies: dict[str, _Tally] = {name: _Tally() for name, _ in firing(model)}
    half_widths = {name: surrogate_of(layer)[1] for name, layer in firing(model)}
    if not tallies:
        return []

    def look(name: str, layer: Neuron, x: Tensor) -> None:
        z = _distance(layer, layer.simulate(x, keep=("membrane",)).membrane).double()
        mean, deviation, seen = float(z.mean()), float(z.std(correction=0)), tallies[name]
        margin = 1.2 * max(gamma, half_widths[name] if half_widths[name] < 3 * gamma else 0.0)
        seen.low = min(max(float(z.min()), mean - 4 * deviation), -margin)
        seen.high = max(min(float(z.max()), mean + 4 * deviation), margin)

    def count(name: str, layer: Neuron, x: Tensor) -> None:
        seen = tallies[name]
        # The forward pass that follows draws the same random numbers.
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            out = layer.simulate(x, statistics=("mean", "var", "rate"), keep=("membrane",))
        z = _distance(layer, out.membrane)
        for part in z.flatten().float().split(CHUNK):
            seen.counts += part.histc(BINS, seen.low, seen.high).double().cpu().numpy()
            seen.inside += int((part.abs() < gamma).sum())
        seen.total += z.numel()
        seen.moments(out.statistics.mean, out.statistics.var, out.statistics.rate, z.shape[1] * z[0, 0, 0].numel())

    mode = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.manual_seed(0)
            with _watched(model, look):
                model(images[:batch_size])
            _share_range(tallies)
            with _watched(model, count):
                for batch in images.split(batch_size):
                    model(batch)
    finally:
        for module, training in mode:
            module.training = training
    return [_layer(name, layer, tallies[name], gamma, float(omega(tallies[name].mean, _variance(tallies[name]), gamma).mean())) for name, layer in firing(model)]


def _share_range(tallies: dict[str, _Tally]) -> None:
    """One axis for all layers, so that they can be compared, unless the widest would squeeze the rest."""
    low, high = min(seen.low for seen in tallies.values()), max(seen.high for seen in tallies.values())
    if high - low <= 2 * float(np.median([seen.high - seen.low for seen in tallies.values()])):
        for seen in tallies.values():
            seen.low, seen.high = low, high


def _variance(seen: _Tally) -> Tensor:
    return seen.square / seen.weight


def _mixture(seen: _Tally, z: Tensor) -> np.ndarray:
    """The mean over steps and channels of their normal densities at z [B], with omega's deviation."""
    mean, deviation = seen.mean.flatten(), (_variance(seen).flatten() + EPSILON).sqrt()
    found = torch.zeros_like(z)
    for mu, sigma in zip(mean.split(4096), deviation.split(4096)):
        found += (torch.exp(-0.5 * ((z[:, None] - mu) / sigma) ** 2) / sigma).sum(1)
    return (found / (len(mean) * (2 * torch.pi) ** 0.5)).numpy()


def _layer(name: str, layer: Neuron, seen: _Tally, gamma: float, omega: float) -> Layer:
    edges = np.linspace(seen.low, seen.high, BINS + 1)
    surrogate, half_width = surrogate_of(layer)
    pooled = float(_variance(seen).mean() + seen.mean.var(correction=0))  # within, and between steps and channels
    return Layer(
        name=name,
        edges=edges,
        density=seen.counts / seen.total / np.diff(edges),
        mixture=_mixture(seen, torch.from_numpy((edges[:-1] + edges[1:]) / 2)),
        mean=float(seen.mean.mean()),
        deviation=max(pooled, 1e-12) ** 0.5,
        omega=omega,
        inside=seen.inside / seen.total,
        rate=seen.rate,
        gamma=gamma,
        half_width=half_width,
        surrogate=surrogate,
    )
