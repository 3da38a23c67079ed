"""Models that are random at inference: how many gradients an attack on them averages (expectation over transformation)."""

from __future__ import annotations

from torch import nn

__all__ = ["RANDOM_EOT", "default_eot", "is_random"]

#: Gradients averaged against networks that are random at inference (Ding et al. 2024, StoG).
RANDOM_EOT = 10


def is_random(model: nn.Module) -> bool:
    """Whether a layer of a network draws random numbers at inference.

    Random are encodings that draw numbers (Poisson, RSC) and neurons that fire by chance (`fire="gaussian"`), unless a seed makes
    them repeat, or the layer is quiet at inference (`NoisyLIF(inference="plain")`). Of other modules nothing is known: a random one
    says so by an attribute `random = True`.
    """
    return any(_draws(module) and getattr(module, "seed", None) is None for module in model.modules())


def _draws(module: nn.Module) -> bool:
    said = getattr(module, "random", None)
    return said if isinstance(said, bool) else getattr(module, "fire", None) == "gaussian"


def default_eot(model: nn.Module) -> int:
    """How many gradients an attack on a network averages: 10 where it is random at inference (`is_random`), else 1.

    One gradient of a random network is mostly noise, and the network looks more robust than it is (Athalye et al., ICML 2018,
    section 4.2).

    >>> attack = PGD(eps="8/255", eot=default_eot(model))
    """
    return RANDOM_EOT if is_random(model) else 1
