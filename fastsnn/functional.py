"""`fastsnn.lif`: checks what it is given, and runs it on a backend."""

from __future__ import annotations

import copy
import math
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, ops, plans, reference
from .adjoints import nearest
from .reference import Dynamics, columns_of
from .surrogates import Surrogate, Triangle, check_row
from .tables import CHARGES, FIRES, RESETS

STATISTICS = ("mean", "var", "rate", "guard")
KEPT = ("membrane",)
#: The charges that users name; those with q = 1/tau are chosen by `inverse_tau`.
NAMED_CHARGES = tuple(name for name in CHARGES if not name.endswith("_q"))


@dataclass(frozen=True)
class Statistics:
    """Per step and channel, over batch and space: tensors [T, C] (float32; float64 for float64 input), differentiable.

    mean, var (biased) of z = h - threshold; rate of spikes; guard = mean(max(0, delta - |z|)^power). None where not
    asked for.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    rate: Tensor | None = None
    guard: Tensor | None = None


@dataclass(frozen=True)
class Output:
    """What `lif` returns."""

    spikes: Tensor
    v: Tensor
    statistics: Statistics
    membrane: Tensor | None = None


def lif(
    x: Tensor,
    v0: Tensor | None = None,
    decay: float | Tensor | None = None,
    tau: float | Tensor | None = None,
    gain: Tensor | None = None,
    threshold: float | Tensor = 1.0,
    reset: str = "hard",
    v_reset: float = 0.0,
    charge: str = "leak",
    fire: str = "ge",
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    first_step: int = 0,
    surrogate: Surrogate | None = None,
    detach_reset: bool = False,
    statistics: tuple[str, ...] = (),
    guard: tuple[float, int] | None = None,
    keep: tuple[str, ...] = (),
    steps: int | None = None,
    backend: str = "auto",
    inverse_tau: float | Tensor | None = None,
    layer: int | Tensor = 0,
) -> Output:
    """Leaky integrate-and-fire neurons over T time steps: charge, fire, reset, in one kernel.

    With charge `leak`, fire `ge` and reset `hard`, for t = 0 ... T-1:

        h = decay * v + x[t];   spikes[t] = 1[h - threshold >= 0];   v = h * (1 - spikes[t]) + v_reset * spikes[t]

    x: [T, N, C, *S] float16, bfloat16, float32 or float64, the input current, in units of potential; or [1, N, C, *S]
        with `steps=T`: a constant current. Any dense memory format of a step is used as it is.
    v0: [N, C, *S] the state before the first step; None: v_reset for a hard reset, else 0.
    decay: the leak factor per step in [0, 1], default 0.5; 1 is integrate-and-fire. For charge `leak`.
    tau: the time constant in steps, > 1; for the charges `leak_input` `h = v + (x - (v - v_reset))/tau` and
        `leak_state` `h = v - (v - v_reset)/tau + x`. inverse_tau: 1/tau, multiplied by (ParametricLIF).
    threshold: of firing, in units of potential.
        These are a number, a scalar tensor, [C], or [T or 1, C, *S] (1 stands for all); tensors get gradients.
    gain: [T] factor of x[t].
    reset: `hard`, `soft` `v = h - threshold * s`, `none`; snnTorch's `delayed_soft`, `delayed_hard`, `snntorch_soft`.
    fire: `ge` z >= 0, `gt` z > 0, `gaussian` with probability Phi(z / noise), `none`: h is returned (leaky integrator);
        z = h - threshold. noise: sigma in units of potential. seed: an int or a [1] int64 tensor; None draws one from
        torch's generator. first_step: the number of the first step in the random stream, for sequences run in parts.
    surrogate: the derivative of the spike in the backward pass, default Triangle(1.0); `fastsnn.adjoint` overrides it.
    detach_reset: no gradient through the reset.
    statistics: any of `mean`, `var`, `rate`, `guard`; guard=(delta, power), power 0, 1 or 2 (0: the share of membranes
        nearer than delta to the threshold, without a gradient).
    keep: `("membrane",)` returns h.
    backend: `auto`, `reference`, `cpu`, `triton`, `cuda`.
    layer: the number by which `fastsnn.adjoint` finds the layer, an int or a [1] int64 tensor; layers set it, 0 is none.

    Returns spikes [T, N, C, *S] like x, v [N, C, *S] float32 (float64 for float64), statistics, membrane [T, N, C, *S].

    Sources: SNN-RAT (NeurIPS 2022), SpikingJelly 2.0, snnTorch 1.0; the gradient is the exact adjoint of the recurrence
    with ds/dz replaced by the surrogate (Neftci et al. 2019, eq. 9).

    >>> x = torch.randn(4, 2, 8, requires_grad=True)
    >>> out = fastsnn.lif(x, decay=0.9, statistics=("mean", "var"))
    >>> out.spikes.sum().backward()
    """
    key = None
    if v0 is None and gain is None and seed is None and plans.plain(x):
        forced = sys.intern(os.environ.get(backends.FORCE, "")) if backend == "auto" else None
        key = plans.key_of(x, (decay, tau, inverse_tau, threshold, v_reset, noise, steps, first_step, reset, charge, fire, detach_reset, statistics, guard, keep, backend, forced), surrogate)
        plan = None if key is None else plans.find(key)
        if plan is not None:
            return _output(plan.run(x, layer), "membrane" in keep, statistics)
    shape, steps = _check_input(x, v0, steps)
    if charge not in NAMED_CHARGES:
        raise ValueError(f"lif: charge {charge!r} is unknown; wanted one of {', '.join(NAMED_CHARGES)}.{nearest(charge, NAMED_CHARGES)}")
    _one_of("fire", fire, FIRES)
    _one_of("reset", reset, RESETS)
    charge, factor = _charge_parameter(charge, decay, tau, inverse_tau)
    decay_, decay_value = _parameter(factor[0], factor[1], x, shape, steps)
    if not isinstance(threshold, Tensor):
        threshold = _number("threshold", threshold)
    threshold_, threshold_value = _parameter("threshold", threshold, x, shape, steps)
    v_reset = _number("v_reset", v_reset)
    noise, seed = _check_noise(fire, noise, seed, reset, x)
    if gain is not None:
        _check_tensor("gain", gain, x)
        if gain.shape != (steps,):
            raise ValueError(f"lif: gain has shape {list(gain.shape)}; wanted [{steps}], one factor for each step.")
    if surrogate is None:
        surrogate = _DEFAULT_SURROGATE
    elif not isinstance(surrogate, Surrogate):
        raise TypeError(f"lif: surrogate is {surrogate!r}; wanted an instance from fastsnn.surrogates, for example surrogates.Triangle(1.0).")
    guard = _check_statistics(statistics, guard, keep, fire, x)
    if not isinstance(first_step, int) or not 0 <= first_step < 2**63:
        raise ValueError(f"lif: first_step is {first_step!r}; wanted an int >= 0, of 63 bits.")

    backends.check_name(backend)
    if backend == "auto":
        backend = os.environ.get(backends.FORCE) or "auto"
    if backend != "reference" and not torch.compiler.is_compiling():
        backend = backends.resolve(backend, x).name
    if backend == "reference":
        dynamics = Dynamics(charge, fire, reset, v_reset, detach_reset, noise, first_step, guard)
        trace = reference.in_reverse(
            reference.simulate, x, v0, decay_value if decay_ is None else decay_, threshold_value if threshold_ is None else threshold_,
            gain, seed, steps, dynamics, bool(statistics), surrogate if torch.compiler.is_compiling() else copy.copy(surrogate), layer,
        )  # fmt: skip
        found = {name: getattr(trace, name) for name in STATISTICS if name in statistics}
        return Output(trace.spikes, trace.v, Statistics(**found), trace.membrane if "membrane" in keep else None)

    check_row(surrogate, "lif")
    a, b = surrogate.values
    config = ops.Config(
        steps, charge, fire, reset, v_reset, bool(detach_reset), noise, first_step, decay_value, threshold_value,
        *((0.0, -1) if guard is None else guard), backend, "membrane" in keep, sum(1 << STATISTICS.index(name) for name in set(statistics)), torch.is_grad_enabled(),
        surrogate.name, 0.0 if isinstance(a, Tensor) else a, 0.0 if isinstance(b, Tensor) else b, surrogate.relative, 0 if isinstance(layer, Tensor) else layer,
    )  # fmt: skip
    if key is not None:
        plans.make(key, x, config, surrogate)
    spikes, v, membrane, table = ops.run(
        x, v0, decay_, threshold_, gain, seed, a if isinstance(a, Tensor) else None, b if isinstance(b, Tensor) else None,
        layer if isinstance(layer, Tensor) else None, config,
    )
    named = {name: row for name, row in zip(STATISTICS, table.unbind(0)) if name in statistics} if statistics else {}
    return Output(spikes, v, Statistics(**named), membrane if "membrane" in keep else None)


_DEFAULT_SURROGATE, _NO_STATISTICS = Triangle(1.0), Statistics()


def _output(results: tuple[Tensor, ...], membrane: bool, statistics: tuple[str, ...]) -> Output:
    """What `lif` returns, from what `plans.Plan.run` does."""
    spikes, v, *more = results
    kept = more.pop(0) if membrane else None
    if not statistics:
        return Output(spikes, v, _NO_STATISTICS, kept)
    names = [name for name in STATISTICS if name in statistics]
    return Output(spikes, v, Statistics(**dict(zip(names, more, strict=True))), kept)


def _check_input(x: Tensor, v0: Tensor | None, steps: int | None) -> tuple[torch.Size, int]:
    if not isinstance(x, Tensor):
        raise TypeError(f"lif: x is a {type(x).__name__}; wanted a tensor [T, N, C, *S].")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"lif: x is a {'nested' if x.is_nested else _name(x.layout)} tensor; wanted a dense one [T, N, C, *S]. Make it dense, for example x.to_dense().")
    if x.dim() < 2:
        raise ValueError(f"lif: x has shape {list(x.shape)}; wanted [T, N, C, *S], two dimensions at least. Add them, for example x[:, None].")
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"lif: x is {_name(x.dtype)} on {x.device.type}; every backend takes float16, bfloat16, float32, float64. Cast x, for example x.float()."
        )
    if any(size == 0 for size in x.shape):
        raise ValueError(f"lif: x has shape {list(x.shape)}; wanted at least one step and one neuron. Skip the call for empty batches.")
    if steps is None:
        steps = x.shape[0]
    elif not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"lif: steps is {steps!r}; wanted an int >= 1.")
    elif x.shape[0] not in (1, steps):
        raise ValueError(
            f"lif: steps={steps}, but x has {x.shape[0]} steps (shape {list(x.shape)}); wanted {steps}, or 1 for a constant current. "
            "For merged input [T*N, ...] use a layer made with merged=True."
        )
    shape = x.shape[1:]
    if v0 is not None:
        _check_tensor("v0", v0, x)
        if v0.shape != shape:
            raise ValueError(f"lif: v0 has shape {list(v0.shape)}; wanted {list(shape)}, the shape of one step of x.")
    return shape, steps


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(what: str, value: Tensor, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"lif: {what} is a {type(value).__name__}; wanted a floating-point tensor.")
    if not value.is_floating_point():
        raise TypeError(f"lif: {what} is {_name(value.dtype)}; wanted a floating-point tensor. Cast it, for example {what}.float().")
    if value.device != x.device:
        raise ValueError(f"lif: {what} is on {value.device}, x on {x.device}; wanted one device. Move it: {what}.to(x.device).")


def _number(what: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"lif: {what} is {value!r}; wanted a number or a tensor.") from None
    if not -math.inf < number < math.inf:  # false for NaN; unlike math.isfinite it can be traced
        raise ValueError(f"lif: {what} is {number}; wanted a finite number.")
    return number


def _one_of(what: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"lif: {what} {value!r} is unknown; wanted one of {', '.join(known)}.{nearest(value, known)}")


def _charge_parameter(charge: str, decay, tau, inverse_tau) -> tuple[str, tuple[str, float | Tensor]]:
    """The row of the charge table, and its parameter with its name."""
    if charge == "leak":
        for name, value in (("tau", tau), ("inverse_tau", inverse_tau)):
            if value is not None:
                raise ValueError(f"lif: {name} is set, but charge 'leak' takes decay; use charge='leak_input' or 'leak_state' with {name}, or set decay.")
        if decay is None:
            decay = 0.5
        if not isinstance(decay, Tensor):
            decay = _number("decay", decay)
            if not 0 <= decay <= 1:
                raise ValueError(f"lif: decay is {decay}; wanted a number in [0, 1], the leak factor per step (1: no leak).")
        return charge, ("decay", decay)
    if decay is not None:
        raise ValueError(f"lif: decay is set, but charge {charge!r} takes tau; use charge='leak' with decay, or set tau.")
    if (tau is None) == (inverse_tau is None):
        raise ValueError(f"lif: charge {charge!r} takes tau (steps, > 1) or inverse_tau, and one of them; got {'neither' if tau is None else 'both'}.")
    if tau is not None:
        if not isinstance(tau, Tensor):
            tau = _number("tau", tau)
            if tau <= 1:
                raise ValueError(f"lif: tau is {tau}; wanted a number > 1, in steps. For no leak use charge='leak' with decay=1.")
        return charge, ("tau", tau)
    if not isinstance(inverse_tau, Tensor):
        inverse_tau = _number("inverse_tau", inverse_tau)
        if not 0 <= inverse_tau <= 1:
            raise ValueError(f"lif: inverse_tau is {inverse_tau}; wanted a number in [0, 1], 1/tau.")
    return f"{charge}_q", ("inverse_tau", inverse_tau)


def _parameter(what: str, value: float | Tensor, x: Tensor, shape: torch.Size, steps: int) -> tuple[Tensor | None, float]:
    """A parameter as ([T or 1, columns], 0.0) or (None, number)."""
    if not isinstance(value, Tensor):
        return None, value
    _check_tensor(what, value, x)
    columns = columns_of(value, shape, f"lif: {what}")
    if columns.shape[0] not in (1, steps):
        raise ValueError(f"lif: {what} has {columns.shape[0]} steps (shape {list(value.shape)}); wanted 1 or {steps}, the steps of x.")
    return columns, 0.0


def _check_noise(fire: str, noise: float, seed, reset: str, x: Tensor) -> tuple[float, Tensor | None]:
    noise = _number("noise", noise)
    if fire == "none" and reset != "none":
        raise ValueError(f"lif: fire 'none' never spikes, so reset {reset!r} has nothing to do; set reset='none'.")
    if fire != "gaussian":
        if noise != 0:
            raise ValueError(f"lif: noise is {noise}, but fire {fire!r} takes none; set fire='gaussian', or noise=0.")
        return 0.0, None
    if noise <= 0:
        raise ValueError(f"lif: noise is {noise}; wanted a number > 0, the sigma of gaussian firing.")
    if seed is None:
        return noise, torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise ValueError(f"lif: seed is {_name(seed.dtype)} {list(seed.shape)} on {seed.device}; wanted int64 [1] on {x.device}.")
        return noise, seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise TypeError(f"lif: seed is {seed!r}; wanted an int of 64 bits, an int64 tensor of one element, or None.")
    return noise, torch.full((1,), seed, dtype=torch.int64, device=x.device)


def _check_statistics(statistics, guard, keep, fire: str, x: Tensor) -> tuple[float, int] | None:
    for what, names in (("statistics", statistics), ("keep", keep)):
        if not isinstance(names, (tuple, list, set, frozenset)):
            raise TypeError(f"lif: {what} is {names!r}; wanted a tuple of names, with a comma where it is one: {what}=({names if isinstance(names, str) else 'mean'!r},).")
    for name in statistics:
        _one_of("statistic", name, STATISTICS)
    for name in keep:
        _one_of("keep", name, KEPT)
    if statistics and x.dim() < 3:
        raise ValueError(f"lif: statistics are per channel, and x {list(x.shape)} has none; wanted [T, N, C, *S]. Add a channel: x.unsqueeze(2).")
    if "rate" in statistics and fire == "none":
        raise ValueError("lif: statistic 'rate' counts spikes, and fire 'none' has none; leave it out.")
    if ("guard" in statistics) != (guard is not None):
        raise ValueError("lif: statistic 'guard' and guard=(delta, power) go together; got only one of them.")
    if guard is None:
        return None
    try:
        delta, power = guard
        delta = float(delta)
    except (TypeError, ValueError):
        raise TypeError(f"lif: guard is {guard!r}; wanted (delta, power), for example (0.25, 2).") from None
    if not 0 < delta < math.inf or power not in (0, 1, 2):
        raise ValueError(f"lif: guard is {guard!r}; wanted (delta, power) with delta > 0 and power 0, 1 or 2.")
    return delta, int(power)


