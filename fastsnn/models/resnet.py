"""Networks with branches: the wide WRN-16-4 and ResNet-20."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .network import Network, Pass, convolve, initialise
from .options import Parts, model


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Combine(nn.Module):
    """`c1*shortcut + c2*branch` with learned scalars, `weights` = (c1, c2), from 1/2 (SNN-RAT)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return self.weights[0] * shortcut + self.weights[1] * branch


class PreActivation(nn.Module):
    """A block of WRN: norm, neurons, convolution, twice. Where the shape changes, the shortcut is a convolution 1x1 of the
    spikes, else the block's input itself."""

    def __init__(self, parts: Parts, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.neuron1, self.conv1 = parts.norm(inputs), parts.neuron(), conv(inputs, channels, 3, stride)
        self.norm2, self.neuron2, self.conv2 = parts.norm(channels), parts.neuron(), conv(channels, channels, 3)
        self.shortcut = conv(inputs, channels, 1, stride) if stride != 1 or inputs != channels else None
        self.combine = Combine()

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        spikes = run(self.neuron1, self.norm1(x))
        if self.shortcut is not None:
            x = convolve(self.shortcut, spikes)
        spikes = run(self.neuron2, self.norm2(convolve(self.conv1, spikes)))
        return self.combine(x, convolve(self.conv2, spikes))


class WideResNet(Network):
    """Groups of `PreActivation` blocks, the first of a group with its stride, then norm, neurons, average and classifier."""

    def __init__(self, parts: Parts, widths: tuple[int, ...], blocks: int, bias: bool) -> None:
        super().__init__(parts)
        channels = 16
        self.conv = conv(self.image[0], channels, 3)
        self.blocks = nn.ModuleList()
        for group, width in enumerate(widths):
            for block in range(blocks):
                self.blocks.append(PreActivation(parts, channels, width, 2 if group and not block else 1))
                channels = width
        self.norm, self.neuron = parts.norm(channels), parts.neuron()
        self.classifier = nn.Linear(channels, self.classes, bias=bias)
        initialise(self)

    def currents(self, x: Tensor, run: Pass) -> Tensor:
        x = convolve(self.conv, x)
        for block in self.blocks:
            x = block(x, run)
        return self.classifier(run(self.neuron, self.norm(x)).mean((-2, -1)))


class Basic(nn.Module):
    """A block of ResNet-20: convolution, norm, neurons, convolution, norm, combination with the shortcut, neurons. Where the
    shape changes, the shortcut is a convolution 1x1 and norm, else the block's input itself."""

    def __init__(self, parts: Parts, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        alpha = 1 / math.sqrt(2)  # tdBN (Zheng et al., AAAI 2021): two branches meet
        self.conv1, self.norm1, self.neuron1 = conv(inputs, channels, 3, stride), parts.norm(channels), parts.neuron()
        self.conv2, self.norm2 = conv(channels, channels, 3), parts.norm(channels, alpha)
        self.shortcut = self.shortcut_norm = None
        if stride != 1 or inputs != channels:
            self.shortcut, self.shortcut_norm = conv(inputs, channels, 1, stride), parts.norm(channels, alpha)
        self.combine = Combine()
        self.neuron2 = parts.neuron()

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        spikes = run(self.neuron1, self.norm1(convolve(self.conv1, x)))
        if self.shortcut is not None:
            x = self.shortcut_norm(convolve(self.shortcut, x))
        branch = self.norm2(convolve(self.conv2, spikes))
        return run(self.neuron2, self.combine(x, branch))


class ResNet(Network):
    """Convolution, norm, neurons, groups of `Basic` blocks, average and classifier."""

    def __init__(self, parts: Parts, widths: tuple[int, ...], blocks: int, bias: bool) -> None:
        super().__init__(parts)
        channels = widths[0]
        self.conv, self.norm, self.neuron = conv(self.image[0], channels, 3), parts.norm(channels), parts.neuron()
        self.blocks = nn.ModuleList()
        for group, width in enumerate(widths):
            for block in range(blocks):
                self.blocks.append(Basic(parts, channels, width, 2 if group and not block else 1))
                channels = width
        self.classifier = nn.Linear(channels, self.classes, bias=bias)
        initialise(self)

    def currents(self, x: Tensor, run: Pass) -> Tensor:
        x = run(self.neuron, self.norm(convolve(self.conv, x)))
        for block in self.blocks:
            x = block(x, run)
        return self.classifier(x.mean((-2, -1)))


@model()
def wrn16_4(parts: Parts, *, bias: bool = True) -> WideResNet:
    """WRN-16-4 with neurons before each convolution: 475,136 neurons for images of 32x32, 2,748,902 parameters with 10
    classes, 2,772,032 with 100.

    A convolution of 16 channels, three groups of two blocks with 64, 128 and 256 (strides 1, 2, 2), norm, neurons, average,
    classifier. Blocks end in a learned combination, `Combine`, of shortcut and branch, with no norm there: tdBN keeps
    alpha = 1. bias: of the classifier; convolutions have none. Images of any size.
    """
    return WideResNet(parts, (64, 128, 256), 2, bias)


@model()
def resnet20(parts: Parts, *, bias: bool = False) -> ResNet:
    """ResNet-20: 188,416 neurons for images of 32x32, 272,482 parameters with 10 classes.

    A convolution of 16 channels, three groups of three blocks with 16, 32 and 64 (strides 1, 2, 2), average, classifier.
    Shortcut and branch meet in a learned combination, `Combine`; tdBN's alpha is 1/sqrt(2) in the norms before it.
    bias: of the classifier; the count is without. Images of any size.
    """
    return ResNet(parts, (16, 32, 64), 3, bias)
