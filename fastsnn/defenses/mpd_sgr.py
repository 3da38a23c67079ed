"""MPD-SGR: move membranes out of the surrogate's window."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..adjoints import nearest
from ..distributed import moments
from ..functional import Statistics
from .base import Defense, Run

__all__ = ["MPDSGR", "mean_omega", "omega"]

AVERAGES = ("layers", "flat")
#: Added to the variance, so that a channel that never moves has a finite gradient.
EPSILON = 1e-5


def omega(mean: Tensor, var: Tensor, gamma: float = 1.0) -> Tensor:
    """The share of a normal membrane within gamma of the threshold: `Phi((mu + gamma)/sigma) - Phi((mu - gamma)/sigma)`.

    mean, var: [*] float32 or float64, of z = h - threshold, in units of potential; `sigma = sqrt(var + 1e-5)`.
    gamma: half the window's width, in units of potential. Returns [*] in [0, 1], differentiable.
    Source: MPD-SGR, AAAI 2026 (arXiv 2511.12199).

    >>> omega(torch.tensor(0.0), torch.tensor(1.0 - 1e-5))
    tensor(0.6827)
    """
    # Phi(-x) = erfc(x / sqrt 2) / 2. Omega is even in the mean, and on this side both are tails whose difference keeps its
    # digits: torch.special.ndtr is 0 or 1 there in float32.
    scale, far = (2 * (var + EPSILON)).sqrt(), mean.abs()
    return 0.5 * (torch.erfc((far - gamma) / scale) - torch.erfc((far + gamma) / scale))


def mean_omega(statistics: list[Statistics], gamma: float = 1.0, average: str = "layers", group=None) -> Tensor:
    """The mean of Omega over steps and channels of all layers, a scalar.

    statistics: mean and var [T, C] of each spiking layer. average: "layers", the mean over layers of each layer's mean;
    "flat", the mean over all (layer, step, channel). group: as in `Defense.step`.
    """
    means = torch.cat([entry.mean.flatten() for entry in statistics])
    variances = torch.cat([entry.var.flatten() for entry in statistics])
    values = omega(*moments(means, variances, group), gamma)
    if average == "flat":
        return values.mean()
    return torch.stack([part.mean() for part in values.split([entry.mean.numel() for entry in statistics])]).mean()


class MPDSGR(Defense):
    """Membrane potential distribution - surrogate gradient regularisation: `loss + eta * mean of Omega` (`omega`).

    eta: the weight, about 0.05 (searched 0.01 ... 0.1). gamma: half the width of the window around the threshold, in
    units of potential; 1 for Triangle(1.0). average: "layers" (the mean over layers of each layer's mean over steps and
    channels) or "flat", in which layers with many channels count more. In a linear layer each neuron is a channel.

    Reports "omega", unweighted. Source: MPD-SGR, AAAI 2026 (arXiv 2511.12199).

    >>> loss = MPDSGR(eta=0.05, gamma=1.0).loss(model, images, labels)
    """

    name = "mpd-sgr"
    statistics = ("mean", "var")

    def __init__(self, eta: float = 0.05, gamma: float = 1.0, average: str = "layers") -> None:
        if not 0 <= eta < math.inf:
            raise ValueError(f"MPDSGR: eta is {eta}; wanted a finite number >= 0, such as 0.05.")
        if not 0 < gamma < math.inf:
            raise ValueError(f"MPDSGR: gamma is {gamma}; wanted a finite number > 0, in units of potential.")
        if average not in AVERAGES:
            raise ValueError(f"MPDSGR: average {average!r} is unknown; wanted one of {', '.join(AVERAGES)}.{nearest(average, AVERAGES)}")
        self.eta, self.gamma, self.average = float(eta), float(gamma), average

    def penalty(self, run: Run) -> dict[str, Tensor]:
        if not run.statistics:
            raise ValueError("MPDSGR: the model has no spiking layer; wanted one that fires, such as fastsnn.LIF. Leave the defense out for its ANN twin.")
        value = mean_omega(run.statistics, self.gamma, self.average, run.group)
        run.notes["omega"] = value.detach()
        return {self.name: self.eta * value}

    def report(self, run: Run) -> dict[str, Tensor]:
        return {"omega": run.notes["omega"]}
