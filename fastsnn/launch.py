"""From tensors to one call of a compiled kernel: memory layout, output buffers, `struct Problem`.

A kernel sees a step of x as `[count]` elements in memory order, so any dense memory format is served without a copy;
what depends on a channel or a neuron finds it by arithmetic on the place (`kernels/problem.def`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import memory
from .problem import Problem
from .reference import RGA_GAMMA, Dynamics, Trace, columns_of, state_dtype
from .surrogates import Surrogate, check_row
from .tables import ADJOINTS, CHARGES, FIRES, RESETS, SURROGATES

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

#: The rows of the table of statistics.
MEAN, VARIANCE, RATE, GUARD = 1, 2, 4, 8
ALL = MEAN | VARIANCE | RATE | GUARD

#: Their names in `struct Problem`, in order.
ROWS = ("mean", "variance", "rate", "guard")

#: Dimensions of a step that a kernel tells apart where they are not in order (`order_inner` and its neighbours).
MOST_DIMENSIONS = 8

#: Above this many steps the GPU kernels keep one state per STATE_INTERVAL steps for the backward pass.
STEPS_IN_REGISTERS = 32
STATE_INTERVAL = 16


@dataclass
class Call:
    """The fields of `struct Problem`: `tensors` for the pointers, `numbers` for the rest; absent means null or 0."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, int | float | tuple[int, ...]] = field(default_factory=dict)

    def put(self, **fields: Tensor | float | None) -> None:
        for name, value in fields.items():
            if isinstance(value, Tensor):
                self.tensors[name] = value
            elif value is not None:
                self.numbers[name] = value

    def put_parameter(self, name: str, value: Tensor | None, number: float, steps: int) -> None:
        """A parameter as a tensor [T or 1, columns] in memory order, or as a number."""
        self.numbers |= {f"{name}_value": number, f"{name}_steps": 1, f"{name}_columns": 1}
        if value is not None:
            self.tensors[name] = value
            self.numbers |= {f"{name}_steps": value.shape[0], f"{name}_columns": value.shape[1]}

    def problem(self) -> Problem:
        """The struct; the tensors must stay alive until the kernel is done."""
        return Problem(**self.numbers, **{name: tensor.data_ptr() for name, tensor in self.tensors.items()})


