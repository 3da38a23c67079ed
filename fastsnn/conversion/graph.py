"""The graph of a module's operations by torch.fx, and which of them a spiking network can have."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..models.dropout import StepDropout
from ..models.network import HalfSize
from ..models.resnet import Combine
from ..neurons import Neuron
from ..norm import Norm

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
NORMED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, Norm)
#: Modules that are linear and have no weights.
PASSIVE = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten, nn.Identity,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, HalfSize, StepDropout,
)  # fmt: skip
KNOWN = (*WEIGHTED, *NORMED, *PASSIVE, nn.ReLU, Neuron, Combine)

RELU = (F.relu, F.relu_, torch.relu, torch.relu_)
#: Functions and methods of one signal that are linear: what goes through them may be scaled before or after.
PASSING = {
    torch.flatten, torch.mean, torch.reshape, torch.squeeze, torch.unsqueeze, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, F.dropout, operator.neg,
}  # fmt: skip
PASSING_METHODS = {"flatten", "mean", "reshape", "view", "squeeze", "unsqueeze", "contiguous", "unflatten", "to", "float", "clone"}
#: Those of two: a sum takes any, a product one signal and a constant.
SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, torch.cat}
SUM_METHODS = {"add", "add_", "sub", "sub_"}
PRODUCTS = {operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div}
PRODUCT_METHODS = {"mul", "mul_", "div", "div_"}
SHAPES = {"size", "dim", "numel"}

CURES = {
    "pool": "Use average pooling in its place (nn.AvgPool2d), and train the ANN again.",
    "activation": "Use nn.ReLU in its place, and train the ANN again.",
    "recurrent": "A network that is run over time has no rates to convert; use convolutions and linear layers.",
    "norm": "Use batch norm in its place, and train the ANN again.",
}
ACTIVATIONS = (
    "elu", "gelu", "silu", "sigmoid", "tanh", "mish", "softplus", "hardswish", "hardtanh", "hardsigmoid", "relu6", "selu", "celu", "softmax", "softsign",
    "leakyrelu", "prelu", "rrelu", "glu", "logsigmoid",
)  # fmt: skip


class Tracer(fx.Tracer):
    """Modules that are known, and all of torch.nn but containers, are nodes; the rest is looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, KNOWN) or super().is_leaf_module(module, name)

    def to_bool(self, proxy: fx.Proxy) -> bool:
        node = proxy.node
        if node.target is operator.eq and node.args[1] == "cpu":  # a question about the device, which changes no value
            return next(self.root.parameters()).device.type == "cpu"
        return super().to_bool(proxy)


@dataclass(frozen=True)
class Traced:
    """A graph, the module that it runs on, and what depends on what.

    signals: nodes that depend on the images, shapes aside. relus: in the order in which they run. owners: for each node the name of the module
    whose code it is in.
    """

    root: nn.Module
    graph: fx.Graph
    signals: frozenset[fx.Node]
    owners: dict[fx.Node, str]

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(node.target) if node.op == "call_module" else None

    def nodes(self, *kinds: type[nn.Module]) -> list[fx.Node]:
        return [node for node in self.graph.nodes if isinstance(self.module(node), kinds)]

    def is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.module(node), nn.ReLU)
        return (node.op == "call_function" and node.target in RELU) or (node.op == "call_method" and node.target in ("relu", "relu_"))


