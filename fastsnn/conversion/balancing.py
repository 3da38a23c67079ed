"""The values that thresholds are made of: ranks among the inputs of each layer, simulated in chunks of steps.

A layer's input over [T_c, N, C, *S] is never held whole. What stands before a layer runs chunk after chunk with its state carried
along; its spikes are kept, a bit each, while they fit in `memory` and while a later layer reads them. A norm needs its input twice:
for the statistics, and for what it makes of it; that is kept too where it fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..functional import lif
from .calibration import Ranked
from .draft import Draft, frozen
from .graph import NORMED, Repeat, Traced

#: Numbers in the largest signal of a chunk.
CHUNK = 2**25

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


def balance(
    draft: Draft, batches: list[Tensor], steps: int, rho: float, floor: float, memory: int, progress: Callable[[str], None] | None = None
) -> tuple[int, list[list[float]], list[int]]:
    """Robust conversion's values, layer by layer: while one is measured, the layers before it have the highest of theirs (at least
    floor) for a threshold, and all batch norms take the statistics of the mini-batch.

    Returns T_c, for each site the value in each mini-batch, and its neurons for one image.
    """
    steps = draft.steps if draft.whole else steps
    with frozen(draft.network):
        neurons, largest = _sizes(draft, batches[0][:1])
        length = max(1, min(steps, CHUNK // max(1, largest * max(len(images) for images in batches))))
        runs = [_Run(draft, images, steps, steps if draft.whole else length) for images in batches]
        sites = {site.node: site for site in draft.sites}
        values: dict[fx.Node, list[float]] = {}
        for norms, node, ahead in _groups(draft, set(sites)):
            for run in runs:
                run.budget = memory - sum(other.held for other in runs if other is not run)
                for norm in norms:
                    run.measure(norm)
                values.setdefault(node, []).append(run.ranked(node, rho, neurons[node]))
                run.forget(ahead)
            if any(map(math.isnan, values[node])):
                raise _not_finite(sites[node].name)
            sites[node].layer.threshold.fill_(max(*values[node], floor))
            if progress is not None:
                progress(f"{sites[node].name}: {max(values[node]):.4g}")
    return steps, [values[site.node] for site in draft.sites], [neurons[site.node] for site in draft.sites]


def _groups(draft: Draft, sites: set[fx.Node]) -> list[tuple[list[fx.Node], fx.Node, list[fx.Node]]]:
    """For each layer of neurons: the norms between the layer before and it, its node, and the nodes of neurons and norms after it."""
    spots = [node for node in draft.traced.graph.nodes if node in sites or isinstance(draft.traced.module(node), NORMED)]
    found, norms = [], []
    for place, node in enumerate(spots):
        if node in sites:
            found.append((norms, node, spots[place + 1 :]))
            norms = []
        else:
            norms.append(node)
    return found


def plain_values(
    draft: Draft, batches: list[Tensor], rho: float, progress: Callable[[str], None] | None = None
) -> tuple[int, list[list[float]], list[int]]:
    """Plain conversion's values: of the inputs of the ANN's own ReLU, with nothing below 0, in eval mode."""
    values: list[list[float]] = [[] for _ in draft.sites]
    neurons = [0] * len(draft.sites)
    reader = _Reader(draft.ann, {node: place for place, node in enumerate(draft.relus)})
    with frozen(draft.ann.root):
        for images in batches:
            for place, signal in reader.run(draft.encode(images, draft.steps, 0)):
                ranked = Ranked(signal.numel(), rho)
                ranked.add(signal.clamp(min=0))
                values[place].append(ranked.value())
                neurons[place] = signal.numel() // len(images) // (1 if draft.constant else draft.steps)
                if math.isnan(values[place][-1]):
                    raise _not_finite(draft.sites[place].name)
    if progress is not None:
        for site, found in zip(draft.sites, values):
            progress(f"{site.name}: {max(found):.4g}")
    return 1, values, neurons


def _not_finite(name: str) -> ValueError:
    return ValueError(f"convert: the input of {name} holds NaN; wanted finite weights and images. Look at the ANN's own outputs first.")


def _call(traced: Traced, node: fx.Node, values: dict[fx.Node, object]) -> object:
    """One node of a graph, with the values of its inputs."""
    args, kwargs = (fx.node.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
    if node.op == "call_module":
        return traced.module(node)(*args, **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if node.op == "get_attr":
        found = traced.root
        for word in node.target.split("."):
            found = getattr(found, word)
        return found
    return args[0]  # a placeholder with a default, or the output


class _Reader:
    """Runs a graph and yields the inputs of some nodes, keeping nothing longer than it is used."""

    def __init__(self, traced: Traced, wanted: dict[fx.Node, int]) -> None:
        self.traced, self.wanted = traced, wanted
        self.last = _last_use(list(traced.graph.nodes))

    def run(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        values: dict[fx.Node, object] = {}
        first = next(node for node in self.traced.graph.nodes if node.op == "placeholder")
        for node in self.traced.graph.nodes:
            if node in self.wanted:
                yield self.wanted[node], values[node.args[0]]
            values[node] = x if node is first else _call(self.traced, node, values)
            for done in self.last.get(node, ()):
                values.pop(done, None)


def _last_use(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node those that no node after it reads."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(nodes):
        for read in node.all_input_nodes:
            if read not in seen:
                seen.add(read)
                found.setdefault(node, []).append(read)
    return found


def _sizes(draft: Draft, image: Tensor) -> tuple[dict[fx.Node, int], int]:
    """Elements of each node's value for one image and step (of those that are signals), and the most."""
    sizes: dict[fx.Node, int] = {}
    run = _Run(draft, image, 1, 1)
    run.plain = True
    x = draft.encode(image, draft.steps if draft.whole else 1, 0)
    each = 1 if draft.constant else (draft.steps if draft.whole else 1)
    values: dict[fx.Node, object] = {}
    for node in draft.traced.graph.nodes:
        values[node] = x if node is run.first else run.value(node, values, {}, 0, each)
        if isinstance(values[node], Tensor) and node in draft.traced.signals:
            sizes[node] = values[node].numel() // each
    return sizes, max(sizes.values())