def step_strides(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense step with its dimensions in memory in the order of `strides`."""
    dims = range(len(sizes))
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides)):
        order = list(dims)  # expanded: its strides tell nothing
    else:
        # Size-1 dimensions have arbitrary strides; they take the place that row-major order gives them.
        order = sorted((d for d in dims if sizes[d] != 1), key=lambda d: (-strides[d], d))
    result, step = [1] * len(sizes), 1
    for d in reversed(order):
        result[d] = step
        step = step * sizes[d]
    for d in reversed(dims):
        if sizes[d] == 1:
            result[d] = result[d + 1] * sizes[d + 1] if d + 1 < len(sizes) else 1
    return tuple(result)


def contiguous_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides."""
    result, step = [], 1
    for size in reversed(sizes):
        result.append(step)
        step = step * size
    return tuple(reversed(result))


@dataclass(frozen=True)
class Layout:
    """How a step [N, C, *S] lies in memory."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @functools.cached_property
    def count(self) -> int:
        product = 1
        for size in self.sizes:
            product = product * size
        return product

    @functools.cached_property
    def canonical(self) -> bool:
        """Whether memory order is N, C, *S order."""
        row_major = contiguous_strides(self.sizes)
        return all(a == b for size, a, b in zip(self.sizes, self.strides, row_major) if size != 1)

    @property
    def channels(self) -> int:
        return self.sizes[1] if len(self.sizes) > 1 else 1

    @functools.cached_property
    def inner(self) -> int:
        """Elements in memory from one channel to the next."""
        if self.channels > 1:
            return self.strides[1]
        return self.count // self.sizes[0] if self.columns_fit() else self.count

    def columns_fit(self) -> bool:
        """Whether places repeat every C * prod(S) elements: N lies outermost."""
        return self.sizes[0] == 1 or self.strides[0] == self.count // self.sizes[0]

    def empty(self, steps: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor [steps, N, C, *S] (or one step) in this layout."""
        return memory.empty_strided(*self.shape(steps), dtype, device)

    def shape(self, steps: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and strides of `steps` steps, or of one without a time dimension."""
        if steps is None:
            return self.sizes, self.strides
        return (steps, *self.sizes), (self.count, *self.strides)

    def holds(self, step_strides_: tuple[int, ...]) -> bool:
        return all(a == b for size, a, b in zip(self.sizes, step_strides_, self.strides) if size != 1)

    def step(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """One step, in this layout and dtype; a copy only where it must."""
        if tensor is None or (tensor.dtype == dtype and self.holds(tensor.stride())):
            return tensor
        return self.empty(None, dtype, tensor.device).copy_(tensor)

    def all_steps(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """All steps, dense and in this layout and dtype; a copy only where it must."""
        if tensor is None:
            return None
        dense = tensor.shape[0] == 1 or tensor.stride(0) == self.count
        if tensor.dtype == dtype and dense and self.holds(tensor.stride()[1:]):
            return tensor
        return self.empty(tensor.shape[0], dtype, tensor.device).copy_(tensor)

    def in_memory_order(self, table: Tensor) -> Tensor:
        """[rows, C * prod(S)] from C, *S order to memory order."""
        if self.canonical:
            return table
        return table.reshape(-1, *self.sizes[1:]).permute(0, *self._by_memory()).reshape(len(table), -1)

    def in_logical_order(self, table: Tensor) -> Tensor:
        """The reverse of `in_memory_order`."""
        if self.canonical:
            return table
        order = self._by_memory()
        back = [0] + [order.index(d) + 1 for d in range(1, len(self.sizes))]
        return table.reshape(-1, *(self.sizes[d] for d in order)).permute(back).reshape(len(table), -1)

    def _by_memory(self) -> list[int]:
        return sorted(range(1, len(self.sizes)), key=lambda d: (-self.strides[d], d))

    def index_order(self) -> dict[str, int | tuple[int, ...]]:
        """How a kernel finds the N, C, *S index of a place in memory."""
        if self.canonical:
            return {"rank": 0}
        rows = list(zip(self.strides, self.sizes, contiguous_strides(self.sizes)))
        rows = [row for row in rows if row[1] != 1]
        if len(rows) > MOST_DIMENSIONS:
            raise ValueError(f"lif: noise for steps of {len(rows)} dimensions in this memory format; wanted at most {MOST_DIMENSIONS}. Use x.contiguous().")
        inner, size, stride = zip(*rows)
        return {"rank": len(rows), "order_inner": inner, "order_size": size, "order_stride": stride}


def layout_of(x: Tensor) -> Layout:
    """How a step of x lies in memory, or would, made dense with its dimensions in the same order."""
    sizes, strides = tuple(x.shape[1:]), tuple(x.stride()[1:])
    if all(type(number) is int for number in (*sizes, *strides)):
        return _known_layout(sizes, strides)
    return Layout(sizes, step_strides(sizes, strides))  # symbolic, while a graph is compiled


@functools.lru_cache(maxsize=4096)
def _known_layout(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    return Layout(sizes, step_strides(sizes, strides))


def _neuron_wise(layout: Layout, parameters: tuple[Tensor | None, ...]) -> bool:
    return any(p is not None and p.shape[1] not in (1, layout.channels) for p in parameters)


def call_layout(x: Tensor, parameters: tuple[Tensor | None, ...]) -> Layout:
    """The layout in which a call runs: that of x, or row-major where neuron-wise parameters do not fit it."""
    layout = layout_of(x)
    if _neuron_wise(layout, parameters) and not layout.columns_fit():
        return Layout(layout.sizes, contiguous_strides(layout.sizes))
    return layout


@dataclass(frozen=True)
class Columns:
    """What a kernel takes for the channels of a step.

    Mostly the channels. But where neuron-wise parameters meet a memory format in which channels come round more often
    than neurons do (channels-last), each neuron of a sample is a channel of its own to the kernel: `wide`. What the
    kernel then wants or returns for each channel is spread over its neurons, or gathered from them, here.
    """

    layout: Layout
    wide: bool

    @property
    def channels(self) -> int:
        return self.layout.count // self.layout.sizes[0] if self.wide else self.layout.channels

    @property
    def inner(self) -> int:
        return 1 if self.wide else self.layout.inner

    def spread(self, table: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """[rows, 1 or C or C * prod(S)] in C, *S order, for the kernel."""
        if table is None:
            return None
        table = table.to(dtype)
        columns = table.shape[1]
        if columns != 1 and columns == self.layout.channels and self.wide:
            table = table.reshape(-1, columns, 1).expand(-1, -1, self.channels // columns).reshape(len(table), -1)
        if table.shape[1] not in (1, self.layout.channels):
            table = self.layout.in_memory_order(table)
        return table.contiguous()

    def gather(self, table: Tensor, columns: int) -> Tensor:
        """A sum [rows, ...] from the kernel as [rows, columns] in C, *S order."""
        if table.shape[1] == columns and columns in (1, self.layout.channels) and not self.wide:
            return table
        if table.shape[1] != 1:
            table = self.layout.in_logical_order(table)
        return table if table.shape[1] == columns else table.reshape(len(table), columns, -1).sum(2)

    def gather_moments(self, table: Tensor) -> Tensor:
        """[4, T, channels] mean, variance, rate and guard from the kernel as [4, T, C]."""
        if not self.wide:
            return table
        rows = self.layout.in_logical_order(table.flatten(0, 1)).reshape(4, table.shape[1], self.layout.channels, -1)
        result = rows.mean(3)
        result[1] += rows[0].var(2, correction=0)
        return result


def _prepare(x, v0, decay, threshold, gain, seed, steps, d: Dynamics, decay_value, threshold_value, more=()) -> tuple[Call, Columns]:
    layout = call_layout(x, (decay, threshold, *more))
    wide = _neuron_wise(layout, (decay, threshold, *more)) and layout.channels * layout.inner != layout.count // layout.sizes[0]
    columns = Columns(layout, wide)
    # A stride of 0 over several steps would read as a constant current, whose gradient is a sum.
    if not layout.holds(x.stride()[1:]) or (x.shape[0] > 1 and x.stride(0) == 0):
        x = layout.empty(x.shape[0], x.dtype, x.device).copy_(x)
    real = state_dtype(x.dtype)
    call = Call()
    call.put(
        dtype=DTYPES[x.dtype],
        steps=steps,
        count=layout.count,
        channels=columns.channels,
        inner=columns.inner,
        x=x,
        x_stride=x.stride(0) if x.shape[0] > 1 else 0,
        v0=layout.step(v0, real),
        v_start=d.v_reset if d.reset == "hard" else 0.0,
        gain=None if gain is None else gain.to(real).contiguous(),
        seed=seed,
        charge=CHARGES.index(d.charge),
        fire=FIRES.index(d.fire),
        reset=RESETS.index(d.reset),
        detach_reset=int(d.detach_reset),
        v_reset=d.v_reset,
        noise=d.noise,
        first_step=d.first_step,
        threads=torch.get_num_threads(),
    )
    call.put_parameter("decay", columns.spread(decay, real), decay_value, steps)
    call.put_parameter("threshold", columns.spread(threshold, real), threshold_value, steps)
    if d.guard is not None:
        call.put(delta=d.guard[0], power=d.guard[1])
    call.numbers |= layout.index_order() if d.fire == "gaussian" else {"rank": 0}
    return call, columns


@dataclass
class Forward:
    """What a forward kernel filled; tensors that were not asked for are None."""

    spikes: Tensor
    v: Tensor
    membrane: Tensor | None
    states: Tensor | None
    table: Tensor | None  # [4, T, C] float64: mean, variance, rate and guard (0 where there is none)


def _wanted(statistics: int, dynamics: Dynamics) -> int:
    wanted = ALL if statistics is True else statistics
    return wanted & ~(RATE if dynamics.fire == "none" else 0) & ~(GUARD if dynamics.guard is None else 0)


def row_gradient(row: Tensor, name: str, layout: Layout) -> Tensor:
    """What a kernel adds up for the gradient [T, C] of a row of the table: float64, of the sum and not of the mean."""
    return row.double() * ((2 if name == "variance" else 1) / (layout.count // layout.channels))


def moment_table(trace: Trace) -> Tensor:
    """The statistics of a trace as such a table."""
    rows = (trace.mean, trace.var, trace.rate, trace.guard)
    return torch.stack([torch.zeros_like(trace.mean) if row is None else row for row in rows]).double()


def forward(
    backend,
    x: Tensor,
    v0: Tensor | None,
    decay: Tensor | None,
    threshold: Tensor | None,
    gain: Tensor | None,
    seed: Tensor | None,
    steps: int,
    dynamics: Dynamics,
    decay_value: float = 0.0,
    threshold_value: float = 0.0,
    membrane: bool = False,
    statistics: int = 0,
    states: bool = False,
) -> Forward:
    """Run the forward kernel of `backend`. Arguments as in `reference.simulate`, parameters split in tensor and number.

    statistics: the rows of the table to fill, a sum of MEAN, VARIANCE, RATE, GUARD; True for all.
    states: keep what this backend's backward pass needs beside the inputs.
    """
    call, columns = _prepare(x, v0, decay, threshold, gain, seed, steps, dynamics, decay_value, threshold_value)
    layout = columns.layout
    real, device = state_dtype(x.dtype), x.device
    call.put(spikes=layout.empty(steps, x.dtype, device), v=layout.empty(None, real, device))
    if membrane:
        call.put(membrane=layout.empty(steps, real, device))
    if statistics:
        wanted = _wanted(statistics, dynamics)
        full = wanted & RATE and wanted & GUARD
        table = (torch.empty if full else torch.zeros)(4, steps, columns.channels, dtype=torch.float64, device=device)
        mean, variance, rate, guard = table.unbind()
        call.put(mean=mean, variance=variance, rate=rate if wanted & RATE else None, guard=guard if wanted & GUARD else None)
    if states and backend.keeps_states and steps > STEPS_IN_REGISTERS:
        kept = -(-steps // STATE_INTERVAL)
        call.put(states=layout.empty(kept, real, device), state_interval=STATE_INTERVAL)
    backend.forward(call)
    t = call.tensors
    return Forward(t["spikes"], t["v"], t.get("membrane"), t.get("states"), columns.gather_moments(table) if statistics else None)


@dataclass
class Gradients:
    """What arrives from above: gradients of the outputs of `forward`, None where there is none."""

    spikes: Tensor | None = None
    v: Tensor | None = None
    membrane: Tensor | None = None
    table: Tensor | None = None  # [4, T, C] of mean, variance, rate and guard


@dataclass
class Backward:
    """Gradients of the inputs; None where they were not asked for."""

    x: Tensor | None
    v0: Tensor | None
    decay: Tensor | None  # [T or 1, columns]
    threshold: Tensor | None
    gain: Tensor | None


def backward(
    backend,
    gradients: Gradients,
    x: Tensor,
    v0: Tensor | None,
    decay: Tensor | None,
    threshold: Tensor | None,
    gain: Tensor | None,
    seed: Tensor | None,
    states: Tensor | None,
    mean: Tensor | None,
    steps: int,
    dynamics: Dynamics,
    surrogate: Surrogate,
    adjoint: str = "bptt",
    decay_value: float = 0.0,
    threshold_value: float = 0.0,
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
    statistics: int = ALL,
) -> Backward:
    """Run the backward kernel of `backend`.

    needs: whether the gradients of x, v0, decay, threshold, gain are wanted; those of numbers never are.
    mean: float64 [T, C], what `forward` returned; for the gradient of the variance.
    statistics: the rows of the table that were asked for; the others have no gradient.
    """
    if dynamics.fire == "none":
        adjoint = "bptt"  # a leaky integrator is linear: its exact gradient is the only one
    tensors = {}
    shape = x.shape[1:]
    for name, value in zip("ab", surrogate.values):
        if isinstance(value, Tensor):
            tensors[name] = columns_of(value.to(x.device), shape, f"{type(surrogate).__name__}: parameter {name}")
    check_row(surrogate, "adjoint")
    call, columns = _prepare(
        x, v0, decay, threshold, gain, seed, steps, dynamics, decay_value, threshold_value, tuple(tensors.values())
    )
    layout = columns.layout
    real, device = state_dtype(x.dtype), x.device
    call.put(adjoint=ADJOINTS.index(adjoint), rga_gamma=RGA_GAMMA, surrogate=SURROGATES.index(surrogate.name), relative=int(surrogate.relative))
    for name, value in zip("ab", surrogate.values):
        tensor = tensors.get(name)
        number = 0.0 if tensor is not None else value
        call.put_parameter(name, columns.spread(tensor, real), number, steps)
    call.put(g_spikes=layout.all_steps(gradients.spikes, x.dtype))
    exact = adjoint == "bptt"
    if exact:
        call.put(g_v=layout.step(gradients.v, real), g_membrane=layout.all_steps(gradients.membrane, real), states=layout.all_steps(states, real))
        if states is not None:
            call.put(state_interval=STATE_INTERVAL)
        if gradients.table is not None:
            wanted = _wanted(statistics, dynamics)
            for place, name in enumerate(ROWS):
                if wanted & 1 << place:
                    call.put(**{f"g_{name}": columns.spread(row_gradient(gradients.table[place], name, layout), torch.float64)})
            if wanted & VARIANCE:
                call.put(mean=columns.spread(mean, torch.float64))
    wants = dict(zip(("x", "v0", "decay", "threshold", "gain"), needs))
    result = {name: None for name in wants}
    if wants["x"]:
        call.put(g_x=layout.empty(x.shape[0], x.dtype, device))
        result["x"] = call.tensors["g_x"]
    # Under an approximation nothing but x gets a gradient.
    allocate = torch.empty if exact else torch.zeros
    if wants["v0"] and v0 is not None:
        g_v0 = layout.empty(None, real, device)
        call.put(g_v0=g_v0) if exact else g_v0.zero_()
    sums = {}
    for name, value in (("decay", decay), ("threshold", threshold), ("gain", gain)):
        if wants[name] and value is not None:
            sized = value.shape if name == "gain" else tuple(call.numbers[f"{name}_{of}"] for of in ("steps", "columns"))
            sums[name] = allocate(sized, dtype=torch.float64, device=device)
            if exact:
                call.put(**{f"g_{name}": sums[name]})
    if not exact and gradients.spikes is None:
        if wants["x"]:
            result["x"].zero_()
    elif call.tensors.keys() & {"g_x", "g_v0", "g_decay", "g_threshold", "g_gain"}:
        backend.backward(call)
    if wants["v0"] and v0 is not None:
        result["v0"] = g_v0.to(v0.dtype)
    for name, value in (("decay", decay), ("threshold", threshold), ("gain", gain)):
        if name in sums:
            grad = sums[name] if name == "gain" else columns.gather(sums[name], value.shape[1])
            result[name] = grad.to(value.dtype)
    return Backward(**result)
