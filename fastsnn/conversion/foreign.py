"""Modules from elsewhere: their graph with neurons in place of each ReLU, time merged into the batch."""

from __future__ import annotations

import copy
import operator

from torch import Tensor, fx, nn

from ..models import NEURONS, surrogate_from
from ..neurons import Neuron
from .draft import Draft, Site
from .graph import NORMED, WEIGHTED, Repeat, Traced, trace
from .networks import neuron_options


class Spikes(nn.Module):
    """A layer of neurons on merged steps: [T*N, C, *S], or a constant current [N, C, *S], to spikes [T*N, C, *S].

    size: what a spike counts; 1, in plain conversion the threshold.
    """

    def __init__(self, neuron: Neuron, steps: int, constant: bool) -> None:
        super().__init__()
        self.neuron, self.steps, self.constant = neuron, steps, constant
        self.register_buffer("size", None)

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.neuron(x[None] if self.constant else x.unflatten(0, (self.steps, -1))).flatten(0, 1)
        return spikes if self.size is None else spikes * self.size

    def extra_repr(self) -> str:
        return "constant=True" * self.constant


class Converted(nn.Module):
    """A spiking network made of somebody else's module: images to logits, the readout over T of the module's outputs.

    body: the module's graph (`torch.fx.GraphModule`), its parameters and norms under the names that they had. steps: T. readout: `mean` or `sum`.
    Every step gets the same images; what comes before the first spikes is computed once. `F.dropout` in the module's code is off, `nn.Dropout` as ever.
    """

    def __init__(self, body: fx.GraphModule, steps: int, readout: str) -> None:
        super().__init__()
        self.body, self.steps, self.readout = body, steps, readout

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.body(images).unflatten(0, (self.steps, -1))
        return outputs.mean(0) if self.readout == "mean" else outputs.sum(0)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, readout={self.readout!r}"


def convert_module(ann: nn.Module, steps: int, neuron: str, options: dict, readout: str, plain: bool) -> Draft:
    """The spiking network of a module's graph, with copies of its weights, and thresholds still to be set."""
    what = type(ann).__name__
    if next(ann.parameters(), None) is None:
        raise ValueError(f"convert: {what} has no parameters; wanted a trained network of images to logits.")
    if any(isinstance(module, Neuron) for module in ann.modules()):
        raise ValueError(f"convert: {what} is spiking already; wanted an ANN, with nn.ReLU in place of the neurons.")
    options = dict(neuron_options(neuron, options))
    if isinstance(options.get("surrogate"), str):
        options["surrogate"] = surrogate_from(options["surrogate"])
    kind = NEURONS[neuron]
    renamed = dict(kind.renamed)
    options = {renamed.get(name, name): tuple(value) if name == "learn" else value for name, value in options.items()}

    before = trace(ann, what)
    relus = [node for node in before.graph.nodes if before.is_relu(node)]
    if not relus:
        raise ValueError(f"convert: {what} has no ReLU, and so nothing that could spike; wanted nn.ReLU or F.relu after its layers.")
    graph, twins = fx.Graph(), {}
    end = graph.graph_copy(before.graph, twins)
    graph.output(end)
    weight = next(ann.parameters())
    body = fx.GraphModule(copy.deepcopy(ann), graph, class_name=what)
    graph = body.graph  # a copy
    twins = dict(zip(before.graph.nodes, graph.nodes, strict=True))
    signals = {twins[node] for node in before.signals}
    moving: set[fx.Node] = set()
    taken = {name for name, _ in body.named_modules()}
    sites, new_relus = [], {twins[node]: node for node in relus}
    converted = []
    for node in list(graph.nodes):
        if node in new_relus:
            name = _free(node.target if node.op == "call_module" else _named(before.owners[new_relus[node]]), taken, first=node.op == "call_module")
            layer = kind.make(**options, steps=steps).to(weight.device, weight.dtype)
            body.add_submodule(name, Spikes(layer, steps, node.args[0] not in moving))
            with graph.inserting_after(node):
                site = graph.call_module(name, (node.args[0],))
            node.replace_all_uses_with(site)
            graph.erase_node(node)
            sites.append(Site(name, layer, site))
            moving.add(site)
            signals.add(site)
            converted.append((name, "ReLU", type(layer).__name__))
            continue
        read = [part for part in node.all_input_nodes if part in signals]
        if any(part in moving for part in read):
            if node.op == "output":
                continue
            moving.add(node)
            for part in node.all_input_nodes if node in signals else ():
                if part not in signals and _is_batch_size(part):  # of the images, say: a signal over time is T times as long
                    with graph.inserting_before(node):
                        node.replace_input_with(part, graph.call_method("size", (read[0], 0)))
                elif part in read and part not in moving:  # constant beside what changes
                    name = _free("repeat", taken, first=False)
                    body.add_submodule(name, Repeat(steps))
                    with graph.inserting_before(node):
                        repeated = graph.call_module(name, (part,))
                    node.replace_input_with(part, repeated)
                    moving.add(repeated)
                    signals.add(repeated)
        if node.op == "call_module" and isinstance(body.get_submodule(node.target), (*WEIGHTED, *NORMED)):
            kind_name = type(body.get_submodule(node.target)).__name__
            converted.append((node.target, kind_name, kind_name))
    end = next(node for node in graph.nodes if node.op == "output").args[0]
    if end not in moving:
        raise ValueError(f"convert: the output of {what} comes from no ReLU; wanted one between images and logits.")
    body.delete_all_unused_submodules()
    graph.lint()
    body.recompile()
    norms = [module for module in body.modules() if isinstance(module, NORMED)]
    if norms and not plain:
        for norm in norms:
            norm.reset_running_stats()
    network = Converted(body, steps, readout)
    after = Traced(body, graph, frozenset(signals), {})
    before = Traced(ann, before.graph, before.signals, before.owners)

    def size_of_spikes() -> None:
        for site in sites:
            body.get_submodule(site.name).size = site.layer.threshold.detach().clone()

    # A copy of the images: a module may work on them in place.
    return Draft(network, after, sites, True, before, relus, lambda images, steps, start: images.clone(), True, False, size_of_spikes, steps, converted)


def _is_batch_size(node: fx.Node) -> bool:
    """`x.size(0)`, `x.size()[0]` or `x.shape[0]`."""
    if node.op == "call_method":
        return node.target == "size" and node.args[1:] == (0,)
    whole = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
    return isinstance(whole, fx.Node) and ((whole.op == "call_method" and whole.target == "size") or (whole.target is getattr and whole.args[1] == "shape"))


def _named(owner: str) -> str:
    return f"{owner}.relu" if owner else "relu"


def _free(name: str, taken: set[str], first: bool) -> str:
    """A name that no module has; `first`: the name itself may be taken once, by the ReLU that goes."""
    number, found = 1, name
    while found in taken and not (first and found == name and f"{name} " not in taken):
        found, number = f"{name}_{number}", number + 1
    taken.update((found, f"{name} ") if first else (found,))
    return found
