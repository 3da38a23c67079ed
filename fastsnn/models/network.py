"""What all networks share: from images to currents, through the layers, to logits, with statistics on the way."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import Statistics
from ..neurons import Neuron
from .options import Parts


def each_step(module: nn.Module, x: Tensor) -> Tensor:
    """Run an ordinary module on all steps at once: on `x.flatten(0, 1)`, a view.

    x: [T or 1, N, C, *S]. Returns [T or 1, N, C', *S']; channels-last steps stay so.
    """
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`each_step` of a convolution. On a CPU its maps come channels-last, whatever x is: a step of
    training is 1.3 to 1.6 times as fast there."""
    maps = conv(x.flatten(0, 1))
    if maps.device.type == "cpu":
        maps = maps.contiguous(memory_format=torch.channels_last)
    return maps.unflatten(0, x.shape[:2])


class Pass:
    """One forward pass: which statistics its spiking layers return, and those returned so far, in order."""

    def __init__(self, statistics: Sequence[str] = (), guard: tuple[float, int] | None = None) -> None:
        self.statistics, self.guard = statistics, guard
        self.found: list[Statistics] = []

    def __call__(self, neuron: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(neuron, Neuron) or (not self.statistics and self.guard is None):
            return neuron(x)
        spikes, statistics = neuron(x, statistics=self.statistics, guard=self.guard)
        self.found.append(statistics)
        return spikes


class _Count(Pass):
    """A pass that counts neurons: what its layers return for one image and step."""

    neurons = 0

    def __call__(self, neuron: nn.Module, x: Tensor) -> Tensor:
        spikes = neuron(x)
        self.neurons += spikes[0, 0].numel()
        return spikes


class _HalfSize(torch.autograd.Function):
    """Average pooling 2x2 that saves nothing: `F.avg_pool2d` would keep the spikes that it reads until the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return nn.functional.interpolate(grad * 0.25, scale_factor=2, mode="nearest")


class HalfSize(nn.Module):
    """Average pooling 2x2. x: [N, C, H, W], H and W even. Returns [N, C, H/2, W/2]."""

    def forward(self, x: Tensor) -> Tensor:
        return _HalfSize.apply(x)


class Network(nn.Module):
    """A network of spiking layers, or its ANN twin: images in, logits out.

    steps: T, 1 for an ANN. classes, image: (C, H, W). encoding, normalise: modules (normalise None: pixels as they are).
    spec: the name and options with which `build(**spec)` makes the same network, JSON-able; None where an option is
    a function or a tensor.

    A subclass calls `super().__init__(parts)`, makes its layers in the order in which they run, and writes `currents`.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.name, self.steps, self.classes, self.image = parts.model, parts.steps, parts.classes, parts.image
        self.encoding, self.normalise = parts.encoding(), parts.normalise()
        self.readout, self.steps_differ, self.threshold = parts.readout, parts.steps_differ, parts.threshold
        self.register_buffer("readout_weights", parts.readout_weights(), persistent=False)
        self.spec: dict | None = None

    def currents(self, x: Tensor, run: Pass) -> Tensor:
        """From x [T or 1, N, C, H, W] to the classifier's output [T, N, classes]; each neuron layer is called by
        `run(layer, x)`."""
        raise NotImplementedError(f"{type(self).__name__} writes no currents(x, run); wanted a subclass that does.")

    def encode(self, images: Tensor) -> Tensor:
        """What the first layer gets: images [N, C, H, W], normalised and encoded, as [T, N, C, H, W], or [1, N, C, H, W] where
        every step is the same."""
        if self.normalise is None:
            return self.encoding(images)
        if self.encoding.after_normalisation:
            return self.encoding(self.normalise(images))
        return self.normalise(self.encoding(images))

    def read(self, currents: Tensor) -> Tensor:
        """Logits [N, classes], in float32 at least, from the classifier's output [T, N, classes]."""
        if currents.dtype in (torch.float16, torch.bfloat16):
            currents = currents.float()
        if self.readout == "mean":
            return currents.mean(0)
        if self.readout == "sum":
            return currents.sum(0)
        return (currents * self.readout_weights.to(currents.dtype)).sum(0)

    def forward(self, images: Tensor, statistics: Sequence[str] = (), guard: tuple[float, int] | None = None):
        """Logits [N, classes] of images [N, C, H, W], pixels in [0, 1].

        statistics, guard: as in `fastsnn.lif`. With statistics, returns (logits, list): one `Statistics` with fields
        [T, C] for each spiking layer, in the order of `spiking_layers()`. Raises ValueError for images of another shape.

        >>> model = fastsnn.models.small_cnn(image=(1, 8, 8))
        >>> logits, statistics = model(torch.rand(2, 1, 8, 8), statistics=("mean", "var"))
        """
        self._check(images)
        run = Pass(statistics, guard)
        logits = self.read(self.currents(self.encode(images), run))
        if not statistics and guard is None:
            return logits
        if not run.found:
            raise ValueError(
                f"models.{self.name}: statistics are of spiking layers, and this network has none (an ANN); wanted statistics=(). "
                "Build it with a spiking neuron, for example neuron='if'."
            )
        return logits, run.found

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = str(images.dtype).removeprefix("torch.") if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"models.{self.name}: images are {got}; wanted a float tensor with pixels in [0, 1]. Convert bytes: images.float() / 255.")
        if images.dim() != 4 or tuple(images.shape[1:]) != self.image:
            raise ValueError(
                f"models.{self.name}: images are {list(images.shape)}; wanted [N, {', '.join(map(str, self.image))}]. "
                "Resize the images, or build the network with another image=(C, H, W)."
            )

    def spiking_layers(self) -> list[tuple[str, Neuron]]:
        """(name, layer) of every spiking layer, in the order in which they run; empty for an ANN."""
        return [(name, layer) for name, layer in self.named_modules() if isinstance(layer, Neuron)]

    def extra_repr(self) -> str:
        image = "x".join(map(str, self.image))
        return f"steps={self.steps}, classes={self.classes}, image={image}, readout={self.readout!r}"


