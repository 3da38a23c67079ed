"""What an attack does to a trained network on a few images: images, spikes, and the loss around images and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import landscapes
from ..activity import LayerDistance, singular_values, spike_distance
from ..attacks import PGD, UniformNoise, default_eot
from ..landscapes import Landscape
from ..pictures import Example
from .membranes import firing

__all__ = ["STEPS", "Attacked", "attack"]

#: Of the attack that is shown, and points along each axis of a landscape.
STEPS, POINTS = 7, 11
#: How far landscapes go: in eps, and in the norms of the filters.
REACH = {"pixels": 1.0, "weights": 0.5}


@dataclass(frozen=True)
class Attacked:
    """What was found: eps in pixels; sparsity of the input gradient, each a mean over images; distances by kind of change; spectra by layer."""

    eps: float
    examples: Sequence[Example]
    sparsity: dict[str, float]
    surfaces: Sequence[Landscape]
    distances: dict[str, Sequence[LayerDistance]] = field(default_factory=dict)
    spectra: dict[str, Sequence[float]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The numbers, as JSON can hold them."""
        return {
            "eps": self.eps,
            "images": len(self.examples),
            "sparsity": self.sparsity,
            "spikes": {kind: [dataclasses.asdict(layer) for layer in layers] for kind, layers in self.distances.items()},
            "landscapes": [
                {"space": one.space, "directions": list(one.directions), **{name: getattr(one, name).tolist() for name in ("a", "b", "loss", "accuracy")}}
                for one in self.surfaces
            ],
        }


def attack(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Attacked:
    """PGD with seed 0 on some images, in the l-infinity ball of eps, with everything that the pictures show of it.

    images: [N, C, H, W] float in [0, 1], on the model's device; labels: [N] int64 there too. The model is left as it was.
    """
    # The seed's numbers serve models that are random at inference; torch's generators come back as they were.
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        found = PGD(eps, steps=STEPS, seed=0, eot=default_eot(model))(model, images, labels)
        noisy = UniformNoise(eps, seed=0)(model, images, labels)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                before, after = model(images).argmax(1), model(found).argmax(1)
        finally:
            for module, training in modes:
                module.training = training
    gradient = landscapes.input_gradient(model, images, labels)
    spread = {name: float(value.nanmean()) for name, value in landscapes.sparsity(gradient)._asdict().items()}
    arrays = [value.float().cpu().numpy() for value in (images, found, gradient)]
    numbers = [value.tolist() for value in (labels, before, after)]
    surfaces = [
        landscapes.pixels(model, images, labels, eps, points=POINTS, reach=REACH["pixels"]),
        landscapes.weights(model, images, labels, points=POINTS, reach=REACH["weights"]),
    ]
    changes = {f"PGD-{STEPS}": found, "uniform noise": noisy} if firing(model) else {}
    return Attacked(
        eps,
        [Example(*each) for each in zip(*arrays, *numbers)],
        {name: value for name, value in spread.items() if value == value},
        surfaces,
        {kind: spike_distance(model, images, changed) for kind, changed in changes.items()},
        {name: values.tolist() for name, values in singular_values(model).items()},
    )