def trace(root: nn.Module, what: str) -> Traced:
    """The graph of a module in eval mode, after a look at each of its nodes.

    what: the name of the module in errors. Raises ValueError that names the first module or function that cannot be converted.
    """
    tracer = Tracer()
    modes = {module: module.training for module in root.modules()}
    root.eval()
    try:
        graph = tracer.trace(root)
    except Exception as error:
        if getattr(tracer, "graph", None) is not None:
            _check(root, tracer.graph, what)  # what stands before the trouble is mostly its cause
        raise ValueError(
            f"convert: {what} cannot be followed by torch.fx: {error}. Wanted a forward whose course does not depend on values; "
            "take the branch or loop out, or move it into a module of supported layers."
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    _without_aliases(root, graph)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    signals, owners = _check(root, graph, what)
    return Traced(root, graph, signals, owners)


def _without_aliases(root: nn.Module, graph: fx.Graph) -> None:
    """Whoever reads a tensor after a ReLU has worked on it in place reads that ReLU."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        in_place = getattr(module, "inplace", False) or node.target in (F.relu_, torch.relu_, "relu_") or (node.target is F.relu and node.kwargs.get("inplace"))
        if in_place and (isinstance(module, nn.ReLU) or module is None):
            node.args[0].replace_all_uses_with(node, lambda user, node=node: places[user] > places[node])


def _owner(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def _check(root: nn.Module, graph: fx.Graph, what: str) -> tuple[frozenset[fx.Node], dict[fx.Node, str]]:
    signals: set[fx.Node] = set()
    owners, seen = {}, {}
    for node in graph.nodes:
        owners[node] = _owner(node)
        inputs = [node_in for node_in in node.all_input_nodes if node_in in signals]
        if node.op == "placeholder":
            if signals and not node.args:
                raise ValueError(f"convert: {what} takes more than images: {node.target!r}. Wanted one input; give the others default values.")
            if not signals:
                signals.add(node)
        elif node.op == "call_module":
            module = root.get_submodule(node.target)
            if not isinstance(module, KNOWN):
                raise _refused(f"{node.target} is a {type(module).__name__}", type(module).__name__, what)
            for parameter in module.parameters():
                first = seen.setdefault(id(parameter), (node.target, node))
                if first[1] is not node:
                    also = "it runs a second time" if first[0] == node.target else f"it shares weights with {first[0]}"
                    raise ValueError(
                        f"convert: {node.target} is a {type(module).__name__}, and {also}; wanted weights that are used once, "
                        "since each place gets a scale and statistics of its own. Make copies of it (copy.deepcopy)."
                    )
            signals.add(node)
        elif node.op in ("call_function", "call_method") and inputs:
            if _is_shape(node):
                continue
            _check_call(node, inputs, owners[node], what)
            signals.add(node)
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise ValueError(f"convert: {what} returns a {type(node.args[0]).__name__}; wanted one tensor of logits.")
    return frozenset(signals), owners


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in SHAPES
    return node.target is getattr and node.args[1] in ("shape", "device", "dtype", "ndim")


def _check_call(node: fx.Node, inputs: list[fx.Node], owner: str, what: str) -> None:
    method = node.op == "call_method"
    name = node.target if method else getattr(node.target, "__name__", str(node.target))
    where = f"{owner or what} calls {name}"
    if (node.target in ("relu", "relu_")) if method else (node.target in RELU):
        return
    if node.target in (PASSING_METHODS if method else PASSING):
        if name == "mean" and _averages_batch(node):
            raise _refused(f"{where} over the batch", "", what)
    elif node.target in (PRODUCT_METHODS if method else PRODUCTS):
        divided = "div" in name and node.args[0] not in inputs
        if sum(part in inputs for part in (*node.args, *node.kwargs.values())) > 1 or divided:
            raise _refused(f"{where} of two signals", "", what)
    elif node.target not in (SUM_METHODS if method else SUMS):
        raise _refused(where, name, what)


def _averages_batch(node: fx.Node) -> bool:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return dims is None or 0 in (dims if isinstance(dims, (tuple, list)) else (dims,))


def _refused(sentence: str, name: str, what: str) -> ValueError:
    word = name.lower().replace("_", "")
    if "pool" in word:
        cure = CURES["pool"]
    elif word in ACTIVATIONS:
        cure = CURES["activation"]
    elif word.startswith(("lstm", "gru", "rnn")):
        cure = CURES["recurrent"]
    elif "norm" in word:
        cure = CURES["norm"]
    else:
        cure = "Write that part with those, and train the ANN again."
    return ValueError(
        f"convert: {sentence}, which has no spiking form here; "
        f"wanted convolutions, linear layers, batch norm, ReLU, average pooling, flattening, dropout and sums. {cure}"
    )


class Repeat(nn.Module):
    """A constant signal [N, ...] as one of T equal steps, [T*N, ...]."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(self.steps, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"steps={self.steps}"