class _Run:
    """The simulation of one mini-batch for T_c steps, some steps at a time.

    held: bytes of what is kept: the spikes of layers, and the input of a norm between the pass that measures it and the one that uses
    what was found; budget: the most that they may be. plain: norms as they are, without the statistics of the mini-batch.
    """

    def __init__(self, draft: Draft, images: Tensor, steps: int, length: int) -> None:
        self.draft, self.traced, self.images, self.steps = draft, draft.traced, images, steps
        self.chunks = [(start, min(length, steps - start)) for start in range(0, steps, length)]
        self.layers = {site.node: site.layer for site in draft.sites}
        self.first = next(node for node in self.traced.graph.nodes if node.op == "placeholder")
        self.norms: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.kept: dict[fx.Node, list[tuple]] = {}
        self.budget = self.held = 0
        self.plain = False
        self.moving = set() if draft.constant else {self.first}
        for node in self.traced.graph.nodes:
            if node in self.layers or any(read in self.moving for read in node.all_input_nodes) or isinstance(self.traced.module(node), Repeat):
                self.moving.add(node)

    def measure(self, node: fx.Node) -> None:
        """The mean and biased variance per channel of a norm's input over [T_c, N, *S], merged over chunks in float64 (Chan et al., 1979)."""
        count, mean, square = 0, 0.0, 0.0
        for x, _ in self.inputs(node.args[0], keep=len(node.args[0].users) == 1):
            x = self._flat(x)
            x = x if x.dtype == torch.float64 else x.float()
            var, centre = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
            number = x.numel() // x.shape[1]
            total, difference = count + number, centre.double() - mean
            mean = mean + difference * (number / total)
            square = square + var.double() * number + difference.square() * (count * number / total)
            count = total
        self.norms[node] = mean, square / count

    def ranked(self, node: fx.Node, rho: float, neurons: int) -> float:
        """The rho value of a layer's input."""
        found = Ranked(self.steps * len(self.images) * neurons, rho)
        for x, times in self.inputs(node.args[0]):
            found.add(x, times)
        return found.value()

    def inputs(self, target: fx.Node, keep: bool = False) -> Iterator[tuple[Tensor, int]]:
        """The value of a node, chunk after chunk, and for how many steps each of its numbers stands. keep: for the next time."""
        needed = self._needed(target)
        resting = [node for node in needed if node not in self.moving]
        moving = [node for node in needed if node in self.moving]
        kept: dict[fx.Node, object] = {}
        last = _last_use(resting)
        read_later = {read for node in moving for read in node.all_input_nodes} | {target}
        if self.draft.constant and resting:
            kept[self.first] = self.draft.encode(self.images, self.steps, 0)
        for node in resting:
            if node is not self.first:
                kept[node] = self.value(node, kept, {}, 0, 1)
            for done in last.get(node, ()):
                if done not in read_later:
                    kept.pop(done, None)
        if target not in self.moving:
            yield kept[target], self.steps
            return
        last = {node: [done for done in reads if done not in kept and done is not target] for node, reads in _last_use(moving).items()}
        states: dict[fx.Node, Tensor] = {}
        fresh: dict[fx.Node, list | None] = {node: [] for node in moving if (node in self.layers or (keep and node is target)) and node not in self.kept}
        for number, (start, length) in enumerate(self.chunks):
            values = dict(kept)
            for node in moving:
                if node is self.first:
                    values[node] = self.draft.encode(self.images, length, start)
                elif node in self.kept:
                    values[node] = _unpacked(*self.kept[node][number])
                else:
                    values[node] = self.value(node, values, states, start, length)
                    if fresh.get(node) is not None:
                        self._keep(node, values[node], fresh)
                for done in last.get(node, ()):
                    values.pop(done, None)
            yield values[target], 1
        self.kept |= {node: packed for node, packed in fresh.items() if packed is not None}

    def value(self, node: fx.Node, values: dict[fx.Node, object], states: dict[fx.Node, Tensor], start: int, length: int) -> object:
        """A node's value for `length` steps from `start` on."""
        module = self.traced.module(node)
        if node in self.layers:
            x = values[node.args[0]]
            resting = node.args[0] not in self.moving
            if self.draft.merged:
                x = x[None] if resting else x.unflatten(0, (length, -1))
            out = lif(x, states.get(node), **self.layers[node].arguments(), first_step=start, steps=length)
            states[node] = out.v
            return out.spikes.flatten(0, 1) if self.draft.merged else out.spikes
        if isinstance(module, Repeat):
            x = values[node.args[0]]
            return x.repeat(length, *[1] * (x.dim() - 1))
        if isinstance(module, NORMED) and not self.plain:
            x = values[node.args[0]]
            flat = self._flat(x)
            mean, var = (part.to(flat.dtype if flat.dtype == torch.float64 else torch.float32) for part in self.norms[node])
            flat = F.batch_norm(flat, mean, var, module.weight, module.bias, False, 0.0, module.eps)
            return flat if self.draft.merged else flat.unflatten(0, x.shape[:2])
        return _call(self.traced, node, values)

    def forget(self, ahead: list[fx.Node]) -> None:
        """Let go of what no way to these nodes reads, and of all inputs of norms."""
        read: set[fx.Node] = set()
        for node in ahead:
            read.update(self._needed(node.args[0]))
        for node in [node for node in self.kept if node not in read or node not in self.layers]:
            self.held -= _bytes(self.kept.pop(node))

    def _keep(self, node: fx.Node, value: Tensor, fresh: dict) -> None:
        part = _packed(value, not self.draft.merged) if node in self.layers else (value,)
        size = _bytes([part])
        whole = size if fresh[node] else size * len(self.chunks)  # if the first fits, whether all will
        if self.held + whole > self.budget:
            self.held -= _bytes(fresh[node])
            fresh[node] = None
        else:
            self.held += size
            fresh[node].append(part)

    def _needed(self, target: fx.Node) -> list[fx.Node]:
        """The nodes to run for a target, in order: back to the images, or to spikes that are kept."""
        found, ahead = set(), [target]
        while ahead:
            node = ahead.pop()
            if node not in found:
                found.add(node)
                if node not in self.kept:
                    ahead.extend(node.all_input_nodes)
        return [node for node in self.traced.graph.nodes if node in found]

    def _flat(self, x: Tensor) -> Tensor:
        return x if self.draft.merged else x.flatten(0, 1)


def _bytes(parts: list[tuple]) -> int:
    return sum(part[0].numel() * part[0].element_size() for part in parts)


def _packed(spikes: Tensor, last: bool) -> tuple[Tensor, torch.Size, torch.dtype, bool]:
    """Spikes as bits. last: with channels last, as a CPU's convolutions like them; somebody's `view` may want them where they were."""
    last = last and spikes.dim() > 3
    spikes = spikes.movedim(-3, -1) if last else spikes
    bits = spikes.reshape(-1) != 0
    bits = F.pad(bits.view(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (bits * torch.tensor(_POWERS, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8), spikes.shape, spikes.dtype, last


def _unpacked(packed: Tensor, shape: torch.Size | None = None, dtype: torch.dtype | None = None, last: bool = False) -> Tensor:
    """What was kept: spikes from their bits, or the tensor itself."""
    if shape is None:
        return packed
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=packed.device)
    spikes = (packed[:, None] & powers).ne_(0).view(-1)[: shape.numel()].view(shape).to(dtype)
    return spikes.movedim(-1, -3) if last else spikes
