"""`fastsnn::lif_forward` and `fastsnn::lif_backward`: the operators, their fakes, and the autograd around them.

The operators are opaque to `torch.compile` and know nothing of gradients; two `autograd.Function`s outside bind them
together. The second one stands around the backward operator, so that first derivatives work under `create_graph=True`
and `torch.func`, and a second derivative raises instead of being silently wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import adjoints, launch, reference
from .backends import BACKENDS, resolve
from .launch import STATE_INTERVAL, STEPS_IN_REGISTERS, Gradients
from .reference import Dynamics, state_dtype
from .surrogates import BY_NAME, Surrogate


class Config(NamedTuple):
    """Everything about a call that is not a tensor, in the order of the operators' schemas."""

    steps: int
    charge: str
    fire: str
    reset: str
    v_reset: float
    detach_reset: bool
    noise: float
    first_step: int
    decay_value: float
    threshold_value: float
    delta: float
    power: int  # of the guard; -1: no guard
    backend: str
    membrane: bool
    statistics: int  # which rows of the table: 1 mean, 2 variance, 4 rate, 8 guard
    keep_states: bool
    surrogate: str
    a_value: float
    b_value: float
    relative: bool
    layer: int


_DYNAMICS = (
    "int steps, str charge, str fire, str reset, float v_reset, bool detach_reset, float noise, int first_step, "
    "float decay_value, float threshold_value, float delta, int power, str backend"
)
_INPUTS = "Tensor x, Tensor? v0, Tensor? decay, Tensor? threshold, Tensor? gain, Tensor? seed"
_SHARED = len(_DYNAMICS.split(","))

_library = torch.library.Library("fastsnn", "DEF")
_library.define(
    f"lif_forward({_INPUTS}, {_DYNAMICS}, bool membrane, int statistics, bool keep_states) "
    "-> (Tensor spikes, Tensor v, Tensor membrane, Tensor states, Tensor table)"
)
_library.define(
    "lif_backward(Tensor? g_spikes, Tensor? g_v, Tensor? g_membrane, Tensor? g_table, "
    f"{_INPUTS}, Tensor states, Tensor table, Tensor? a, Tensor? b, Tensor? tag, {_DYNAMICS}, str surrogate, float a_value, "
    "float b_value, bool relative, int layer, int statistics, bool[] needs) "
    "-> (Tensor g_x, Tensor g_v0, Tensor g_decay, Tensor g_threshold, Tensor g_gain)"
)


def _dynamics(charge, fire, reset, v_reset, detach_reset, noise, first_step, delta, power) -> Dynamics:
    return Dynamics(charge, fire, reset, v_reset, detach_reset, noise, first_step, None if power < 0 else (delta, power))


def dynamics_of(config: Config) -> Dynamics:
    """The recurrence of a call."""
    return _dynamics(*config[1:8], config.delta, config.power)


def _layout(x: Tensor, *parameters: Tensor | None) -> launch.Layout:
    """The layout of the results; the same from a fake tensor as from a real one."""
    return launch.call_layout(x, parameters)


def _keeps_states(x: Tensor, steps: int, backend: str) -> bool:
    return steps > STEPS_IN_REGISTERS and (x.device.type == "cuda" or backend in ("triton", "cuda"))


def _backend_of(name: str, x: Tensor):
    return BACKENDS[name] if name in BACKENDS else resolve(name, x)


