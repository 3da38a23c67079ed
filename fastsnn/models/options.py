"""The options that all networks share: checked once, and turned into layers."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import encodings, norm, surrogates
from ..adjoints import nearest
from ..neurons import IF, LIF, Neuron, NoisyLIF, ParametricLIF
from ..paper_neurons import DynamicLIF, EvolutionaryLIF, Fitted, GatedLIF

READOUTS = ("mean", "sum", "membrane")

#: Mean and standard deviation of pixels in [0, 1], per channel; None: pixels as they are.
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]] | None] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "tiny": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": None,
}

_DYNAMICS = ("threshold", "reset", "v_reset", "fire", "surrogate", "detach_reset", "learn", "backend")


@dataclass(frozen=True)
class Kind:
    """A neuron by name: its class, the options that it takes, and those that the class calls otherwise."""

    make: type[nn.Module]
    takes: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


NEURONS = {
    "if": Kind(IF, _DYNAMICS),
    "lif": Kind(LIF, (*_DYNAMICS, "decay", "tau", "charge")),
    "plif": Kind(ParametricLIF, (*_DYNAMICS, "tau", "decay_input"), (("tau", "init_tau"),)),
    "noisy": Kind(NoisyLIF, (*(name for name in _DYNAMICS if name != "fire"), "decay", "sigma", "variance", "inference")),
    "feel": Kind(EvolutionaryLIF, (*_DYNAMICS, "decay")),
    "dlif": Kind(DynamicLIF, (*_DYNAMICS, "decay")),
    "stog": Kind(GatedLIF, (*_DYNAMICS, "decay", "lowest", "temperature")),
    "relu": Kind(nn.ReLU),
}

#: The options of every builder, with the defaults of most.
SHARED: dict[str, object] = {
    "classes": 10,
    "image": (3, 32, 32),
    "steps": 4,
    "norm": "tdbn",
    "norm_options": None,
    "encoding": "direct",
    "encoding_options": None,
    "neuron": "if",
    "neuron_options": None,
    "normalise": None,
    "readout": "mean",
}


def surrogate_from(text: str) -> surrogates.Surrogate:
    """A surrogate from its name and parameters: `name`, `name:a`, `name:a,b`, and `relative` after those.

    Raises ValueError for unknown names and for numbers that the surrogate refuses.

    >>> surrogate_from("exponential:0.3,1.0")
    Exponential(height=0.3, slope=1)
    """
    name, _, values = text.partition(":")
    known = surrogates.BY_NAME
    name = name.strip().replace("-", "_")
    if name not in known:
        raise ValueError(f"surrogate: {name!r} is unknown; wanted one of {', '.join(known)}, as in 'triangle:1.0'.{nearest(name, tuple(known))}")
    words = [word.strip() for word in values.split(",") if word.strip()]
    relative = "relative" in words
    most = len(known[name].parameters)
    try:
        numbers = [float(word) for word in words if word != "relative"]
    except ValueError:
        numbers = None
    if numbers is None or len(numbers) > most:
        names = ",".join(known[name].parameters)
        raise ValueError(f"surrogate: got {text!r}; wanted {name}{':' * bool(names)}{names} with at most {most} numbers, and ',relative' where z/threshold is meant.")
    return known[name](*numbers, relative=relative)


def surrogate_text(surrogate: surrogates.Surrogate) -> str | None:
    """What `surrogate_from` reads; None where a parameter is a tensor."""
    values = [getattr(surrogate, name) for name in surrogate.parameters]
    if any(isinstance(value, Tensor) for value in values):
        return None
    words = [repr(value) for value in values] + ["relative"] * surrogate.relative
    return surrogate.name + (":" + ",".join(words) if words else "")


class Normalise(nn.Module):
    """`(x - mean) / std` per channel. x: [..., C, H, W]. The buffers are constants of the network, not of its state."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.get_default_dtype())[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.get_default_dtype())[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


