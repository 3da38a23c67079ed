"""Defenses that are networks: plain cross-entropy, in a network whose neurons, encoding or normalisation make it robust.

    model = fastsnn.models.vgg11(steps=8, **FEEL.needs)
    loss = FEEL().loss(model, images, labels)

They add up with defenses that train otherwise: `FEEL() + AT()`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..paper_neurons import EvolutionaryLIF
from .base import Defense, Run

__all__ = ["BNTT", "FEEL", "RSC", "NetworkDefense", "Poisson"]


class NetworkDefense(Defense):
    """The base of defenses that are networks: `needs` says which; `prepare` refuses others, and says which options to set."""

    def prepare(self, model: nn.Module) -> None:
        spec = getattr(model, "spec", None)
        if spec is None:
            raise ValueError(
                f"{type(self).__name__}: of this {type(model).__name__} it is not known how it was made; wanted a network of fastsnn.models "
                f"with {_listed(self.needs)}, its options names and numbers."
            )
        missing = {option: value for option, value in self.needs.items() if not _holds(spec[option], value)}
        if missing:
            raise ValueError(
                f"{type(self).__name__}: the network has {_listed({option: spec[option] for option in missing})}; wanted {_listed(missing)}. "
                f"On the command line: fastsnn train {' '.join(_argument(*item) for item in missing.items())}."
            )


class FEEL(NetworkDefense):
    """FEEL-SNN: cross-entropy in a network that sees fewer frequencies at each step (`encodings.Frequency`) and learns the leak of each
    neuron and step (`EvolutionaryLIF`).

    Leaks have the optimiser and the weight decay of the other parameters. Published: 300 epochs, weight decay 5e-4, no input normalisation (the encoding takes pixels). Reports "leak", the mean of lambda.
    Source: Xu et al., NeurIPS 2024.

    >>> model = fastsnn.models.vgg11(steps=8, neuron="feel", encoding="frequency", norm="bn")
    """

    name = "feel"
    needs = {"neuron": "feel", "encoding": "frequency"}

    def report(self, run: Run) -> dict[str, Tensor]:
        leaks = [layer.decay.detach().flatten() for layer in run.model.modules() if isinstance(layer, EvolutionaryLIF)]
        return {"leak": torch.cat(leaks).mean()}


class Poisson(NetworkDefense):
    """Rate coding as a defense: cross-entropy in a network whose input spikes with the probability of the pixel (`encodings.Poisson`).

    Random at inference: an attack on it averages gradients (`attacks.default_eot`). Source: Sharmin et al., ECCV 2020.

    >>> model = fastsnn.models.vgg11(steps=8, encoding="poisson")
    """

    name = "poisson"
    needs = {"encoding": "poisson"}


class RSC(NetworkDefense):
    """Randomised smoothing coding: cross-entropy in a network whose input is the image and fresh normal noise at each step (`encodings.RSC`).

    The deviation is the encoding's option sigma. Random at inference: an attack on it averages gradients (`attacks.default_eot`).
    Source: RSC-SNN, Wu et al., 2024; trained by plain cross-entropy is a reading.

    >>> model = fastsnn.models.vgg11(steps=8, encoding="rsc", encoding_options={"sigma": 0.1})
    """

    name = "rsc"
    needs = {"encoding": "rsc"}


class BNTT(NetworkDefense):
    """Batch normalisation through time: cross-entropy in a network with a batch norm for each step (`norm.BNTT`) and signed Poisson input.

    The published network has further `norm_options={"bias": False}`, `neuron="lif"`, `neuron_options={"decay": 0.99, "reset": "soft", "fire":
    "gt", "surrogate": "triangle:1.0,0.3"}`, no bias in its layers, and readout "mean": in the public code the output's membrane adds up over the
    steps without a leak and is divided by T. Random at inference: an attack on it averages gradients, 2 in the papers that attack it.
    Source: Kim & Panda, Frontiers in Neuroscience 2021.

    >>> model = fastsnn.models.vgg11(steps=25, norm="bntt", encoding="poisson", encoding_options={"signed": True}, normalise="cifar10")
    """

    name = "bntt"
    needs = {"norm": "bntt", "encoding": "poisson", "encoding_options": {"signed": True}}


def _holds(found: object, wanted: object) -> bool:
    """Whether an option has the wanted value, a table of options at least the wanted entries."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(key in found and _holds(found[key], value) for key, value in wanted.items())
    return found == wanted


def _listed(options: Mapping) -> str:
    return ", ".join(f"{option}={value!r}" for option, value in options.items())


def _argument(option: str, value: object) -> str:
    words = " ".join(f"{key}={json.dumps(entry)}" for key, entry in value.items()) if isinstance(value, Mapping) else value
    return f"--{option.replace('_', '-')} {words}"
