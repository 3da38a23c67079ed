"""The competitors of the benchmark, each behind one face: x [T, N, C, *S] -> Output.

All compute the same layer, in the bits of the same operations: `h = 0.5*v + x`, spike at `h >= 1`, hard reset to 0, the
reset attached to the gradient, surrogate ATan(2). SpikingJelly gets there with tau = 2 and decay_input=False
(`v - v/2` is `0.5*v` exactly), snnTorch with reset_mechanism="zero" and reset_delay=False (it fires at `h > 1`).

To add one: a function that returns the forward pass, and its row in `competitors`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import fastsnn
from fastsnn import backends, surrogates
from fastsnn import memory as pool

DECAY, THRESHOLD, ALPHA = 0.5, 1.0, 2.0
ALL_DTYPES = ("float32", "float64", "bfloat16", "float16")


class Output(NamedTuple):
    """What a forward pass returns: spikes [T, ...], final state [...], and [T, C] statistics where it computes them."""

    spikes: Tensor
    v: Tensor
    statistics: tuple[Tensor, ...] = ()


Forward = Callable[[Tensor], Output]


class NotHere(Exception):
    """A competitor that cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Competitor:
    """One row of the table."""

    name: str
    build: Callable[[], Forward]  # raises NotHere
    ours: bool = False  # must return the reference's bits
    compiled: bool = False  # by torch.compile: the first call takes seconds
    statistics: bool = False
    fresh: bool = False  # without the memory that fastsnn keeps between calls: every result is a new allocation
    dtypes: tuple[str, ...] = ALL_DTYPES


@contextlib.contextmanager
def fresh_memory() -> Iterator[None]:
    """All results of fastsnn come from torch's allocator, as those of the others do."""
    kept, pool.SMALLEST = pool.SMALLEST, float("inf")
    try:
        yield
    finally:
        pool.SMALLEST = kept


def lif(x: Tensor, backend: str, statistics: tuple[str, ...] = ()) -> fastsnn.Output:
    return fastsnn.lif(
        x, decay=DECAY, threshold=THRESHOLD, reset="hard", v_reset=0.0, surrogate=surrogates.ATan(ALPHA),
        statistics=statistics, backend=backend,
    )


def build_fastsnn(backend: str, statistics: bool = False) -> Forward:
    why_not = backends.BACKENDS[backend].missing()
    if why_not:
        raise NotHere(why_not)

    def forward(x: Tensor) -> Output:
        out = lif(x, backend, ("mean", "var") if statistics else ())
        return Output(out.spikes, out.v, (out.statistics.mean, out.statistics.var) if statistics else ())

    return forward


class ATanSpike(torch.autograd.Function):
    """The spike of the plain loop."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return grad * (ALPHA / 2) / (1 + (math.pi / 2 * ALPHA * z).square())


def loop(x: Tensor) -> Output:
    """The loop over time that a PyTorch user writes; the state is float32 for low-precision x, as in fastsnn."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = torch.zeros(x.shape[1:], dtype=real, device=x.device)
    spikes = []
    for current in x.unbind(0):  # x[t] would make the backward pass quadratic in T
        h = DECAY * v + current
        s = ATanSpike.apply(h - THRESHOLD)
        v = h * (1 - s)
        spikes.append(s.to(x.dtype))
    return Output(torch.stack(spikes), v)


def build_spikingjelly() -> Forward:
    try:
        from loguru import logger

        logger.disable("spikingjelly")
        from spikingjelly.activation_based import functional, surrogate
    except ImportError as error:
        raise NotHere(f"not installed ({error}): pip install --no-deps -r requirements-peers.txt") from None
    spike = surrogate.ATan(alpha=ALPHA)

    def forward(x: Tensor) -> Output:
        # What LIFNode(tau=2.0, decay_input=False, step_mode="m") calls, with the float32 state that keeps bfloat16
        # input on SpikingJelly's fused path.
        v = torch.zeros(x.shape[1:], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
        spikes, v, _ = functional.lif_multi_step(x, v, 1 / (1 - DECAY), False, THRESHOLD, 0.0, spike, False)
        return Output(spikes, v)

    return forward


def build_snntorch(device: str) -> Forward:
    try:
        import snntorch
    except ImportError as error:
        raise NotHere(f"not installed ({error}): pip install --no-deps -r requirements-peers.txt") from None
    layer = snntorch.Leaky(
        DECAY, threshold=THRESHOLD, spike_grad=snntorch.surrogate.atan(alpha=ALPHA), reset_mechanism="zero", reset_delay=False
    ).to(device)

    def forward(x: Tensor) -> Output:
        v, spikes = torch.zeros_like(x[0]), []
        for current in x.unbind(0):
            s, v = layer(current, v)
            spikes.append(s)
        # The layer would otherwise keep the last graph alive, and be measured by it.
        layer.mem, layer.reset = torch.zeros(0, device=x.device), None
        return Output(torch.stack(spikes), v)

    return forward


def build_compiled(build: Callable[[], Forward]) -> Forward:
    return torch.compile(build(), dynamic=False)


def competitors(device: str) -> list[Competitor]:
    """Every competitor that exists for a device; `build` says which are here."""
    rows = []
    for backend in ("cpu",) if device == "cpu" else ("triton", "cuda"):
        rows += [
            Competitor(f"fastsnn-{backend}", lambda b=backend: build_fastsnn(b), ours=True),
            Competitor(f"fastsnn-{backend}-statistics", lambda b=backend: build_fastsnn(b, True), ours=True, statistics=True),
        ]
    if device == "cpu":
        rows.insert(1, Competitor("fastsnn-cpu-fresh", lambda: build_fastsnn("cpu"), ours=True, fresh=True))
    return rows + [
        Competitor("fastsnn-reference", lambda: build_fastsnn("reference"), ours=True),
        Competitor("loop", lambda: loop),
        Competitor("loop-compiled", lambda: build_compiled(lambda: loop), compiled=True),
        Competitor("spikingjelly", build_spikingjelly),
        Competitor("spikingjelly-compiled", lambda: build_compiled(build_spikingjelly), compiled=True),
        # Its spikes are float32 whatever x is, and its state follows x.
        Competitor("snntorch", lambda: build_snntorch(device), dtypes=("float32",)),
    ]
