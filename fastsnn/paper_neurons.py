"""Neurons of single papers that learn a number for each neuron or step: FEEL's, DLIF's and StoG's.

What they learn has the shape of their input, so it is made when that is known: by `fastsnn.models` when it builds a network, in a layer
of one's own by `fit`, or at its first call (an optimiser made before it does not know the parameter), or by `load_state_dict`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from .functional import Output
from .neurons import Neuron

__all__ = ["DynamicLIF", "EvolutionaryLIF", "Fitted", "GatedLIF"]

#: Keeps the odds p/(1 - p) and u/(1 - u) of a gate finite (StoG's public code).
EPSILON = 1e-3


class Fitted(Neuron):
    """The base of layers with one parameter of their input's shape: `fit` makes it under the name `own`, each element from `start`."""

    own: str
    start = 1.0

    @abstractmethod
    def shape_of(self, steps: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape for T steps of inputs [T, N, *shape]."""

    @property
    def fitted(self) -> bool:
        """Whether the parameter is made."""
        return self.own in self._parameters

    def fit(self, steps: int, shape: tuple[int, ...], like: Tensor | None = None) -> None:
        """Make the parameter for T = steps inputs [T, N, *shape], once.

        like: a tensor on the parameter's device; the parameter is float64 where that is, else of the default dtype.

        >>> layer = EvolutionaryLIF()
        >>> layer.fit(8, (64, 16, 16))
        >>> layer.decay.shape
        torch.Size([8, 64, 16, 16])
        """
        if self.fitted:
            return
        dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.get_default_dtype()
        device = None if like is None else like.device
        value = torch.full(self.shape_of(steps, tuple(shape)), self.start, dtype=dtype, device=device)
        setattr(self, self.own, nn.Parameter(value))

    def _lif(self, x: Tensor, v: Tensor | None, statistics=(), guard=None, keep=(), steps: int | None = None, backend: str = "auto") -> Output:
        if not self.fitted and isinstance(x, Tensor):
            if x.dim() < 3:
                raise ValueError(f"{type(self).__name__}: x has shape {list(x.shape)}; wanted [T, N, C, *S], for it learns numbers of neurons or steps.")
            self.fit(x.shape[0] if steps is None else steps, x.shape[2:], x)
        return super()._lif(x, v, statistics, guard, keep, steps, backend)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        saved = state_dict.get(prefix + self.own)
        if isinstance(saved, Tensor) and not self.fitted:
            setattr(self, self.own, nn.Parameter(torch.empty_like(saved)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        value = f"tensor{list(getattr(self, self.own).shape)} (learned)" if self.fitted else f"{self.start:g} (to be learned)"
        return f"{self.own}={value}, {super().extra_repr()}"


class _Gate(torch.autograd.Function):
    """Spikes [T, N, C, *S] through gates of probability p [C, *S] for uniform numbers u; the gradient of p is the concrete relaxation's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spikes: Tensor, p: Tensor, u: Tensor, temperature: float) -> Tensor:
        return torch.where(u >= _least(p), spikes, 0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.temperature = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        spikes, p, u = ctx.saved_tensors
        g_spikes = torch.where(u >= _least(p), grad, 0) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return g_spikes, None, None, None
        # With odds w, sigmoid(log(w)/temperature) has the slope 1/(temperature*(a + 1/a)^2) in log(w), a = w^(1/(2*temperature)).
        odds, total = p / (1 - p + EPSILON), torch.zeros_like(p)
        for s, g, numbers in zip(spikes, grad, u):  # step by step: less memory, and what fits a cache
            a = odds * (numbers / (1 - numbers + EPSILON))
            if ctx.temperature != 0.5:
                a = a ** (0.5 / ctx.temperature)
            total = total + (s * g * (a + 1 / a) ** -2).sum(0)
        return g_spikes, total / ctx.temperature * (1 / p + 1 / (1 - p + EPSILON)), None, None


def _least(p: Tensor) -> Tensor:
    """The least u that opens a gate, `log(p/(1 - p + e)) + log(u/(1 - u + e)) = 0`."""
    odds = (1 - p + EPSILON) / p
    return odds * (1 + EPSILON) / (1 + odds)


class EvolutionaryLIF(Fitted):
    """LIF with a learned leak for each neuron and step: `h = lambda[t]*v + x[t]`, else as `LIF`.

    decay: where every lambda starts, 1. The parameter `decay` is lambda [T, C, *S], not held to any range. The evolutionary leak
    factor of FEEL-SNN (Xu et al., NeurIPS 2024).
    """

    own = "decay"

    def __init__(self, decay: float = 1.0, threshold: float | Tensor = 1.0, reset: str = "hard", **options) -> None:
        if "decay" in options.get("learn", ()):
            raise ValueError("EvolutionaryLIF: learn names 'decay', which this layer learns in any case, for each neuron and step. Leave it out.")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise TypeError(f"EvolutionaryLIF: decay is {decay!r}; wanted a number in [0, 1], where every lambda starts.")
        super().__init__(decay=decay, threshold=threshold, reset=reset, **options)
        self.start = float(decay)

    def shape_of(self, steps: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        return steps, *shape

    def extra_repr(self) -> str:
        return Neuron.extra_repr(self) + ", decay to be learned" * (not self.fitted)


class DynamicLIF(Fitted):
    """LIF with a learned weight of the input for each step: `h = decay*v + p[t]*x[t]`, else as `LIF`.

    decay: the leak, 0.99. The parameter `gain` is p [T], one for the layer, from 1. Source: DLIF, the neuron of robust stable
    spiking networks (Ding et al., ICML 2024).
    """

    own = "gain"

    def __init__(self, decay: float | Tensor = 0.99, threshold: float | Tensor = 1.0, reset: str = "hard", **options) -> None:
        super().__init__(decay=decay, threshold=threshold, reset=reset, **options)

    def shape_of(self, steps: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (steps,)

    def arguments(self) -> dict:
        return super().arguments() | {"gain": self.gain if self.fitted else None}


class GatedLIF(Fitted):
    """LIF whose spikes pass a random gate: `y[t] = s[t]*1[log(p/(1 - p + e)) + log(u[t]/(1 - u[t] + e)) >= 0]`, `e = 1e-3`.

    `p = hardtanh(r, lowest, 1)`: the parameter `r` is [C, *S], one for each neuron, from 1; u is uniform in [0, 1), fresh for each sample,
    neuron and step, in eval mode too. The reset and the statistics (`rate`) are those of s, before the gate. Backward: that of the concrete
    relaxation `sigmoid((log(p/(1 - p + e)) + log(u/(1 - u + e)))/temperature)`; at the bounds of p the gradient of r passes (a reading:
    were it 0 there, r could not leave 1).

    decay: the leak, 1 (no leak, as published). lowest: the least p, in (0, 1). temperature: of the relaxation, > 0.
    `layer.seed = 7` fixes the random numbers; None draws them from torch's generator at each call.

    Source: StoG (Ding et al., AAAI 2024) and its public code, but for two things there: a minus before the gradient of p, and means over steps
    and samples where the derivative has sums.
    """

    own = "r"
    random = True

    def __init__(
        self, decay: float | Tensor = 1.0, threshold: float | Tensor = 1.0, reset: str = "hard", lowest: float = 0.1, temperature: float = 0.5, **options
    ) -> None:
        if not 0 < lowest < 1:
            raise ValueError(f"GatedLIF: lowest is {lowest!r}; wanted the least probability of an open gate, a number in (0, 1), such as 0.1.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"GatedLIF: temperature is {temperature!r}; wanted a finite number > 0, such as 0.5.")
        super().__init__(decay=decay, threshold=threshold, reset=reset, **options)
        self.lowest, self.temperature = float(lowest), float(temperature)

    def shape_of(self, steps: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    @property
    def probability(self) -> Tensor:
        """p [C, *S]."""
        return self.r.clamp(self.lowest, 1.0)

    def transmit(self, spikes: Tensor) -> Tensor:
        if spikes.shape[2:] != self.r.shape:
            raise ValueError(f"GatedLIF: spikes have shape {list(spikes.shape)}, the gates {list(self.r.shape)}; wanted [T, N, {', '.join(map(str, self.r.shape))}].")
        wide = torch.float64 if spikes.dtype == torch.float64 else torch.float32
        generator = None if self.seed is None else torch.Generator(spikes.device).manual_seed(int(self.seed))
        u = torch.rand(spikes.shape, dtype=wide, device=spikes.device, generator=generator)
        return _Gate.apply(spikes, self.probability.to(wide), u, self.temperature)

    def _lif(self, x: Tensor, v: Tensor | None, statistics=(), guard=None, keep=(), steps: int | None = None, backend: str = "auto") -> Output:
        out = super()._lif(x, v, statistics, guard, keep, steps, backend)
        return replace(out, spikes=self.transmit(out.spikes))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lowest={self.lowest:g}, temperature={self.temperature:g}"
