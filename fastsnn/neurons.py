"""The operator as modules: LIF and its relatives.

A layer holds its dynamics and what it learns, no hidden state unless made with `stateful=True`; a state is passed in and
comes back out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import adjoints
from .backends import check_name
from .functional import Output, Statistics, lif
from .surrogates import Surrogate, Triangle

__all__ = ["IF", "LI", "LIF", "Neuron", "NoisyLIF", "ParametricLIF", "record"]

#: What a layer can learn, with the range that a learned value is meant to keep.
LEARNABLE = ("decay", "tau", "threshold")

#: What a noisy layer does in eval mode.
INFERENCES = ("noisy", "plain")


class Neuron(nn.Module):
    """The base of all layers: one call of `fastsnn.lif` with the layer's dynamics.

    Input x: [T, N, C, *S] float, or, with `merged=True, steps=T`, [T*N, C, *S]; with `steps=T` alone also [1, N, C, *S],
    a constant current. Output: spikes of the shape of x (T steps for a constant current), in the dtype of x.
    """

    def __init__(
        self,
        decay: float | Tensor | None = None,
        tau: float | Tensor | None = None,
        threshold: float | Tensor = 1.0,
        reset: str = "hard",
        v_reset: float = 0.0,
        charge: str = "leak",
        fire: str = "ge",
        noise: float = 0.0,
        surrogate: Surrogate | None = None,
        detach_reset: bool = False,
        learn: tuple[str, ...] = (),
        steps: int | None = None,
        merged: bool = False,
        stateful: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(learn, str):
            raise TypeError(f"{name}: learn is a tuple of names; write learn=({learn!r},) with a comma.")
        if not isinstance(learn, (tuple, list, set, frozenset)):
            raise TypeError(f"{name}: learn is {learn!r}; wanted a tuple of names, such as ('threshold',).")
        check_name(backend)
        given = {"decay": decay, "tau": tau, "threshold": threshold}
        for what in learn:
            if what not in LEARNABLE or given[what] is None:
                can = [key for key in LEARNABLE if given[key] is not None]
                raise ValueError(f"{name}: learn names {what!r}; this layer has {', '.join(can)}.{adjoints.nearest(what, tuple(can))}")
        if merged and steps is None:
            raise ValueError(f"{name}: merged=True takes input [T*N, ...] and cannot tell T from N; set steps=T.")
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(f"{name}: steps is {steps!r}; wanted an int >= 1.")
        for what, value in given.items():
            if what in learn:
                value = nn.Parameter(torch.as_tensor(value, dtype=torch.get_default_dtype()).clone())
            elif isinstance(value, Tensor):
                self.register_buffer(what, value)
                continue
            setattr(self, what, value)
        self.reset, self.v_reset, self.charge, self.fire, self.noise = reset, v_reset, charge, fire, noise
        self.surrogate = Triangle(1.0) if surrogate is None else surrogate
        self.detach_reset, self.learn, self.steps, self.merged = detach_reset, tuple(learn), steps, merged
        self.stateful, self.backend = stateful, backend
        self.v: Tensor | None = None
        self.seed: int | Tensor | None = None
        #: Of each `record` block around: statistics, guard, what it found, and this layer's name there.
        self._records: tuple[tuple[tuple[str, ...], tuple | None, dict, str], ...] = ()
        self._register()
        self._check({what: given[what] for what in learn if not isinstance(given[what], Tensor)})

    def _check(self, learned: dict[str, float]) -> None:
        """Let `lif` object now, not at the first batch: one step of one neuron, where the parameters allow it.

        learned: the numbers that learned parameters start from, which as tensors nobody would look at.
        """
        held = [*self.parameters(), *self.buffers()]
        devices = {value.device for value in held} or {torch.device("cpu")}
        if all(value.numel() == 1 for value in held) and len(devices) == 1 and (device := devices.pop()).type != "meta":
            with torch.no_grad():
                lif(torch.zeros(1, 1, 1, device=device), **Neuron.arguments(self) | learned, steps=1, backend="reference")

    def __getstate__(self) -> dict:
        # The state that a stateful layer holds goes along as values: its history belongs to the original's graph.
        return self.__dict__ | {"v": None if self.v is None else self.v.detach()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._register()  # a copy is a layer of its own

    def _register(self) -> None:
        """Gives the layer its number, by which `fastsnn.adjoint` finds it.

        A compiled graph takes the number from a tensor: a graph with the number itself would serve this layer alone.
        """
        self._number = adjoints.register(self)
        device = self._tag.device if "_tag" in self.__dict__ else None
        self._tag = torch.full((1,), self._number, dtype=torch.int64, device=device)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        device = fn(self._tag).device
        if device != self._tag.device:
            self._tag = torch.full((1,), self._number, dtype=torch.int64, device=device)
        return self

    def dynamics(self) -> dict:
        """The keyword arguments of `lif` that make this layer."""
        return {"decay": self.decay, "tau": self.tau}

    def arguments(self) -> dict:
        """The keyword arguments of `lif` that do not change from call to call."""
        return self.dynamics() | {
            "threshold": self.threshold,
            "reset": self.reset,
            "v_reset": self.v_reset,
            "charge": self.charge,
            "fire": self.fire,
            "noise": self.noise,
            "seed": self.seed,
            "surrogate": self.surrogate,
            "detach_reset": self.detach_reset,
        }

    def _lif(self, x: Tensor, v: Tensor | None, statistics=(), guard=None, keep=(), steps: int | None = None, backend: str = "auto") -> Output:
        layer = self._tag if torch.compiler.is_compiling() else self._number
        return lif(x, v, **self.arguments(), statistics=statistics, guard=guard, keep=keep, steps=steps, backend=backend, layer=layer)

    def transmit(self, spikes: Tensor) -> Tensor:
        """What leaves the layer [T, N, C, *S]: the spikes themselves, but in layers that hold some back."""
        return spikes

    def _unmerged(self, x: Tensor) -> Tensor:
        """Merged input [T*N, C, *S] as [T, N, C, *S]; other input as it is."""
        if not self.merged:
            return x
        if x.dim() < 2 or x.shape[0] % self.steps:
            raise ValueError(f"{type(self).__name__}: x has shape {list(x.shape)}; wanted [T*N, C, *S] with T = steps = {self.steps}.")
        return x.unflatten(0, (self.steps, -1))

    def simulate(
        self,
        x: Tensor,
        v: Tensor | None = None,
        statistics: tuple[str, ...] = (),
        guard: tuple[float, int] | None = None,
        keep: tuple[str, ...] = (),
    ) -> Output:
        """Everything that `lif` returns for this layer and input, membranes too with `keep=("membrane",)`: for pictures
        and analysis. Tensors have a step dimension even where the layer is merged; no state is held.

        >>> h = layer.simulate(x, keep=("membrane",)).membrane  # [T, N, C, *S]
        """
        return self._lif(self._unmerged(x), v, statistics, guard, keep, self.steps, self.backend)

    def forward(
        self,
        x: Tensor,
        v: Tensor | None = None,
        statistics: tuple[str, ...] = (),
        guard: tuple[float, int] | None = None,
        return_state: bool | None = None,
    ):
        """Run T steps.

        x: [T, N, C, *S], or [T*N, C, *S] if merged. v: [N, C, *S] the state before the first step.
        statistics, guard: as in `lif`. return_state: whether the state comes back; by default, where v was given.

        Returns spikes; (spikes, v) with the state; (spikes, statistics) or (spikes, v, statistics) with statistics.
        """
        x = self._unmerged(x)
        start = self.v if v is None and self.stateful else v
        if self.stateful and v is None and start is not None and (start.shape, start.device) != (x.shape[1:], x.device):
            raise ValueError(
                f"{type(self).__name__}: the state that it holds has shape {list(start.shape)} on {start.device}, and a step of x {list(x.shape[1:])} on "
                f"{x.device}; wanted the same. Before another sequence call the layer's forget()."
            )
        names, wanted_guard = statistics, guard
        for asked, asked_guard, _, _ in self._records:
            # A layer that never fires has no rate.
            together = tuple(dict.fromkeys((*names, *(name for name in asked if name != "rate" or self.fire != "none"))))
            names = asked if asked == together else together  # the same object at each call: its plan is found by that
            if wanted_guard is not None and asked_guard is not None and tuple(wanted_guard) != tuple(asked_guard):
                raise ValueError(f"{type(self).__name__}: guard is asked for with {wanted_guard} and, by fastsnn.record, with {asked_guard}; a call has one.")
            wanted_guard = wanted_guard if asked_guard is None else asked_guard
        out = self._lif(x, start, names, wanted_guard, (), self.steps, self.backend)
        if self.stateful:
            self.v = out.v
        for asked, _, found, name in self._records:
            found.setdefault(name, []).append(Statistics(**{name: getattr(out.statistics, name) for name in asked}))
        spikes = out.spikes.flatten(0, 1) if self.merged else out.spikes
        result = (spikes,)
        if return_state if return_state is not None else v is not None:
            result += (out.v,)
        if statistics:
            result += (Statistics(**{name: getattr(out.statistics, name) for name in statistics}),)
        return result[0] if len(result) == 1 else result

    def forget(self) -> None:
        """Drop the state that a layer made with `stateful=True` holds."""
        self.v = None

    def extra_repr(self) -> str:
        def show(value: float | Tensor) -> str:
            if not isinstance(value, Tensor):
                return f"{value:g}"
            text = f"{value.item():g}" if value.numel() == 1 and not value.is_meta else f"tensor{list(value.shape)}"
            return text + " (learned)" if isinstance(value, nn.Parameter) else text

        words = [f"{name}={show(value)}" for name in LEARNABLE if (value := getattr(self, name, None)) is not None]
        words += [f"charge={self.charge}", f"fire={self.fire}", f"reset={self.reset}"]
        words += [f"v_reset={self.v_reset:g}"] * (self.v_reset != 0) + [f"noise={self.noise:g}"] * (self.noise != 0)
        words += [f"surrogate={self.surrogate!r}"] * (self.fire != "none") + ["detach_reset=True"] * self.detach_reset
        words += [f"steps={self.steps}"] * (self.steps is not None) + ["merged=True"] * self.merged
        words += ["stateful=True"] * self.stateful + [f"backend={self.backend!r}"] * (self.backend != "auto")
        return ", ".join(words)


class LIF(Neuron):
    """Leaky integrate-and-fire: `h = decay*v + x; s = 1[h >= threshold]; v = h*(1-s) + v_reset*s`.

    decay: leak factor per step in [0, 1], default 0.5; threshold: in units of potential. Each is a number, a scalar
    tensor, [C], or [T or 1, C, *S]; those named in `learn` become parameters. With charge `leak_input` or `leak_state`
    it takes `tau` (steps, > 1) in place of decay: SpikingJelly's LIFNode. Everything else as in `fastsnn.lif`.

    >>> layer = fastsnn.LIF(decay=0.9, learn=("threshold",))
    >>> spikes = layer(torch.randn(8, 32, 64, 16, 16))
    """

    def __init__(self, decay: float | Tensor | None = None, threshold: float | Tensor = 1.0, reset: str = "hard", **options) -> None:
        if decay is None and options.get("tau") is None and options.get("charge", "leak") == "leak":
            decay = 0.5
        super().__init__(decay=decay, threshold=threshold, reset=reset, **options)


class IF(Neuron):
    """Integrate-and-fire: `LIF` without a leak, `h = v + x`. SNN-RAT's and MPD-SGR's neuron."""

    def __init__(self, threshold: float | Tensor = 1.0, reset: str = "hard", **options) -> None:
        super().__init__(decay=1.0, threshold=threshold, reset=reset, **options)


class ParametricLIF(Neuron):
    """LIF with a learned time constant, `1/tau = sigmoid(w)`, one for the layer (Fang et al., ICCV 2021, eq. 12).

    init_tau: steps, > 1; w starts at -ln(init_tau - 1). decay_input: charge `leak_input`, else `leak_state`. The same
    operations as SpikingJelly's ParametricLIFNode.
    """

    def __init__(self, init_tau: float = 2.0, decay_input: bool = True, threshold: float | Tensor = 1.0, reset: str = "hard", **options) -> None:
        super().__init__(tau=init_tau, threshold=threshold, reset=reset, charge="leak_input" if decay_input else "leak_state", **options)
        self.tau = None  # checked; from here on w holds it
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))

    def dynamics(self) -> dict:
        return {"tau": self.tau} if self.tau is not None else {"inverse_tau": self.w.sigmoid()}

    def extra_repr(self) -> str:
        tau = "tensor[]" if self.w.is_meta else f"{1 / self.w.detach().sigmoid().item():g}"
        return f"tau={tau} (learned), " + super().extra_repr()


class NoisyLIF(Neuron):
    """LIF that fires with probability `Phi((h - threshold)/sigma)` (NSNN, Ma et al. 2023); surrogate: the density.

    sigma: the noise's deviation, in units of potential, 0.4 by default; or variance: its square. `layer.seed = 7` fixes the random
    numbers; None draws them from torch's generator at each call. inference: "noisy"; or "plain": in eval mode it fires where
    `h >= threshold`, through the same surrogate, and repeats.
    """

    inference = "noisy"

    def __init__(
        self,
        sigma: float | None = None,
        decay: float | Tensor = 0.5,
        threshold: float | Tensor = 1.0,
        reset: str = "hard",
        variance: float | None = None,
        inference: str = "noisy",
        **options,
    ) -> None:
        from .surrogates import Gaussian

        if inference not in INFERENCES:
            raise ValueError(f"NoisyLIF: inference {inference!r} is unknown; wanted one of {', '.join(INFERENCES)}.{adjoints.nearest(inference, INFERENCES)}")
        if variance is not None:
            if sigma is not None:
                raise ValueError(f"NoisyLIF: sigma is {sigma} and variance is {variance}; wanted one of them, variance = sigma^2.")
            if not 0 < variance < math.inf:
                raise ValueError(f"NoisyLIF: variance is {variance}; wanted a finite number > 0, such as 0.16 for sigma = 0.4.")
            sigma = math.sqrt(variance)
        sigma = 0.4 if sigma is None else sigma
        options.setdefault("surrogate", Gaussian(sigma) if sigma > 0 else None)
        super().__init__(decay=decay, threshold=threshold, reset=reset, fire="gaussian", noise=sigma, **options)
        self.inference = inference

    @property
    def random(self) -> bool:
        """Whether it fires by chance at inference."""
        return self.inference == "noisy"

    def arguments(self) -> dict:
        quiet = {} if self.training or self.random else {"fire": "ge", "noise": 0.0}
        return super().arguments() | quiet

    def extra_repr(self) -> str:
        return super().extra_repr() + ", inference='plain'" * (not self.random)


class LI(Neuron):
    """Leaky integrator, for readouts: returns the membrane, `v = h = decay*v + x`, and never fires."""

    def __init__(self, decay: float | Tensor = 0.5, **options) -> None:
        super().__init__(decay=decay, reset="none", fire="none", **options)


def spiking_layers(model: nn.Module) -> dict[str, Neuron]:
    """The layers of a model that fire, by name; none in an ANN. A leaky integrator has a membrane, but no threshold to be near to."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Neuron) and layer.fire != "none"}


