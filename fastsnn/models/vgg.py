"""Networks without branches: VGG11, its form for 64x64 images, VGG16, and a small one for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .dropout import make_dropout
from .network import HalfSize, Network, Pass, convolve, each_step, initialise
from .options import Parts, model


class ConvStage(nn.Module):
    """Convolution 3x3, norm, neurons, and dropout where there is one."""

    def __init__(self, parts: Parts, inputs: int, channels: int, bias: bool, dropout: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=bias)
        self.norm = parts.norm(channels)
        self.neuron = parts.neuron()
        self.dropout = dropout

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        x = run(self.neuron, self.norm(convolve(self.conv, x)))
        return x if self.dropout is None else self.dropout(x)


class LinearStage(nn.Module):
    """Linear layer, neurons, dropout."""

    def __init__(self, parts: Parts, inputs: int, outputs: int, bias: bool, dropout: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.neuron = parts.neuron()
        self.dropout = dropout

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        return self.dropout(run(self.neuron, self.linear(x)))


class VGG(Network):
    """Stages of convolutions, pools, stages of linear layers, and a classifier without neurons.

    plan: channels of each convolution, and "A" for an average pooling 2x2. head: widths of the linear stages.
    average: whether the last maps are averaged to one value per channel. dropout, everywhere, over_steps: its share; whether
    it follows the neurons of convolutions too; whether its mask is the same at every step.
    """

    def __init__(
        self,
        parts: Parts,
        plan: Sequence[int | str],
        head: Sequence[int],
        bias: bool,
        dropout: float = 0.0,
        everywhere: bool = False,
        over_steps: bool = False,
        average: bool = False,
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"models.{parts.model}: dropout is {dropout!r}; wanted a number in [0, 1).")
        for name, value in (("dropout_everywhere", everywhere), ("dropout_over_steps", over_steps)):
            if not isinstance(value, bool):
                raise TypeError(f"models.{parts.model}: {name} is {value!r}; wanted True or False.")
        height, width = parts.halves(plan.count("A"))
        super().__init__(parts)
        self.average = average
        self.features, self.head = nn.ModuleList(), nn.ModuleList()
        channels = self.image[0]
        for item in plan:
            if item == "A":
                self.features.append(HalfSize())
            else:
                after = make_dropout(dropout, over_steps) if everywhere and dropout else None
                self.features.append(ConvStage(parts, channels, item, bias, after))
                channels = item
        inputs = channels if average else channels * height * width
        for outputs in head:
            self.head.append(LinearStage(parts, inputs, outputs, bias, make_dropout(dropout, over_steps)))
            inputs = outputs
        self.classifier = nn.Linear(inputs, self.classes, bias=bias)
        initialise(self)

    def currents(self, x: Tensor, run: Pass) -> Tensor:
        for stage in self.features:
            x = stage(x, run) if isinstance(stage, ConvStage) else each_step(stage, x)
        x = x.mean((-2, -1)) if self.average else x.flatten(2)
        for stage in self.head:
            x = stage(x, run)
        return self.classifier(x)


@model()
def vgg11(parts: Parts, *, bias: bool = True, dropout: float = 0.0, dropout_everywhere: bool = False, dropout_over_steps: bool = False) -> VGG:
    """VGG11 with two linear layers of 4,096: 286,720 neurons for images of 32x32.

    Convolutions of 64, A, 128, 256, A, 512, 512, 512, A, 512, 512 channels, each followed by norm and neurons; A is average
    pooling 2x2. No norm in the head. Height and width must be divisible by 8.

    bias: True as in SNN-RAT (61,377,034 parameters with 10 classes, 61,745,764 with 100), False for
    61,365,824 and 61,734,464. dropout: after the neurons of the head, in training; 0.2 in robust conversion.
    dropout_everywhere: after those of the convolutions too. dropout_over_steps: one mask for all steps, in place of one for
    each (HIRE-SNN, with 0.2).

    >>> model = fastsnn.models.vgg11(classes=10, steps=8, norm="tdbn", normalise="cifar10")
    """
    return VGG(parts, (64, "A", 128, 256, "A", 512, 512, 512, "A", 512, 512), (4096, 4096), bias, dropout, dropout_everywhere, dropout_over_steps)


@model(image=(3, 64, 64), classes=200)
def vgg11_tiny(parts: Parts, *, bias: bool = False, dropout: float = 0.0, dropout_everywhere: bool = False, dropout_over_steps: bool = False) -> VGG:
    """VGG11 for Tiny-ImageNet: 610,304 neurons for images of 64x64, 12,139,584 parameters with 200 classes.

    64, A, 128, A, 256, 256, A, 512, 512, A, 512, 512, each map averaged, then 4,096 neurons. Height and width must be
    divisible by 16. bias, dropout and its kinds: as in `vgg11`; the count is without bias.
    """
    return VGG(parts, (64, "A", 128, "A", 256, 256, "A", 512, 512, "A", 512, 512), (4096,), bias, dropout, dropout_everywhere, dropout_over_steps, average=True)


@model()
def vgg16(parts: Parts, *, bias: bool = False, dropout: float = 0.0, dropout_everywhere: bool = False, dropout_over_steps: bool = False) -> VGG:
    """VGG16: 284,672 neurons for images of 32x32, 33,634,240 parameters with 10 classes.

    13 convolutions, 5 pools, and two linear layers of 4,096. Height and width must be divisible by 32.
    bias, dropout and its kinds: as in `vgg11`; the count is without bias.
    """
    plan = (64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512, "A")
    return VGG(parts, plan, (4096, 4096), bias, dropout, dropout_everywhere, dropout_over_steps)


@model()
def small_cnn(
    parts: Parts,
    *,
    widths: Sequence[int] = (32, 64, 128),
    bias: bool = True,
    dropout: float = 0.0,
    dropout_everywhere: bool = False,
    dropout_over_steps: bool = False,
) -> VGG:
    """A network that trains on a CPU: one convolution for each width, average pooling 2x2 between them, each map averaged.

    Height and width must be divisible by 2**(len(widths) - 1): 8x8, 28x28 and 32x32 are, with three widths.
    There is no head: dropout is nothing without dropout_everywhere; dropout and its kinds as in `vgg11`.
    Few operations: images of 32x32 train with T = 4 at some 350 a second on two cores, 1,000 with widths=(16, 32, 64).
    """
    whole = isinstance(widths, (tuple, list)) and all(isinstance(width, int) and width > 0 for width in widths)
    if not whole or not widths:
        raise ValueError(f"models.small_cnn: widths is {widths!r}; wanted a tuple of ints >= 1, the channels of each convolution.")
    plan = [item for width in widths for item in (width, "A")][:-1]
    return VGG(parts, plan, (), bias, dropout, dropout_everywhere, dropout_over_steps, average=True)