def _forward(
    x, v0, decay, threshold, gain, seed,
    steps, charge, fire, reset, v_reset, detach_reset, noise, first_step, decay_value, threshold_value, delta, power, backend,
    membrane, statistics, keep_states,
):  # fmt: skip
    """fastsnn::lif_forward on real tensors; what was not asked for comes back empty."""
    dynamics = _dynamics(charge, fire, reset, v_reset, detach_reset, noise, first_step, delta, power)
    chosen = _backend_of(backend, x)
    real = state_dtype(x.dtype)

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype, device=x.device)

    if chosen.name == "reference":
        layout = _layout(x, decay, threshold)
        with torch.no_grad():
            trace = reference.simulate(
                x, v0, decay_value if decay is None else decay, threshold_value if threshold is None else threshold,
                gain, seed, steps, dynamics, bool(statistics),
            )  # fmt: skip
        found = launch.Forward(
            layout.all_steps(trace.spikes, x.dtype),
            layout.step(trace.v.clone(), real),
            layout.all_steps(trace.membrane, real) if membrane else None,
            None,
            launch.moment_table(trace) if statistics else None,
        )
    else:
        found = launch.forward(
            chosen, x, v0, decay, threshold, gain, seed, steps, dynamics, decay_value, threshold_value, membrane, statistics, keep_states
        )
    states = found.states
    if states is None:
        states = empty(real)
        if keep_states and _keeps_states(x, steps, backend):
            states = _layout(x, decay, threshold).empty(-(-steps // STATE_INTERVAL), real, x.device)
    return (
        found.spikes,
        found.v,
        empty(real) if found.membrane is None else found.membrane,
        states,
        empty(torch.float64) if found.table is None else found.table,
    )


def _uninitialised(layout: launch.Layout, steps: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(*layout.shape(steps), dtype=dtype, device=device)


def _forward_fake(
    x, v0, decay, threshold, gain, seed,
    steps, charge, fire, reset, v_reset, detach_reset, noise, first_step, decay_value, threshold_value, delta, power, backend,
    membrane, statistics, keep_states,
):  # fmt: skip
    layout, real, device = _layout(x, decay, threshold), state_dtype(x.dtype), x.device
    kept = keep_states and _keeps_states(x, steps, backend)
    return (
        _uninitialised(layout, steps, x.dtype, device),
        _uninitialised(layout, None, real, device),
        _uninitialised(layout, steps, real, device) if membrane else torch.empty(0, dtype=real, device=device),
        _uninitialised(layout, -(-steps // STATE_INTERVAL), real, device) if kept else torch.empty(0, dtype=real, device=device),
        torch.empty((4, steps, layout.channels) if statistics else (0,), dtype=torch.float64, device=device),
    )


def _own_surrogate(name: str, a: Tensor | float, b: Tensor | float, relative: bool) -> Surrogate:
    """The surrogate that a layer was made with, from the operator's arguments."""
    surrogate = object.__new__(BY_NAME[name])
    surrogate.relative = relative
    for parameter, value in zip(surrogate.parameters, (a, b)):
        setattr(surrogate, parameter, value)
    return surrogate


def _backward(
    g_spikes, g_v, g_membrane, g_table,
    x, v0, decay, threshold, gain, seed, states, table, a, b, tag,
    steps, charge, fire, reset, v_reset, detach_reset, noise, first_step, decay_value, threshold_value, delta, power, backend,
    surrogate, a_value, b_value, relative, layer, statistics, needs,
):  # fmt: skip
    """fastsnn::lif_backward on real tensors. The adjoint is read here, and not before.

    layer: the layer's number; or 0, and tag, a tensor [1], holds it, so that one compiled graph serves many layers.
    """
    layer = layer if tag is None else tag
    dynamics = _dynamics(charge, fire, reset, v_reset, detach_reset, noise, first_step, delta, power)
    chosen = _backend_of(backend, x)
    own = _own_surrogate(surrogate, a_value if a is None else a, b_value if b is None else b, relative)
    parameters = (decay_value if decay is None else decay, threshold_value if threshold is None else threshold)

    def moments():
        if x.dim() < 3:
            return None, None
        if chosen.name == "reference":
            with torch.no_grad():
                trace = reference.simulate(x, v0, *parameters, gain, seed, steps, dynamics, True)
            return trace.mean, trace.var
        found = launch.forward(chosen, x, v0, decay, threshold, gain, seed, steps, dynamics, decay_value, threshold_value, statistics=3)
        return found.table[0].to(state_dtype(x.dtype)), found.table[1].to(state_dtype(x.dtype))

    # A compiled graph sends zeros of the size of the output where nothing arrives, so of size 0 for what was not asked for.
    gradients = Gradients(*(g if g is not None and g.numel() else None for g in (g_spikes, g_v, g_membrane, g_table)))
    if chosen.name == "reference":
        results = _reference_backward(gradients, x, v0, decay, threshold, gain, seed, parameters, steps, dynamics, own, layer, needs)
    else:
        choice = adjoints.choose(own, layer, moments) if fire != "none" else adjoints.Choice("bptt", own)
        done = launch.backward(
            chosen, gradients, x, v0, decay, threshold, gain, seed, states if states.numel() else None, table[0] if table.numel() else None,
            steps, dynamics, choice.surrogate, choice.adjoint, decay_value, threshold_value, tuple(needs), statistics,
        )  # fmt: skip
        layout = _layout(x, decay, threshold)  # a surrogate per neuron may have asked for another
        g_v0 = done.v0 if done.v0 is None else layout.step(done.v0, done.v0.dtype)
        results = (layout.all_steps(done.x, x.dtype), g_v0, done.decay, done.threshold, done.gain)
    return tuple(torch.empty(0, dtype=x.dtype, device=x.device) if value is None else value for value in results)


def _reference_backward(gradients, x, v0, decay, threshold, gain, seed, parameters, steps, dynamics, own, layer, needs):
    """The same by autograd through the reference, for machines without kernels."""
    inputs = [value if value is None else value.detach().requires_grad_(need) for value, need in zip((x, v0, decay, threshold, gain), needs)]
    with torch.enable_grad():
        decay_, threshold_ = (new if new is not None else number for new, number in zip(inputs[2:4], parameters))
        trace = reference.simulate(inputs[0], inputs[1], decay_, threshold_, inputs[4], seed, steps, dynamics, True, own, layer)
        outs = (trace.spikes, trace.v, trace.membrane, launch.moment_table(trace))
    arrived = (gradients.spikes, gradients.v, gradients.membrane, gradients.table)
    pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outs, arrived) if grad is not None]
    wanted = [value for value, need in zip(inputs, needs) if need and value is not None]
    found = iter(torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True))
    results = []
    layout = _layout(x, decay, threshold)
    for place, (value, need) in enumerate(zip(inputs, needs)):
        if not need or value is None:
            results.append(None)
            continue
        grad = next(found)
        grad = torch.zeros_like(value) if grad is None else grad
        results.append(layout.all_steps(grad, x.dtype).clone() if place == 0 else layout.step(grad, value.dtype).clone() if place == 1 else grad.clone())
    return results


def _backward_fake(
    g_spikes, g_v, g_membrane, g_table,
    x, v0, decay, threshold, gain, seed, states, table, a, b, tag,
    steps, charge, fire, reset, v_reset, detach_reset, noise, first_step, decay_value, threshold_value, delta, power, backend,
    surrogate, a_value, b_value, relative, layer, statistics, needs,
):  # fmt: skip
    layout = _layout(x, decay, threshold)

    def like(value: Tensor | None, need: bool) -> Tensor:
        if value is None or not need:
            return torch.empty(0, dtype=x.dtype, device=x.device)
        return torch.empty(value.shape, dtype=value.dtype, device=x.device)

    g_x = _uninitialised(layout, x.shape[0], x.dtype, x.device) if needs[0] else torch.empty(0, dtype=x.dtype, device=x.device)
    g_v0 = _uninitialised(layout, None, v0.dtype, x.device) if needs[1] and v0 is not None else like(None, False)
    return g_x, g_v0, like(decay, needs[2]), like(threshold, needs[3]), like(gain, needs[4])


for _name, _real, _fake in (("lif_forward", _forward, _forward_fake), ("lif_backward", _backward, _backward_fake)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _real, _key)
    torch.library.register_fake(f"fastsnn::{_name}", _fake, lib=_library)


def _vmap(operator):
    """Batched by one call for each element: right for statistics and for sums over the batch alike."""

    def rule(info, in_dims, *args):
        dims = [d if not isinstance(a, (list, tuple)) else None for d, a in zip(in_dims, args)]
        calls = [
            operator(*(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, dims)))
            for i in range(info.batch_size)
        ]
        outs = tuple(torch.stack(values) for values in zip(*calls))
        return outs, (0,) * len(outs)

    return rule


torch.library.register_vmap("fastsnn::lif_forward", _vmap(torch.ops.fastsnn.lif_forward), lib=_library)
torch.library.register_vmap("fastsnn::lif_backward", _vmap(torch.ops.fastsnn.lif_backward), lib=_library)


class _Backward(torch.autograd.Function):
    """The backward operator; differentiating through it raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return torch.ops.fastsnn.lif_backward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "lif: a second derivative was asked for; the fused backward pass has none (it would be silently wrong). "
            "Make this layer with backend='reference', which autograd differentiates any number of times."
        )


def derive(gradients, inputs, states, table, a, b, tag, config: Config, needs: list[bool]) -> tuple[Tensor, ...]:
    """The gradients of x, v0, decay, threshold and gain by the backward operator; empty where not needed.

    gradients: of spikes, v, membrane and table. inputs: x, v0, decay, threshold, gain, seed. states, table: as forward kept them.
    """
    # A compiled graph has no second derivative to guard, and Dynamo cannot trace a Function within a backward.
    if torch.compiler.is_compiling():
        operator = torch.ops.fastsnn.lif_backward
    else:
        operator = _EagerBackward.apply if _plain_eager() else _Backward.apply
    x = inputs[0]
    states = x.new_empty(0, dtype=state_dtype(x.dtype)) if states is None else states
    table = x.new_empty(0, dtype=torch.float64) if table is None else table
    return operator(
        *gradients, *inputs, states, table, a, b, tag, *config[:_SHARED],
        config.surrogate, config.a_value, config.b_value, config.relative, config.layer, config.statistics, needs,
    )  # fmt: skip


class _Forward(torch.autograd.Function):
    """lif_forward with lif_backward as its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, v0, decay, threshold, gain, seed, a, b, tag, config):
        config = Config(*config)
        spikes, v, membrane, states, table = torch.ops.fastsnn.lif_forward(
            x, v0, decay, threshold, gain, seed, *config[:_SHARED], config.membrane, config.statistics, config.keep_states
        )
        # The table comes back twice: in the dtype of the state, to be used, and in float64, for the backward pass.
        return spikes, v, membrane, table.to(state_dtype(x.dtype), copy=True), states, table

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:9], *output[-2:])
        ctx.config = inputs[9]
        ctx.mark_non_differentiable(*output[-2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        x, v0, decay, threshold, gain, seed, a, b, tag, states, table = ctx.saved_tensors
        config = Config(*ctx.config)
        needs = [bool(need) for need in ctx.needs_input_grad[:5]]
        results = derive(grads[:4], (x, v0, decay, threshold, gain, seed), states, table, a, b, tag, config, needs)
        values = (x, v0, decay, threshold, gain)
        return *(g if need and v is not None else None for g, need, v in zip(results, needs, values)), None, None, None, None, None


def _eager(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same Function in the older style, for plain eager calls: torch binds the arguments of one with `setup_context`
    to its signature at each call, which costs more than the kernel of a small layer."""

    def forward(ctx, *inputs):
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    return type(f"{function.__name__}Eager", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(function.backward)})


_EagerForward, _EagerBackward = _eager(_Forward), _eager(_Backward)


def _plain_eager() -> bool:
    """Whether neither a compiler nor a transform of torch.func looks on."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def run(x, v0, decay, threshold, gain, seed, a, b, tag, config: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(spikes, v, membrane, table), differentiable; what was not asked for is empty.

    table: [4, T, C] mean, variance, rate and guard.
    """
    if torch.is_grad_enabled() or reference.forward_mode():
        if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            # Compiled within torch.func.grad the gradient of any autograd.Function comes out as zeros (torch 2.13); not so outside of the graph.
            torch._dynamo.graph_break(msg="torch.func.grad around fastsnn.lif in a compiled graph: compile what is outside of it")
        function = _EagerForward if _plain_eager() else _Forward
        return reference.in_reverse(function.apply, x, v0, decay, threshold, gain, seed, a, b, tag, tuple(config))[:4]
    spikes, v, membrane, _, table = torch.ops.fastsnn.lif_forward(
        x, v0, decay, threshold, gain, seed, *config[:_SHARED], config.membrane, config.statistics, False
    )
    return spikes, v, membrane, table.to(state_dtype(x.dtype))