@contextmanager
def record(model: nn.Module, *statistics: str, guard: tuple[float, int] | None = None) -> Iterator[dict[str, list[Statistics]]]:
    """Within this block, collect statistics of every fastsnn layer in somebody else's model, without a change to it.

    model: any module that holds fastsnn layers. statistics: names as in `lif`; guard as there.
    Yields a dict from the layer's name in the model to one `Statistics` ([T, C] tensors, differentiable) for each call; layers
    that never fire (`LI`) have no rate. Blocks may be nested. Where parts of the model are checkpointed, the backward pass
    belongs into the block too: it runs the layers again.

    >>> with fastsnn.record(model, "mean", "var") as statistics:
    ...     logits = model(images)
    >>> statistics["features.2"][0].var
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Neuron)]
    if not layers:
        raise ValueError(f"record: {type(model).__name__} holds no fastsnn layer; wanted a model with fastsnn.LIF or a relative in it.")
    if not statistics:
        raise ValueError("record: no statistic is named; wanted one or more of mean, var, rate, guard.")
    found: dict[str, list[Statistics]] = {}
    for name, layer in layers:
        layer._records += ((statistics, guard, found, name),)
    try:
        yield found
    finally:
        for _, layer in layers:
            layer._records = tuple(entry for entry in layer._records if entry[2] is not found)
