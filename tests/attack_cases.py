"""What tests of attacks share: images, small models, every attack with a small budget."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from fastsnn import LIF
from fastsnn.attacks import ATTACKS, Attack, attack_options, make_attack
from torch import Tensor, nn

EPS = 8 / 255

#: Options that keep an attack cheap; each is given to the attacks that have it.
SMALL = {"steps": 2, "budget": 12, "targets": 2, "target_classes": 2, "classes": 2, "members": ("triangle-1", "bptr")}


def small(name: str, eps: float | str = EPS, **options) -> Attack:
    """The attack of that name with a small budget."""
    known = set(attack_options(name)) - ({"members"} if "adjoint" in options else set())  # of an ensemble, adjoint is its one member
    return make_attack(name, **{"eps": eps, **{key: value for key, value in SMALL.items() if key in known}, **options})


def asks(*access: str) -> tuple[str, ...]:
    """The names of the attacks that ask a model for this."""
    return tuple(name for name, attack in ATTACKS.items() if attack.access in access)


def targetable() -> list[str]:
    """The names of the attacks that ask the model for something and take targeted=True."""
    found = []
    for name in asks("gradient", "scores", "decisions"):
        try:
            small(name, targeted=True)
        except ValueError as error:
            assert "targeted" in str(error)
            continue
        found.append(name)
    return found


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


X, Y = draw(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 1, 0])


def cnn(seed: int = 0) -> nn.Module:
    """A model that has nothing to do with spikes, with everything whose mode matters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 4))


class Spiking(nn.Module):
    def __init__(self, neuron: nn.Module | None = None, steps: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.neuron, self.out, self.steps = nn.Conv2d(3, 8, 3), neuron or LIF(decay=0.9), nn.Linear(8 * 36, 4), steps

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images * 4)[None].expand(self.steps, *(-1,) * 4).contiguous()
        return self.out(self.neuron(x).flatten(2)).mean(0)


class Pixels(nn.Module):
    """Logits without a sum over pixels: no rounding that depends on the batch."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1)[:, :4] - 0.5) * 3 * images.flatten(1)[:, 4:8]


class Returns(nn.Module):
    """A model that returns what a function makes of four pixels."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor):
        return self.function(images.flatten(1)[:, :4])


MODELS = {"cnn": cnn, "spiking": Spiking}


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, loss=None) -> Tensor:
    """The gradient of the cross-entropy (or of `loss`) in eval mode, by plain PyTorch."""
    modes = [module.training for module in model.modules()]
    x = x.clone().requires_grad_()
    logits = model.eval()(x)
    objective = F.cross_entropy(logits, y, reduction="sum") if loss is None else loss(logits, y).sum()
    for module, mode in zip(model.modules(), modes):
        module.training = mode
    return torch.autograd.grad(objective, x)[0]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    rest = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    return rest - logits.gather(1, labels[:, None])[:, 0]