class Parts:
    """The shared options of one network, checked, and the layers that they stand for.

    steps: T; 1 for an ANN that is the same in each step. threshold, decay: the neurons' first values, as numbers.
    """

    def __init__(self, model: str, options: dict) -> None:
        self.model, self.options = model, options
        self.classes = self._whole("classes", 1)
        self._image()
        steps = self._whole("steps", 1)
        self.readout = self._one_of("readout", READOUTS)
        self._one_of("norm", tuple(norm.NORMS))
        self._one_of("encoding", tuple(encodings.ENCODINGS))
        self._make_neuron, self._neuron_name = self._neuron_maker()
        first = self._make_neuron()
        self.spiking = isinstance(first, Neuron)
        self.steps_differ = options["encoding"] != "direct" or options["norm"] in ("tebn", "bntt")
        self.steps = steps if self.spiking or self.steps_differ else 1
        self.threshold = _number(getattr(first, "threshold", 1.0), 1.0)
        tau = getattr(first, "tau", None)
        if isinstance(first, ParametricLIF):
            tau = 1 / first.w.detach().sigmoid()
        self.decay = _number(getattr(first, "decay", None), 1.0) if tau is None else 1 - 1 / _number(tau, 2.0)
        self._normalisation()

    def neuron(self) -> nn.Module:
        """A new layer of neurons, for T steps."""
        layer = self._make_neuron()
        if isinstance(layer, Neuron):
            if layer.merged or layer.stateful or layer.steps not in (None, self.steps):
                raise ValueError(
                    f"models.{self.model}: neuron made {layer!r}; wanted a layer without merged and stateful, and without steps or with steps={self.steps}. "
                    "Leave those to the network."
                )
            layer.steps = self.steps
        return layer

    def norm(self, channels: int, alpha: float = 1.0) -> nn.Module:
        """A new normalisation. alpha: tdBN's factor, 1/sqrt(2) where two branches meet in a sum."""
        options = dict(self.options["norm_options"] or {})
        if self.options["norm"] == "tdbn":
            options["alpha"] = alpha * options.get("alpha", 1.0)
            options.setdefault("threshold", self.threshold)
        return norm.make_norm(self.options["norm"], channels, self.steps, **options)

    def encoding(self) -> nn.Module:
        return encodings.make_encoding(self.options["encoding"], self.steps, **(self.options["encoding_options"] or {}))

    def normalise(self) -> Normalise | None:
        return None if self.statistics is None else Normalise(*self.statistics)

    def readout_weights(self) -> Tensor:
        """[T, 1, 1]: the mean over t of `v[t] = decay*v[t-1] + x[t]` as a weighted sum of x."""
        return torch.tensor([sum(self.decay**k for k in range(self.steps - t)) / self.steps for t in range(self.steps)])[:, None, None]

    def spec(self, family: dict) -> dict | None:
        """Name and options as JSON would hand them back; None where an option is a function or a tensor."""
        options = {"name": self.model, **self.options, **family}
        options["neuron"] = self._neuron_name
        options["steps"] = self.steps
        chosen = dict(options["neuron_options"] or {})
        if isinstance(chosen.get("surrogate"), surrogates.Surrogate):
            chosen["surrogate"] = surrogate_text(chosen["surrogate"])
            if chosen["surrogate"] is None:
                return None
        options["neuron_options"] = chosen or None
        if self._neuron_name is None:
            return None
        try:
            return json.loads(json.dumps(options))
        except TypeError:
            return None

    def _neuron_maker(self) -> tuple[Callable[[], nn.Module], str | None]:
        neuron, options = self.options["neuron"], dict(self.options["neuron_options"] or {})
        by_class = {kind.make: name for name, kind in NEURONS.items()}
        if neuron in by_class:
            neuron = by_class[neuron]
        if not isinstance(neuron, str):
            if not callable(neuron) or isinstance(neuron, nn.Module):
                raise TypeError(
                    f"models.{self.model}: neuron is {neuron!r}; wanted a name ({', '.join(NEURONS)}) or a callable that makes a module, "
                    "such as functools.partial(fastsnn.LIF, decay=0.9)."
                )
            return functools.partial(neuron, **options), None
        if neuron not in NEURONS:
            raise ValueError(f"models.{self.model}: neuron {neuron!r} is unknown; wanted one of {', '.join(NEURONS)}.{nearest(neuron, tuple(NEURONS))}")
        kind = NEURONS[neuron]
        for name in options:
            if name not in kind.takes:
                takes = ", ".join(kind.takes) or "no options"
                raise TypeError(f"models.{self.model}: neuron {neuron!r} has no option {name!r}; it takes {takes}.{nearest(name, kind.takes)}")
        if isinstance(options.get("surrogate"), str):
            options["surrogate"] = surrogate_from(options["surrogate"])
        if isinstance(options.get("learn"), list):
            options["learn"] = tuple(options["learn"])
        renamed = dict(kind.renamed)
        return functools.partial(kind.make, **{renamed.get(name, name): value for name, value in options.items()}), neuron

    def _normalisation(self) -> None:
        given, encoding = self.options["normalise"], self.encoding()
        if isinstance(given, str):
            if given not in NORMALISATIONS:
                known = tuple(NORMALISATIONS)
                raise ValueError(f"models.{self.model}: normalise {given!r} is unknown; wanted one of {', '.join(known)}, or (mean, std).{nearest(given, known)}")
            # A name says which data they are; some encodings take them as pixels all the same.
            given = None if encoding.normalises is False else NORMALISATIONS[given]
        self.statistics = None
        if given is None:
            return
        if encoding.normalises is False:
            raise ValueError(f"models.{self.model}: normalise is set, but encoding {self.options['encoding']!r} takes pixels in [0, 1]; set normalise=None.")
        try:
            mean, std = (tuple(float(value) for value in values) for values in given)
        except (TypeError, ValueError):
            raise TypeError(f"models.{self.model}: normalise is {given!r}; wanted (mean, std), each with one number per channel, or a name.") from None
        if not len(mean) == len(std) == self.image[0] or min(std) <= 0:
            raise ValueError(
                f"models.{self.model}: normalise has {len(mean)} means and {len(std)} deviations ({std}); "
                f"wanted {self.image[0]} of each, the channels of image={self.image}, and deviations above 0."
            )
        self.statistics = mean, std

    def _image(self) -> None:
        image = self.options["image"]
        whole = isinstance(image, (tuple, list, torch.Size)) and all(isinstance(size, int) and not isinstance(size, bool) for size in image)
        if not whole or len(image) != 3 or min(image) < 1:
            raise ValueError(f"models.{self.model}: image is {image!r}; wanted (channels, height, width), three ints >= 1.")
        self.image = tuple(image)

    def halves(self, times: int) -> tuple[int, int]:
        """Height and width after pooling 2x2 so many times; an error where that does not come out even."""
        height, width = self.image[1:]
        if height % 2**times or width % 2**times:
            raise ValueError(
                f"models.{self.model}: image is {list(self.image)}; wanted a height and width divisible by {2**times}. Resize or pad the images."
            )
        return height >> times, width >> times

    def _whole(self, name: str, least: int) -> int:
        value = self.options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"models.{self.model}: {name} is {value!r}; wanted an int >= {least}.")
        return value

    def _one_of(self, name: str, known: tuple[str, ...]) -> str:
        value = self.options[name]
        if value not in known:
            raise ValueError(f"models.{self.model}: {name} {value!r} is unknown; wanted one of {', '.join(known)}.{nearest(value, known)}")
        return value


