"""Forward passes of their own for gradient approximations: surrogates that follow the membrane, and ReLU for spikes.

Within `forward` of one of these, every spiking layer of a model computes its surrogate from its own membrane (PDSG, ASSG:
the spikes stay the same bits) or passes `relu(x)` (CBA); afterwards the model is as it was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..functional import Output, Statistics, lif
from ..neurons import Neuron
from ..reference import columns_of, spread
from ..surrogates import ATan, Gaussian, Surrogate

__all__ = ["ASSG", "PDSG", "Adaptive", "Pass", "relu_twin", "spiking"]


@dataclass(frozen=True)
class Pass:
    """One forward pass of an attack. kept: what lives as long as the attack on these samples. samples: how many it has; rows: which
    of them this pass is about, None: all. first: whether it is the only one or the first of a mean over random passes (EoT)."""

    kept: dict = field(default_factory=dict)
    samples: int = 0
    rows: Tensor | None = None
    first: bool = True


def spiking(model: nn.Module) -> list[Neuron]:
    """The layers of a model that fire; leaky integrators do not."""
    return [module for module in model.modules() if isinstance(module, Neuron) and module.fire != "none"]


@contextmanager
def _replaced(model: nn.Module, run: Callable[..., Output]) -> Iterator[nn.Module]:
    """Within this block every spiking layer computes `run(layer, x, v, statistics, guard, keep, steps, backend)`."""
    layers = spiking(model)
    for layer in layers:
        layer._lif = partial(run, layer)
    try:
        yield model
    finally:
        for layer in layers:
            del layer._lif


def _relu(layer: Neuron, x: Tensor, v: Tensor | None, statistics=(), guard=None, keep=(), steps=None, backend="auto") -> Output:
    if statistics or guard is not None:
        raise ValueError("cba: statistics of a spiking layer were asked for while ReLU stands in its place; wanted a forward pass without.")
    out = x.relu()
    if steps is not None and x.shape[0] == 1:
        out = out.expand(steps, *x.shape[1:])
    return Output(out, torch.zeros_like(x[0]) if v is None else v, Statistics())


def relu_twin(model: nn.Module, run: Pass):
    """A block that yields the ANN twin of `model`, which shares its parameters and running statistics."""
    from ..models import Network, twin

    if not isinstance(model, Network):  # somebody else's model: the same, step by step
        return _replaced(model, _relu)
    if "twin" not in run.kept:
        run.kept["twin"] = twin(model, shared=True)
    return nullcontext(run.kept["twin"])


class Adaptive(ABC):
    """BPTT with a surrogate that each layer computes from its membrane; any attack takes one as its `adjoint`.

    To write one: `surrogate`, and `per_sample = True` where its parameters differ between samples.
    """

    #: Whether the parameters are [T, N, C, *S], not [T or 1, C, *S].
    per_sample = False

    @abstractmethod
    def surrogate(self, z: Tensor, state: dict, run: Pass) -> Surrogate:
        """The surrogate of a layer whose membrane minus threshold is z [T, N, C, *S].

        state: what this method left there in the attack's last pass through the layer; empty at first.
        """

    def forward(self, model: nn.Module, run: Pass):
        """A block that yields `model` with this surrogate in its layers."""
        return _replaced(model, partial(self._layer, run, {}))

    def _layer(self, run: Pass, calls: dict, layer: Neuron, x, v, statistics=(), guard=None, keep=(), steps=None, backend="auto") -> Output:
        own = partial(type(layer)._lif, layer)
        before = layer.seed, layer.surrogate
        if layer.fire == "gaussian" and layer.seed is None:  # the membrane looked at is that of the pass itself
            layer.seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        try:
            with torch.no_grad():
                z = own(x.detach(), None if v is None else v.detach(), keep=("membrane",), steps=steps, backend=backend).membrane
                theta = layer.threshold
                if isinstance(theta, Tensor):
                    theta = spread(columns_of(theta.detach(), x.shape[1:], "threshold"), x.shape[1:], z)
                calls[layer] = calls.get(layer, -1) + 1  # a layer may run several times in a pass
                state = run.kept.setdefault((self, layer, calls[layer]), {})
                layer.surrogate = self.surrogate(z - theta, state, run)
            work = partial(_folded, layer) if self.per_sample else own
            return work(x, v, statistics=statistics, guard=guard, keep=keep, steps=steps, backend=backend)
        finally:
            layer.seed, layer.surrogate = before


def _folded(layer: Neuron, x: Tensor, v: Tensor | None, statistics=(), guard=None, keep=(), steps=None, backend="auto") -> Output:
    """The layer's pass with its batch folded into its channels: [T, N, C, *S] as [T, 1, N*C, *S], so that neuron-wise parameters
    can differ between samples. Spikes and random numbers are the same bits: both orders count N, C, *S."""
    if statistics or guard is not None or keep:
        raise ValueError(f"{type(layer).__name__}: statistics were asked for while its batch is folded into its channels; wanted a forward pass without.")
    batch, shape = x.shape[1], x.shape[1:]
    inner = shape[2:] if len(shape) > 1 else ()

    def fold(value: Tensor) -> Tensor:  # [..., N, C, *S]; a layer without channels has one
        lead = value.shape[: value.dim() - len(shape)]
        return value.reshape(*lead, 1, -1, *inner)

    def parameter(value):
        if not isinstance(value, Tensor) or value.numel() == 1:
            return value
        columns = columns_of(value, shape, type(layer).__name__)  # [T or 1, C or C*S]
        if columns.shape[1] == 1:
            return columns.reshape(-1, *(1 for _ in shape[1:]))
        columns = columns.repeat(1, batch)
        return columns.reshape(len(columns), -1, *(inner if columns.shape[1] > shape[0] * shape[1] else (1 for _ in inner)))

    a, b = (fold(value).squeeze(1) if isinstance(value, Tensor) else value for value in layer.surrogate.values)
    surrogate = type(layer.surrogate)(*(a, b)[: len(layer.surrogate.parameters)], relative=layer.surrogate.relative)
    changed = {name: parameter(value) for name, value in {**layer.dynamics(), "threshold": layer.threshold}.items()}
    arguments = {**layer.arguments(), **changed, "surrogate": surrogate}
    out = lif(fold(x), None if v is None else fold(v), **arguments, steps=steps, backend=backend)
    return Output(layer.transmit(out.spikes.reshape(-1, *shape)), out.v.reshape(shape), Statistics())


class PDSG(Adaptive):
    """Potential-dependent surrogate gradient: the normal density of z with mean sigma/2 and deviation sigma.

        surrogate(z) = exp(-(z - sigma/2)^2 / (2*sigma^2)) / (sqrt(2*pi)*sigma)

    sigma, per channel: the unbiased standard deviation of the membrane over steps, batch and space, 1 where it is 0.
    so_far: as in the authors' code, sigma of step t is over the steps up to t, and a layer without space has one for all its
    neurons. The batch is part of the formula: a sample's gradient depends on its batch.

    Source: Lun et al., CVPR 2025, section 4.
    """

    def __init__(self, so_far: bool = False) -> None:
        self.so_far = bool(so_far)

    def surrogate(self, z: Tensor, state: dict, run: Pass) -> Surrogate:
        if z.dim() < 3:
            z = z.unsqueeze(2)
        flat = self.so_far and z.dim() == 3
        rows = z.double().transpose(1, 2).flatten(2)  # [T, C, n]
        if flat:
            rows = rows.flatten(1)[:, None]
        spans = [rows[: t + 1] for t in range(len(rows))] if self.so_far else [rows]
        counts = [span.shape[0] * span.shape[2] for span in spans]
        sigma = torch.stack([span.var((0, 2), correction=min(1, count - 1)).sqrt() for span, count in zip(spans, counts)])
        sigma = torch.where(sigma == 0, 1.0, sigma).to(z.dtype)  # [T or 1, C or 1]
        sigma = sigma.reshape(*sigma.shape, *(1 for _ in z.shape[3:]))
        return Gaussian(sigma, sigma / 2)

    def __repr__(self) -> str:
        return f"PDSG(so_far={self.so_far})"


class ASSG(Adaptive):
    """Adaptive sharpness surrogate gradient: arctangent, as sharp as the membranes of the attack so far allow.

        surrogate(z) = (a/2) / (1 + (pi/2 * a * z)^2),   a = omega / (M + relax*D + 1e-4),   omega = 2*tan(pi*share)/pi
        M <- beta*M + (1 - beta)*|z|,   D <- beta*D + (1 - beta)*||z| - M|,   from M = 1, D = 0

    for each sample, neuron and step, over the forward passes of an attack (not over the passes of one EoT mean). An attack that
    drops samples says which are left by `Attack.only`, one that restarts calls `Attack.anew`. share: half the bound on the
    expected degree of vanishing, in (0, 0.5). relax, beta: as above.

    Source: Wang et al., arXiv 2512.22522, section 4 and its public code.
    """

    per_sample = True

    def __init__(self, share: float = 0.425, relax: float = 1.5, beta: float = 0.9) -> None:
        if not 0 < share < 0.5:
            raise ValueError(f"ASSG: share is {share!r}; wanted a number between 0 and 0.5, such as 0.425.")
        if not relax >= 0 or not 0 <= beta < 1:
            raise ValueError(f"ASSG: relax is {relax!r}, beta {beta!r}; wanted relax >= 0 and beta in [0, 1).")
        self.share, self.relax, self.beta = float(share), float(relax), float(beta)
        self.omega = 2 * math.tan(math.pi * share) / math.pi

    def surrogate(self, z: Tensor, state: dict, run: Pass) -> Surrogate:
        size = z.abs()
        known = len(run.rows) if run.rows is not None else run.samples
        rows = run.rows if known == z.shape[1] else None
        shape = (z.shape[0], z.shape[1] if rows is None else run.samples, *z.shape[2:])
        if "mean" not in state or state["mean"].shape != shape:
            state["mean"], state["deviation"] = size.new_ones(shape), size.new_zeros(shape)
        mean, deviation = (state[key] if rows is None else state[key][:, rows] for key in ("mean", "deviation"))
        if run.first:
            mean = self.beta * mean + (1 - self.beta) * size
            deviation = self.beta * deviation + (1 - self.beta) * (size - mean).abs()
            for key, value in (("mean", mean), ("deviation", deviation)):
                if rows is None:
                    state[key] = value
                else:
                    state[key][:, rows] = value
        return ATan(self.omega / (mean + self.relax * deviation + 1e-4))

    def __repr__(self) -> str:
        return f"ASSG(share={self.share:g}, relax={self.relax:g}, beta={self.beta:g})"
