"""Networks of fastsnn: the same model, built with spiking neurons in place of ReLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from .. import encodings, models
from ..adjoints import nearest
from ..models import NEURONS, Network, Pass
from ..models.resnet import Combine
from ..neurons import Neuron
from ..norm import TDBN, BatchNorm
from .draft import Draft, Site
from .graph import PASSING, PASSING_METHODS, PASSIVE, WEIGHTED, Traced, trace

#: Neurons whose thresholds are parameters and whose firing is not random.
CHOICES = ("if", "lif", "plif")


class _Currents(nn.Module):
    """A network from what is encoded to the classifier's output."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.currents(x, Pass())


def neuron_options(neuron: str, options: dict) -> dict:
    """The options of a converted network's neurons: as given, and with a learned threshold for each layer."""
    if neuron not in CHOICES:
        raise ValueError(f"convert: neuron {neuron!r} cannot be used; wanted one of {', '.join(CHOICES)}.{nearest(str(neuron), CHOICES)}")
    for name in options:
        if name not in NEURONS[neuron].takes:
            takes = NEURONS[neuron].takes
            raise TypeError(f"convert: neuron {neuron!r} has no option {name!r}; it takes {', '.join(takes)}.{nearest(name, takes)}")
    if "threshold" in options:
        raise ValueError("convert: neuron_options sets a threshold, which conversion finds; leave it out, and scale what is found with kappa.")
    if options.get("fire", "ge") not in ("ge", "gt"):
        raise ValueError(f"convert: neuron_options has fire={options['fire']!r}; wanted 'ge' or 'gt', neurons that spike and repeat.")
    learn = tuple(options.get("learn") or ())
    return {**options, "threshold": 1.0, "learn": list(dict.fromkeys((*learn, "threshold")))}


def convert_network(ann: Network, steps: int, neuron: str, options: dict, plain: bool) -> Draft:
    """The spiking network of an ANN's `spec`, with its weights, and thresholds still to be set."""
    what = f"models.{ann.name}"
    if ann.spec is None:
        raise ValueError(
            f"convert: {what} was built with a function or a tensor for an option, and has no spec; wanted options by name. Build it with neuron='relu'."
        )
    if ann.spec["neuron"] != "relu":
        raise ValueError(
            f"convert: {what} is spiking already (neuron {ann.spec['neuron']!r}); wanted an ANN, built with neuron='relu'. models.twin(model) makes one."
        )
    norm, norm_options = ann.spec["norm"], dict(ann.spec["norm_options"] or {})
    if norm in ("tebn", "bntt"):
        raise ValueError(f"convert: {what} has the norm {norm}, with parameters for each step of the ANN; wanted bn, tdbn or none. Train the ANN with norm='bn'.")
    if norm == "tdbn":
        norm = "bn"
        norm_options = {name: value for name, value in norm_options.items() if name not in ("alpha", "threshold")}
    chosen = neuron_options(neuron, options)
    spec = ann.spec | {"norm": norm, "norm_options": norm_options or None, "neuron": neuron, "neuron_options": chosen, "steps": steps}
    network = models.build(**spec)
    weight = next(ann.parameters())
    network.to(weight.device, weight.dtype)
    converted = _carry(ann, network, plain)
    before, after = trace(_Currents(ann), what), trace(_Currents(network), what)
    nodes, relus = after.nodes(Neuron), before.nodes(nn.ReLU)
    sites = [Site(node.target.removeprefix("network."), after.module(node), node) for node in nodes]
    encode, constant, whole = _encoder(network)
    notes = [f"The encoding {spec['encoding']} is of {steps} steps, and so is the balancing."] * whole
    return Draft(network, after, sites, False, before, relus, encode, constant, whole, lambda: absorb(after, sites), steps, converted, notes)


def _carry(ann: Network, network: Network, plain: bool) -> list[tuple[str, str, str]]:
    """Weights into the modules of the same name; of norms weight and bias, and in plain conversion the running statistics too."""
    converted = []
    state = dict(ann.state_dict())
    for name, module in ann.named_modules():
        new = network.get_submodule(name)
        if isinstance(module, BatchNorm):
            if isinstance(module, TDBN) and module.weight is not None:
                state[f"{name}.weight"] = module.weight.detach() * (module.alpha * module.threshold)
            elif isinstance(module, TDBN) and module.alpha * module.threshold != 1:
                raise ValueError(f"convert: {name} is a TDBN without affine parameters that its factor could go into; wanted affine=True, or alpha and threshold 1.")
            if not plain:
                state |= {f"{name}.{key}": new.state_dict()[key] for key in ("running_mean", "running_var", "num_batches_tracked")}
        if type(module) is not type(new) or isinstance(module, WEIGHTED):
            converted.append((name, type(module).__name__, type(new).__name__))
        elif isinstance(module, BatchNorm):
            converted.append((name, "BatchNorm", "BatchNorm"))
    thresholds = {f"{name}.threshold": layer.threshold for name, layer in network.spiking_layers()}
    own = {name: value for name, value in network.state_dict().items() if name not in state and name not in thresholds}
    network.load_state_dict(state | thresholds | own)
    return converted


def _encoder(network: Network) -> tuple[Callable[[Tensor, int, int], Tensor], bool, bool]:
    """From (images, steps, from which step on) to the graph's input as the network encodes; whether that is constant; whether T_c must be T."""
    name, options = network.spec["encoding"], network.spec["encoding_options"] or {}
    constant = name == "direct"
    whole = not constant and not network.encoding.random
    seed = torch.randint(2**31, (1,)).item()  # chunks are encoded more than once, and alike

    def encode(images: Tensor, steps: int, start: int) -> Tensor:
        kept = network.encoding
        try:
            if not constant and not whole:
                network.encoding = encodings.make_encoding(name, steps, **options)
                network.encoding.seed = seed + start
            return network.encode(images)
        finally:
            network.encoding = kept

    return encode, constant, whole


def absorb(traced: Traced, sites: list[Site]) -> None:
    """Multiply the weights that read a layer's spikes by its threshold, so that spikes stay 0 and 1."""
    with torch.no_grad():
        for site in sites:
            _into_users(traced, site.node, site)


def _into_users(traced: Traced, node: fx.Node, site: Site) -> None:
    for user in node.users:
        module = traced.module(user)
        if user not in traced.signals and user.op != "output":
            continue  # a shape
        if isinstance(module, WEIGHTED):
            module.weight.mul_(site.layer.threshold)
        elif isinstance(module, Combine):
            for place, read in enumerate(user.args):
                if read is node:
                    module.weights[place].mul_(site.layer.threshold)
        elif isinstance(module, PASSIVE) or user.target in PASSING or (user.op == "call_method" and user.target in PASSING_METHODS):
            _into_users(traced, user, site)
        else:
            raise ValueError(
                f"convert: the spikes of {site.name} go into {user.target}, and what they count cannot go into weights there; "
                "wanted a convolution, a linear layer or a combination. Use method='robust'."
            )
