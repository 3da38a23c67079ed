"""How near the rates of a plainly converted network are to the activations of its ANN."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..models import Network
from .draft import frozen

__all__ = ["rate_errors"]


def rate_errors(ann: Network, snn: Network, images: Tensor, steps: Sequence[int]) -> dict[str, list[list[float]]]:
    """For each spiking layer [[T, error], ...], `error = sum |theta*rate - a| / sum |a|` over neurons and images, a the activation of the ANN's ReLU.

    ann: of `fastsnn.models`, with neuron="relu"; snn: what `convert(ann, ..., method="plain")` made of it, run with each T of `steps`.
    images: [N, C, H, W] float. With a soft reset and no leak a first layer is off by less than theta/T, and the layers after it by what theirs adds:
    the error falls like 1/T (Rueckauer et al., 2017, eq. 6). Raises ValueError where the layers of the two networks are not the same.

    >>> rate_errors(ann, snn, images, (8, 32, 128))["features.0.neuron"]
    """
    from ..coding import with_steps

    wanted = _outputs(ann, {name: layer for name, layer in ann.named_modules() if isinstance(layer, nn.ReLU)}, images)
    found: dict[str, list[list[float]]] = {name: [] for name, _ in snn.spiking_layers()}
    if set(found) != set(wanted):
        raise ValueError(f"rate_errors: the layers of snn are {', '.join(found)}, of ann {', '.join(wanted)}; wanted a network and what it was converted to.")
    for count in steps:
        network = with_steps(snn, count)
        layers = dict(network.spiking_layers())
        for name, rate in _outputs(network, layers, images).items():
            error = (layers[name].threshold * rate - wanted[name]).abs().sum() / wanted[name].abs().sum()
            found[name].append([count, error.item()])
    return found


def _outputs(network: Network, layers: dict[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    """The mean over steps of what each layer returns, [N, C, *S]."""
    found: dict[str, Tensor] = {}
    with frozen(network), ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(lambda _, inputs, out, name=name: found.__setitem__(name, out.mean(0)))
            stack.callback(handle.remove)
        network(images)
    return found