def initialise(network: Network) -> None:
    """Convolutions Kaiming normal over fan-out, biases 0; linear weights and norms as PyTorch makes them (SNN-RAT)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def twin(model: Network, shared: bool = False) -> Network:
    """The ANN twin: the same network with ReLU in place of each spiking layer, parameters under the same names.

    shared: False copies parameters and running statistics; True shares the tensors themselves, so that the twin follows
    `model` (the attack CBA; keep it in eval mode, and make it after the model has moved to its device).

    The twin has one step, unless something in it differs between steps: an encoding other than `direct`, or
    `tebn` or `bntt`. Then ReLU runs on each of the T steps.

    >>> ann = fastsnn.models.twin(model, shared=True).eval()
    """
    if not isinstance(model, Network):
        raise TypeError(f"models.twin: model is a {type(model).__name__}; wanted a network of fastsnn.models.")
    kept = (*model.parameters(), *model.buffers()) if shared else ()
    ann = copy.deepcopy(model, {id(value): value for value in kept})
    for name, _ in ann.spiking_layers():
        ann.set_submodule(name, nn.ReLU())
    if not model.steps_differ:
        for module in ann.modules():
            if isinstance(getattr(module, "steps", None), int):
                module.steps = 1
        ann.readout_weights = torch.ones_like(ann.readout_weights[:1])
    if ann.spec is not None:
        factor = {"threshold": model.threshold} if ann.spec["norm"] == "tdbn" else {}  # of the neurons that are gone
        ann.spec |= {"neuron": "relu", "neuron_options": None, "steps": ann.steps, "norm_options": {**factor, **(ann.spec["norm_options"] or {})} or None}
    if not shared:
        for parameter in ann.parameters():
            parameter.grad = None
    return ann


def count_neurons(model: Network) -> int:
    """Neurons of a network for one image: the elements that its spiking layers (or ReLU) return for one step."""
    weight = next(model.parameters())
    run = _Count()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model.currents(torch.zeros(1, 1, *model.image, dtype=weight.dtype, device=weight.device), run)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return run.neurons


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
