"""The definition: a multi-timestep LIF in plain PyTorch.

Every backend returns the bits of `simulate` in spikes, membrane and state, and the gradients that autograd takes
through it to a few ulp. It runs on any device, and differentiates twice. It shares no arithmetic with the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import adjoints
from .surrogates import Surrogate
from .tables import DELAYED_RESETS

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Dynamics:
    """The rows of the tables and the numbers that a layer's recurrence is made of."""

    charge: str = "leak"
    fire: str = "ge"
    reset: str = "hard"
    v_reset: float = 0.0
    detach_reset: bool = False
    noise: float = 0.0  # sigma of gaussian firing, in units of potential
    first_step: int = 0
    guard: tuple[float, int] | None = None  # (delta, power)


@dataclass(frozen=True)
class Trace:
    """What a simulation returns; the statistics are None where they were not asked for."""

    spikes: Tensor  # [T, N, C, *S] in the dtype of x
    v: Tensor  # [N, C, *S] float32 (float64 for float64)
    membrane: Tensor  # [T, N, C, *S] h
    mean: Tensor | None = None  # [T, C]
    var: Tensor | None = None
    rate: Tensor | None = None
    guard: Tensor | None = None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state and arithmetic: float64 for float64 input, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spread(parameter: Tensor | float, shape: torch.Size, like: Tensor) -> Tensor:
    """A parameter `[T or 1, columns]` as `[T or 1, 1, C, *S]`, ready to broadcast against a step of x.

    parameter: a number, or a tensor with 1, C or C*S columns (C and S from `shape`, the shape of a step).
    """
    if not isinstance(parameter, Tensor):
        return torch.full((1,) * (len(shape) + 1), parameter, dtype=like.dtype, device=like.device)
    steps, columns = parameter.shape
    parameter = parameter.to(like.dtype)
    if columns == 1:
        return parameter.reshape(steps, *(1 for _ in shape))
    if columns == shape[1]:
        return parameter.reshape(steps, 1, columns, *(1 for _ in shape[2:]))
    return parameter.reshape(steps, 1, *shape[1:])


def uniform(seed: Tensor, shape: torch.Size, step: int, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) of one step: Philox 4x32-10 keyed by the seed, counter (index in N, C, *S order, step).

    seed: [1] int64. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    index = torch.arange(shape.numel(), device=like.device)
    c0, c1 = index & _MASK, (index >> 32) & _MASK
    c2, c3 = torch.full_like(index, step & _MASK), torch.zeros_like(index)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # Products wrap at 2^64; the shift drags the sign along, the mask takes it off again.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return ((c0 >> 8).to(like.dtype) * 2.0**-24).reshape(shape)


def normal_cdf(y: Tensor) -> Tensor:
    """Phi(y) by Abramowitz and Stegun 7.1.28, |error| < 1.5e-7: sums, products and one quotient, so that every backend
    returns the same bits."""
    size = y.abs()
    poly = torch.full_like(y, 0.000005382975)
    for c in (0.00004889063564344402, 0.000038003575, 0.0032776263241471684, 0.02114100615, 0.04986734696679053, 1.0):
        poly = c + size * poly
    for _ in range(4):
        poly = poly * poly
    tail = torch.full_like(y, 0.5) / poly
    return torch.where(y < 0, tail, 1 - tail)