def _number(value: object, default: float) -> float:
    """A layer's parameter as a number: the default where there is none, or one for each neuron."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else default
    return default if value is None else float(value)


def _fit(network: nn.Module) -> None:
    """Give neurons whose parameters have the shape of their input those parameters, by a pass that runs no neuron."""
    if not any(isinstance(module, Fitted) for module in network.modules()):
        return

    def take_shape(neuron: nn.Module, x: Tensor) -> Tensor:
        if isinstance(neuron, Fitted):
            neuron.fit(neuron.steps, x.shape[2:], x)
        return x

    weight = next(network.parameters())
    network.eval()  # a norm must not count this pass
    with torch.no_grad():
        network.currents(torch.zeros(1, 1, *network.image, dtype=weight.dtype, device=weight.device), take_shape)
    network.train()


MODELS: dict[str, Callable] = {}


def model(**defaults):
    """Makes a builder of `make(parts, **family) -> Network`: it takes the shared options (with these defaults) and the
    family's own, checks their names, and notes them in the network's `spec`. The builder is a row of MODELS."""

    def wrap(make: Callable) -> Callable:
        name = make.__name__
        family = {key: value.default for key, value in inspect.signature(make).parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}
        known = {**SHARED, **defaults, **family}

        @functools.wraps(make)
        def build(**options):
            for key in options:
                if key not in known:
                    raise TypeError(f"models.{name}: option {key!r} is unknown; wanted one of {', '.join(known)}.{nearest(key, tuple(known))}")
            values = {**known, **options}
            parts = Parts(name, {key: values[key] for key in SHARED})
            chosen = {key: values[key] for key in family}
            network = make(parts, **chosen)
            _fit(network)
            network.spec = parts.spec(chosen)
            return network

        del build.__wrapped__  # or inspect would show make's own signature
        build.__signature__ = inspect.Signature([inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value) for key, value in known.items()])
        MODELS[name] = build
        return build

    return wrap
