"""Calls that repeat on a CPU: what `lif` found out about its arguments, kept for the next call with the same ones.

A small layer runs in less time than its arguments take to be checked, sent through torch's dispatcher and packed into
`struct Problem`. A plan holds that struct for one set of arguments and one layout of x; a call copies it, writes the
addresses of its tensors and runs the kernel. Plans serve numbers only (no tensors but x) and plain eager calls: whoever
compiles, transforms, traces or profiles finds the operators of `ops`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from . import adjoints, launch, ops
from .backends import BACKENDS
from .launch import ROWS
from .problem import Problem
from .reference import state_dtype
from .surrogates import Surrogate

__all__ = ["Plan", "find", "key_of", "make", "plain"]

#: Plans kept, and backward templates in each; at more, all of them are made anew.
MOST = 512

_NUMBERS = {int, float, bool, str, tuple, type(None)}
_TENSORS = (Tensor, nn.Parameter)
_plans: dict[tuple, Plan] = {}
#: Numbers that a call was made with, by their identities, and what a key holds of them. They are kept alive, so that no
#: others can take their identities.
_known: dict[tuple[int, ...], tuple[tuple, tuple]] = {}


def ordinary(x: Tensor) -> bool:
    """Whether the memory of x holds its values, on the CPU."""
    return type(x) in _TENSORS and x.is_cpu and x.layout is torch.strided and not x.is_neg() and not torch._C._functorch.is_legacy_batchedtensor(x)


def plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor, and nothing but autograd looks on."""
    return (
        not torch.compiler.is_compiling()
        and ordinary(x)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
        and torch.autograd.forward_ad._current_level < 0
        # Who saves tensors in a way of his own, checkpointing above all, must see the same ones at every call.
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def key_of(x: Tensor, values: tuple, surrogate: Surrogate | None) -> tuple | None:
    """What a plan depends on; None where one of the values is a tensor or something else that a key cannot hold."""
    identities = tuple(map(id, values))
    known = _known.get(identities)
    if known is None:
        kinds = tuple(map(type, values))
        if not _NUMBERS.issuperset(kinds) or not all(_NUMBERS.issuperset(map(type, value)) for value in values if type(value) is tuple):
            return None
        if len(_known) >= MOST:
            _known.clear()
        # Equal keys must mean equal bits and equal complaints, and 1 == 1.0 == True and 0.0 == -0.0.
        known = _known[identities] = values, (kinds, tuple([value or repr(value) for value in values]))
    return x.shape, x.stride(), x.dtype, torch.get_num_threads(), surrogate, known[1]


def find(key: tuple) -> Plan | None:
    try:
        plan = _plans.get(key)
    except TypeError:  # a tuple with something in it that has no hash
        return None
    return plan if plan is not None and plan.serves and plan.cpu is BACKENDS["cpu"] else None


def make(key: tuple, x: Tensor, config: ops.Config, surrogate: Surrogate) -> None:
    """Keep a plan for later calls. One that cannot serve them is kept too: it is not tried again."""
    if config.backend != "cpu" or config.fire == "gaussian" or any(isinstance(value, Tensor) for value in surrogate.values):
        return
    known = _plans.get(key)
    if known is not None and known.cpu is BACKENDS["cpu"]:
        return
    if len(_plans) >= MOST:
        _plans.clear()
    # A copy: what changes its surrogate later must not change a backward pass that is still to come.
    _plans[key] = Plan(x, config, copy.copy(surrogate))


class _Recorder:
    """A backend that keeps the call: a forward one, on meta tensors, is not run; a backward one runs on the CPU."""

    name, keeps_states = "cpu", False
    call: launch.Call | None = None

    def forward(self, call: launch.Call) -> None:
        self.call = call

    def backward(self, call: launch.Call) -> None:
        self.call = call
        BACKENDS["cpu"].backward(call)

    def template(self, *tensors: str) -> bytes | None:
        """The struct of the call, if it refers to these tensors and no others."""
        if self.call is None or self.call.tensors.keys() != set(tensors):
            return None
        return bytes(self.call.problem())


class Plan:
    """One set of arguments of `lif`, for inputs of one layout and dtype."""

    def __init__(self, x: Tensor, config: ops.Config, surrogate: Surrogate) -> None:
        self.config, self.surrogate, self.cpu = config, surrogate, BACKENDS["cpu"]
        self.dynamics = ops.dynamics_of(config)
        self.layout, self.real = launch.layout_of(x), state_dtype(x.dtype)
        self.input = x.shape, x.stride(), x.dtype
        #: The rows of the table that are asked for, and those that the kernel fills, as places.
        self.rows = tuple(place for place in range(4) if config.statistics & 1 << place)
        self.filled = tuple(sorted({0, 1, *self.rows})) if self.rows else ()
        self.backwards: dict[tuple, bytes] = {}
        recorder, shape = _Recorder(), torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        launch.forward(
            recorder, shape, *[None] * 5, config.steps, self.dynamics, config.decay_value, config.threshold_value, config.membrane, config.statistics
        )  # fmt: skip
        self.template = recorder.template("x", "spikes", "v", *["membrane"] * config.membrane, *(ROWS[place] for place in self.filled))
        #: Whether calls can be repeated from the template; not where x must be copied first.
        self.serves = self.template is not None and recorder.call.tensors["x"] is shape

    def run(self, x: Tensor, layer: int) -> tuple[Tensor, ...]:
        """spikes, v, the membrane where asked for, and the rows [T, C] asked for; differentiable."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Planned.apply(x, self, layer)
        return self.forward(x)[0]

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What `run` returns, and the table in float64."""
        layout, steps, device = self.layout, self.config.steps, x.device
        spikes, v = layout.empty(steps, x.dtype, device), layout.empty(None, self.real, device)
        problem = Problem.from_buffer_copy(self.template)
        problem.x, problem.spikes, problem.v = x.data_ptr(), spikes.data_ptr(), v.data_ptr()
        results, table = [spikes, v], None
        if self.config.membrane:
            membrane = layout.empty(steps, self.real, device)
            problem.membrane = membrane.data_ptr()
            results.append(membrane)
        if self.filled:
            table = torch.empty(4, steps, layout.channels, dtype=torch.float64)
            for place in self.filled:
                setattr(problem, ROWS[place], self._row(table, place))
            for place in self.rows:
                row = torch.empty(steps, layout.channels, dtype=self.real)
                problem.rows[place] = row.data_ptr()
                results.append(row)
        self.cpu.run_forward(problem)
        return tuple(results), table

    def backward(self, x: Tensor, table: Tensor | None, layer: int, spikes, v, membrane, rows: tuple) -> Tensor:
        """The gradient of x, through the adjoint of this moment, from those of the outputs (None where there is none)."""
        config, layout = self.config, self.layout
        name, surrogate = "bptt", self.surrogate
        if config.fire != "none":
            choice = adjoints.choose(surrogate, layer, lambda: self._moments(x))
            name, surrogate = choice.adjoint, choice.surrogate
        key = (name, surrogate, spikes is None, v is None, membrane is None, *[row is None for row in rows])
        template = self.backwards.get(key)
        if template is None:
            return self._first_backward(key, x, table, spikes, v, membrane, rows)
        problem = Problem.from_buffer_copy(template)
        g_x = layout.empty(x.shape[0], x.dtype, x.device)
        problem.x, problem.g_x = x.data_ptr(), g_x.data_ptr()
        held = []  # what is not in the kernel's layout and dtype is copied, and must live until the kernel is done
        if spikes is not None:
            held.append(layout.all_steps(spikes, x.dtype))
            problem.g_spikes = held[-1].data_ptr()
        if name == "bptt":
            if v is not None:
                held.append(layout.step(v, self.real))
                problem.g_v = held[-1].data_ptr()
            if membrane is not None:
                held.append(layout.all_steps(membrane, self.real))
                problem.g_membrane = held[-1].data_ptr()
            for place, row in zip(self.rows, rows):
                if row is not None:
                    held.append(row.contiguous())
                    problem.g_rows[place] = held[-1].data_ptr()
                    if ROWS[place] == "variance":
                        problem.mean = self._row(table, 0)
        self.cpu.run_backward(problem)
        return g_x

    def _first_backward(self, key: tuple, x: Tensor, table: Tensor | None, spikes, v, membrane, rows: tuple) -> Tensor:
        """The same the long way, which leaves a template."""
        name, surrogate = key[:2]
        config, recorder = self.config, _Recorder()
        arrived = [place for place, row in zip(self.rows, rows) if row is not None]
        done = launch.backward(
            recorder, launch.Gradients(spikes, v, membrane, self.spread(rows)), x, None, None, None, None, None, None, None if table is None else table[0],
            config.steps, self.dynamics, surrogate, name, config.decay_value, config.threshold_value, (True, False, False, False, False),
            sum(1 << place for place in arrived),
        )  # fmt: skip
        names = ["x", "g_x"] + ["g_spikes"] * (spikes is not None)
        if name == "bptt":
            names += ["g_v"] * (v is not None) + ["g_membrane"] * (membrane is not None)
            names += [f"g_{ROWS[place]}" for place in arrived] + ["mean"] * (1 in arrived)
        template = recorder.template(*names)
        if template is not None and not any(isinstance(value, Tensor) for value in surrogate.values):
            if len(self.backwards) >= MOST:
                self.backwards.clear()
            self.backwards[key] = self._by_rows(template, arrived)
        return done.x

    @staticmethod
    def _by_rows(template: bytes, arrived: list[int]) -> bytes:
        """The template of a call that hands over the gradients of rows as they come."""
        problem = Problem.from_buffer_copy(template)
        for place in arrived:
            setattr(problem, f"g_{ROWS[place]}", None)
        return bytes(problem)

    def spread(self, rows: tuple) -> Tensor | None:
        """Gradients of the rows asked for as one of the whole table, [4, T, C]; None where none arrived."""
        there = {place: row for place, row in zip(self.rows, rows) if row is not None}
        if not there:
            return None
        zero = torch.zeros(self.config.steps, self.layout.channels, dtype=self.real)
        return torch.stack([there.get(place, zero) for place in range(4)])

    def _row(self, table: Tensor, place: int) -> int:
        """The address of a row of the table."""
        return table.data_ptr() + 8 * place * self.config.steps * self.layout.channels

    def _moments(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if x.dim() < 3:
            return None, None
        config = self.config
        found = launch.forward(
            self.cpu, x, *[None] * 5, config.steps, self.dynamics, config.decay_value, config.threshold_value, statistics=launch.MEAN | launch.VARIANCE
        )  # fmt: skip
        return found.table[0].to(self.real), found.table[1].to(self.real)


class _Planned(torch.autograd.Function):
    """A plan with its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: Plan, layer: int):
        results, ctx.table = plan.forward(x)
        ctx.plan, ctx.layer = plan, layer
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, spikes, v, *more):
        (x,) = ctx.saved_tensors
        plan = ctx.plan
        membrane, rows = (more[0], more[1:]) if plan.config.membrane else (None, more)
        arrived = [grad for grad in (spikes, v, *more) if grad is not None]
        # A hook on the saved tensor may have brought it back otherwise than it was.
        as_planned = (x.shape, x.stride(), x.dtype) == plan.input and plain(x) and all(map(ordinary, arrived))
        if torch.is_grad_enabled() or not as_planned:
            config = plan.config._replace(layer=ctx.layer)
            return ops.derive((spikes, v, membrane, plan.spread(rows)), (x, *[None] * 5), None, ctx.table, None, None, None, config, [True] + [False] * 4)[0], None, None
        if any(row is not None for row in rows):
            # As the operators see it, where all rows are one table: another choice of rows may be summed in another order.
            rows = tuple(torch.zeros(plan.config.steps, plan.layout.channels, dtype=plan.real) if row is None else row for row in rows)
        elif spikes is None and v is None and membrane is None:
            return None, None, None
        return plan.backward(x, ctx.table, ctx.layer, spikes, v, membrane, rows), None, None
