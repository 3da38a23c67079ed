"""What the neurons of a network do on some images: spikes, rates, how far an attack moves them; and the spectra of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .attacks.base import crafting
from .evaluation.forward import batches, check
from .neurons import Neuron, spiking_layers

__all__ = ["LayerActivity", "LayerDistance", "activity", "singular_values", "spike_distance", "spiking_layers", "totals"]


@dataclass(frozen=True)
class LayerActivity:
    """One spiking layer over a set of images.

    neurons: of one image. steps: T. spikes: of all neurons over all steps, the mean over images. rate: spikes per neuron and step.
    active: the share of neurons that fire at least once for an image, the mean over images. silent: the share of neurons that fire
    for no image at all.
    """

    name: str
    neurons: int
    steps: int
    spikes: float
    rate: float
    active: float
    silent: float

    @property
    def per_neuron(self) -> float:
        """Spikes per neuron and image."""
        return self.spikes / self.neurons

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return {**asdict(self), "per_neuron": self.per_neuron}


@dataclass(frozen=True)
class LayerDistance:
    """How far the spikes S of a layer are from those of changed images, S', both over all steps and neurons.

    distance: `||S - S'||_2`, the mean over images. relative: `||S - S'||_2 / ||S||_2`, the same mean over images with a spike in S
    (0 where none has). changed: the share of neurons and steps at which one of the two fires and the other does not.
    """

    name: str
    distance: float
    relative: float
    changed: float

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


class _Spikes:
    """The spikes of every firing layer in one forward pass: name -> [T, N, ...], calls one after the other where a layer runs step by step."""

    def __init__(self, who: str, model: nn.Module) -> None:
        self.who, self.layers = who, spiking_layers(model)
        if not self.layers:
            raise ValueError(f"{who}: {type(model).__name__} holds no spiking layer; wanted a model with fastsnn.LIF or a relative in it.")
        self.found: dict[str, list[Tensor]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        def hook(name: str):
            def keep(layer: Neuron, _, output) -> None:
                spikes = output[0] if isinstance(output, tuple) else output
                self.found.setdefault(name, []).append(layer._unmerged(spikes.detach()) != 0)

            return keep

        handles = [layer.register_forward_hook(hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> dict[str, Tensor]:
        """Of the last pass, in the order in which the layers ran."""
        found, self.found = self.found, {}
        for name, calls in found.items():
            if any(call.shape[1:] != calls[0].shape[1:] for call in calls):
                raise ValueError(f"{self.who}: layer {name} runs at places of {len({call.shape[1:] for call in calls})} shapes; wanted a layer for each place.")
        if not found:
            raise ValueError(f"{self.who}: the model ran none of its spiking layers; wanted a forward pass through them.")
        return {name: torch.cat(calls) for name, calls in found.items()}


def activity(model: nn.Module, x: Tensor, batch_size: int = 64, device: str | torch.device | None = None) -> list[LayerActivity]:
    """Spike counts, firing rates and the share of active neurons of each spiking layer, in eval mode, in the order of the layers.

    With S [T, N, neurons] the spikes of a layer: spikes = sum(S)/N, rate = mean(S), active = mean over images and neurons of
    1[any over t of S]. Coding efficiency, as the papers on conversion print it, is `per_neuron` and `active` [R].

    x: [N, C, H, W] uint8, or float with pixels in [0, 1]; clean or adversarial. device: where to run, the model is moved there; None:
    where it is. The result does not depend on batch_size (but for the rounding of the model). A ValueError without a spiking layer.
    Source: Ozdenizci and Legenstein, "Adversarially Robust Spiking Neural Networks Through Conversion", on coding efficiency.

    >>> layers = activity(model, images)
    >>> totals(layers)["active"]
    """
    check("activity", x, None, batch_size)
    model = _plain(model)
    seen: dict[str, dict] = {}
    spiking = _Spikes("activity", model)
    with _quiet(model), spiking.watched():
        for images, _ in batches(model, x, None, batch_size, device):
            model(images)
            for name, spikes in spiking.take().items():
                fired = spikes.any(0)
                part = seen.setdefault(name, {"steps": len(spikes), "neurons": fired[0].numel(), "spikes": 0, "active": 0, "ever": torch.zeros_like(fired[0])})
                part["spikes"] += int(spikes.sum())
                part["active"] += int(fired.sum())
                part["ever"] |= fired.any(0)
    return [
        LayerActivity(
            name,
            part["neurons"],
            part["steps"],
            spikes=part["spikes"] / len(x),
            rate=part["spikes"] / (len(x) * part["neurons"] * part["steps"]),
            active=part["active"] / (len(x) * part["neurons"]),
            silent=1 - int(part["ever"].sum()) / part["neurons"],
        )
        for name, part in seen.items()
    ]


def totals(layers: list[LayerActivity]) -> dict[str, float]:
    """The same figures for all layers together: neurons, spikes, per_neuron, rate, active, silent; shares over neurons, rate over neurons and steps."""
    neurons, places = sum(layer.neurons for layer in layers), sum(layer.neurons * layer.steps for layer in layers)
    if not neurons:
        raise ValueError("totals: got no layer; wanted what activity returned.")
    spikes = sum(layer.spikes for layer in layers)
    shares = {name: sum(getattr(layer, name) * layer.neurons for layer in layers) / neurons for name in ("active", "silent")}
    return {"neurons": neurons, "spikes": spikes, "per_neuron": spikes / neurons, "rate": spikes / places, **shares}


def spike_distance(model: nn.Module, clean: Tensor, changed: Tensor, batch_size: int = 64, device: str | torch.device | None = None) -> list[LayerDistance]:
    """How far `changed` images move the spikes of each layer from those of the `clean` ones: `||S - S'||_2`, in the order of the layers.

    clean, changed: [N, C, H, W], image by image, as in `activity`. Networks that are random at inference draw the same numbers in both
    passes [R], so that what differs is the images' doing. A ValueError where the shapes differ or without a spiking layer.

    >>> spike_distance(model, images, FGSM("8/255")(model, images, labels))[-1].distance
    """
    if not isinstance(clean, Tensor) or not isinstance(changed, Tensor) or clean.shape != changed.shape:
        got = [list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in (clean, changed)]
        raise ValueError(f"spike_distance: clean is {got[0]}, changed is {got[1]}; wanted two tensors of one shape [N, C, H, W], image by image.")
    for x in (clean, changed):
        check("spike_distance", x, None, batch_size)
    model = _plain(model)
    sums: dict[str, dict] = {}
    spiking = _Spikes("spike_distance", model)
    pairs = zip(*(batches(model, x, None, batch_size, device) for x in (clean, changed)))
    with _quiet(model), spiking.watched():
        for place, pair in enumerate(pairs):
            found = []
            for images, _ in pair:
                torch.manual_seed(place)
                model(images)
                found.append(spiking.take())
            for (name, before), after in zip(found[0].items(), found[1].values(), strict=True):
                part = sums.setdefault(name, {"distance": 0.0, "relative": 0.0, "firing": 0, "changed": 0, "places": 0})
                differ = (before != after).transpose(0, 1).flatten(1).sum(1).double()  # spikes are 0 or 1: their squared differences too
                size = before.transpose(0, 1).flatten(1).sum(1).double()
                part["distance"] += float(differ.sqrt().sum())
                part["relative"] += float((differ / size).sqrt()[size > 0].sum())
                part["firing"] += int((size > 0).sum())
                part["changed"] += int(differ.sum())
                part["places"] += before.numel()
    return [
        LayerDistance(name, part["distance"] / len(clean), part["relative"] / max(part["firing"], 1), part["changed"] / part["places"])
        for name, part in sums.items()
    ]


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """The singular values of each convolution's and linear layer's weight, largest first, by the layer's name.

    The weight of a convolution is the matrix [C_out, C_in/groups * K * K], as the orthogonal regulariser of SNN-RAT takes it; that is
    not the spectrum of the convolution as a map between images. Values: [min(rows, columns)], on the CPU, in float32 at least.
    Raises ValueError for a model without such a layer, FloatingPointError for a weight that is not finite.

    >>> {name: values[0] for name, values in singular_values(model).items()}  # spectral norms
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            weight = layer.weight.detach().flatten(1)
            if not weight.isfinite().all():
                raise FloatingPointError(f"singular_values: the weight of {name or type(layer).__name__} holds NaN or infinity; wanted finite numbers.")
            wide = weight if weight.dtype == torch.float64 else weight.float()
            found[name] = torch.linalg.svdvals(wide).cpu()
    if not found:
        raise ValueError(f"singular_values: {type(model).__name__} holds no convolution and no linear layer; wanted a model with weights.")
    return found


def _plain(model: nn.Module) -> nn.Module:
    """What torch.compile or DistributedDataParallel has wrapped: hooks on layers need not run in a compiled graph."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, nothing recorded, and torch's generators as they were afterwards."""
    devices = {value.device for value in model.parameters() if value.is_cuda}
    with crafting(model), torch.no_grad(), torch.random.fork_rng(list(devices)):
        yield