def charge(kind: str, v: Tensor, x: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """h before any delayed reset, for one row of the CHARGE table. p: decay, tau or q = 1/tau, by row."""
    match kind:
        case "leak":
            return p * v + x
        case "leak_input":
            return v + (x - (v - r)) / p
        case "leak_state":
            return v - (v - r) / p + x
        case "leak_input_q":
            return v + (x - (v - r)) * p
        case "leak_state_q":
            return v - (v - r) * p + x
    raise ValueError(f"reference: charge {kind!r} has a row in kernels/lif.def and no branch here.")


def next_state(kind: str, h: Tensor, s: Tensor, threshold: Tensor, fired: Tensor | None, r: Tensor) -> Tensor:
    """The state after the spike, for one row of the RESET table."""
    match kind:
        case "hard":
            return h * (1 - s) + r * s
        case "soft":
            return h - threshold * s
        case "none" | "delayed_soft" | "delayed_hard":
            return h
        case "snntorch_soft":
            return h - (s - fired) * threshold
    raise ValueError(f"reference: reset {kind!r} has a row in kernels/lif.def and no branch here.")


def forward_mode() -> bool:
    """Whether somebody differentiates forwards, which must not go unnoticed where gradients are off."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def in_reverse(function: Callable, *arguments):
    """function(*arguments); where it is differentiated forwards, an error that says what to do instead."""
    if not forward_mode():
        return function(*arguments)
    try:
        return function(*arguments)
    except NotImplementedError as error:  # torch's, that these Functions have no `jvp`; with one, torch.compile refuses them
        if "jvp" not in str(error):
            raise
        raise RuntimeError(
            "lif: a forward-mode derivative (torch.func.jvp, jacfwd, forward_ad) was asked for; spikes have none, a surrogate is a rule for the backward "
            "pass. Use reverse mode: torch.func.grad, vjp, jacrev, or backward()."
        ) from error


class _Spike(torch.autograd.Function):
    """Passes `fired` on, and in the backward pass multiplies by the surrogate that is chosen then."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, threshold, fired, t, shape, choose):
        return fired.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, threshold, _, ctx.t, ctx.shape, ctx.choose = inputs
        ctx.save_for_backward(z, threshold)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        surrogate: Surrogate = ctx.choose().surrogate
        slope, at = slope_at(surrogate, z, threshold, ctx.t, ctx.shape)
        g_z = grad * slope
        # z / threshold falls by (z / threshold) / threshold with the threshold, beside what comes through z.
        g_threshold = -(g_z * at) if surrogate.relative else None
        return g_z, g_threshold, None, None, None, None


def slope_at(surrogate: Surrogate, z: Tensor, threshold: Tensor, t: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """ds/dh of one step, and the place where the surrogate was evaluated: z, or z / threshold if relative."""

    def parameter(value: float | Tensor) -> float | Tensor:
        if not isinstance(value, Tensor):
            return value
        value = spread(columns_of(value, shape, type(surrogate).__name__), shape, z)
        return value[t if value.shape[0] > 1 else 0]

    a, b = (parameter(value) for value in surrogate.values)
    at = z / threshold if surrogate.relative else z
    slope = surrogate.derivative(at, a, b)
    return (slope / threshold if surrogate.relative else slope), at


def columns_of(value: Tensor, shape: torch.Size, what: str) -> Tensor:
    """A parameter in any of the shapes that users write as `[T or 1, columns]`, columns 1, C or C*S.

    value: scalar, `[C]`, or `[T or 1, C, *S]` where any of C, *S may be 1. shape: [N, C, *S] of a step.
    """
    channels = shape[1] if len(shape) > 1 else None
    if value.numel() == 1:
        return value.reshape(1, 1)
    if value.dim() == 1 and channels is not None and value.shape[0] == channels:
        return value.reshape(1, channels)
    tail = tuple(shape[1:])
    if channels is not None and value.dim() == len(shape) and all(a in (1, b) for a, b in zip(value.shape[1:], tail)):
        steps = value.shape[0]
        if all(a == 1 for a in value.shape[1:]):
            return value.reshape(steps, 1)
        if all(a == 1 for a in value.shape[2:]):
            return value.reshape(steps, channels)
        return value.expand(steps, *tail).reshape(steps, -1)
    wanted = "a number or a scalar tensor"
    if channels is not None:
        wanted += f", [{channels}] (one per channel), or [T or 1, {', '.join(map(str, tail))}] (one per neuron)"
    raise ValueError(f"{what} has shape {list(value.shape)}; wanted {wanted}, for steps of shape {list(shape)}.")


class _Gate(torch.autograd.Function):
    """Identity; its gradient is cut unless the adjoint chosen at the backward pass is bptt."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value, choose):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.choose = inputs

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.choose().adjoint == "bptt" else torch.zeros_like(grad)), None


class _Route(torch.autograd.Function):
    """Identity on the spikes; sends their gradient through the recurrence (bptt) or straight to the current."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spikes, current, straight, choose):
        return spikes.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        spikes, _, ctx.straight, ctx.choose = inputs
        ctx.save_for_backward(spikes)

    @staticmethod
    def backward(ctx, grad):
        choice = ctx.choose()
        if choice.adjoint == "bptt":
            return grad, None, None, None
        return None, ctx.straight(choice, grad, *ctx.saved_tensors), None, None


def simulate(
    x: Tensor,
    v0: Tensor | None,
    decay: Tensor | float,
    threshold: Tensor | float,
    gain: Tensor | None,
    seed: Tensor | None,
    steps: int,
    dynamics: Dynamics,
    statistics: bool = False,
    surrogate: Surrogate | None = None,
    layer: int = 0,
    soft: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> Trace:
    """`steps` steps of charge, fire, reset, with gradients by autograd.

    x: [T, N, C, *S] float, or [1, N, C, *S] (constant current). v0: [N, C, *S] or None: v_reset for a hard reset, else 0.
    decay (or tau, or q, by the row of the charge), threshold: a number, or [T or 1, 1 or C or C*S].
    gain: [T] or None. seed: [1] int64, for gaussian firing. surrogate: the layer's own; None: no gradient is taken.
    soft: (z, threshold, t) -> spikes, in place of the step, for finite differences.
    """
    d = dynamics
    shape, real = x.shape[1:], state_dtype(x.dtype)
    currents = [x[0].to(real)] * steps if x.shape[0] == 1 and steps > 1 else [step.to(real) for step in x.unbind(0)]
    if gain is not None:
        currents = [g * current for g, current in zip(gain.to(real).unbind(0), currents, strict=True)]
    like = currents[0]
    r = torch.full((), d.v_reset, dtype=real, device=x.device)
    decays, thresholds = spread(decay, shape, like), spread(threshold, shape, like)
    if v0 is None:
        start = d.v_reset if d.reset == "hard" else 0.0
        v = torch.full(shape, start, dtype=real, device=x.device)
    else:
        v = v0.to(real)

    zs: list[Tensor] = []
    chosen: list[adjoints.Choice] = []

    def moments() -> tuple[Tensor | None, Tensor | None]:
        if len(shape) < 2:
            return None, None
        with torch.no_grad():
            return mean_and_variance(torch.stack(zs).detach())

    def choose() -> adjoints.Choice:
        if d.fire == "none":  # a leaky integrator is linear: its exact gradient is the only one
            return adjoints.Choice("bptt", surrogate)
        return adjoints.choose(surrogate, layer, moments)

    hs, spikes = [], []
    differentiable = surrogate is not None and (torch.is_grad_enabled() or forward_mode())
    for t in range(steps):
        p = decays[t if decays.shape[0] > 1 else 0]
        theta = thresholds[t if thresholds.shape[0] > 1 else 0]
        fired = (v - theta > 0).detach().to(real) if d.reset in DELAYED_RESETS else None
        u = (1 - fired) * v if d.reset == "delayed_hard" else v
        h = charge(d.charge, u, currents[t], p, r)
        if d.reset in ("delayed_soft", "snntorch_soft"):
            h = h - fired * theta
        z = h - theta
        if d.fire == "none":
            s = h
        elif soft is not None:
            s = soft(z, theta, t)
        else:
            match d.fire:
                case "ge":
                    on = z >= 0
                case "gt":
                    on = z > 0
                case "gaussian":
                    sigma = torch.full((), d.noise, dtype=real, device=x.device)
                    on = uniform(seed, shape, d.first_step + t, like) < normal_cdf(z.detach() / sigma)
                case _:
                    raise ValueError(f"reference: fire {d.fire!r} has a row in kernels/lif.def and no branch here.")
            s = on.detach().to(real)
            if differentiable:
                s = _Spike.apply(z, theta.expand_as(z), s, t, shape, choose)
        v = h if d.fire == "none" else next_state(d.reset, h, s.detach() if d.detach_reset else s, theta, fired, r)
        hs.append(h)
        zs.append(z)
        spikes.append(s)

    h, s, z = torch.stack(hs), torch.stack(spikes), torch.stack(zs)
    out = s
    if differentiable:

        def straight(choice: adjoints.Choice, grad: Tensor, spikes: Tensor) -> Tensor:
            return straight_gradient(choice, grad, spikes, z, torch.stack(currents), decays, thresholds, gain, d, x.shape[0], shape)

        out = _Route.apply(s, x.to(real), straight, choose)
        v, h, z, s = (_Gate.apply(value, choose) for value in (v, h, z, s))
    trace = {}
    if statistics:
        trace["mean"], trace["var"] = mean_and_variance(z)
        dims = [0, *range(2, len(shape))]
        trace["rate"] = torch.stack([step.double().mean(dims) for step in s.unbind(0)]).to(real)
        if d.guard is not None:
            delta, power = d.guard
            room = torch.relu(delta - z.double().abs())
            held = torch.where(room.isnan(), room, (room > 0).double()) if power == 0 else room**power
            trace["guard"] = torch.stack([step.mean(dims) for step in held.unbind(0)]).to(real)
    return Trace(out.to(x.dtype), v, h, **trace)


def mean_and_variance(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [T, C] of z [T, N, C, *S] over batch and space, computed in float64."""
    dims = [1, *range(3, z.dim())]
    wide = z.double()
    mean = wide.mean(dims, keepdim=True)
    return mean.flatten(1).to(z.dtype), (wide - mean).square().mean(dims).to(z.dtype)


def mean_over_steps(values: Tensor) -> Tensor:
    """The mean over the first dimension, added up in its order: where a weight jumps at a value of it, the last bit counts."""
    total = values[0]
    for step in values[1:]:
        total = total + step
    return total / len(values)


def straight_gradient(choice, grad, spikes, z, current, decays, thresholds, gain, dynamics, x_steps, shape) -> Tensor:
    """The gradient of x under an approximation: bptr, spatial, hart or rga. METHODS of each: `fastsnn.adjoint`."""
    steps = grad.shape[0]
    d = dynamics
    if choice.adjoint == "bptr":
        g = grad * (spikes.mean(0, keepdim=True) > 0)
    elif choice.adjoint == "rga":
        theta, p = mean_over_steps(thresholds), mean_over_steps(decays)
        tau = p if d.charge == "leak" else (1 - p if d.charge.endswith("_q") else 1 - 1 / p)
        mean_input = mean_over_steps(current / thresholds)
        low, high = RGA_GAMMA, (1 - RGA_GAMMA + RGA_GAMMA * tau) / (1 + tau)
        one = 1 - tau
        inner, outer = (mean_input >= 0) & (mean_input <= one), (mean_input > one) & (mean_input <= 2)
        g = grad * (low * inner.to(grad.dtype) + high * outer.to(grad.dtype)) / theta
    else:
        g = torch.stack([
            grad[t] * slope_at(choice.surrogate, z[t], thresholds[t if len(thresholds) > 1 else 0], t, shape)[0]
            for t in range(steps)
        ])
        if d.charge == "leak_input":
            g = g / decays
        elif d.charge == "leak_input_q":
            g = g * decays
        if choice.adjoint == "hart":
            g = g.mean(0, keepdim=True).expand_as(g)
    if gain is not None:
        g = g * gain.reshape(-1, *(1 for _ in shape))
    return g.sum(0, keepdim=True) if x_steps == 1 and steps > 1 else g


#: gamma of RGA (Bu et al., CVPR 2023): the weight of inputs that a neuron integrates without firing.
RGA_GAMMA = 0.2
