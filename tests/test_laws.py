"""What has to hold without a reference: splitting, permuting, repeating, and the statistics of what came out."""

import math

import pytest
import torch
from cases import assert_close, assert_same_bits
from conftest import COMPILED, GPU, device_of
from fastsnn import adjoint, backends, lif, plans, surrogates, tables
from torch import Tensor

every_backend = pytest.mark.parametrize("backend", COMPILED, indirect=True)
every_reset = pytest.mark.parametrize("reset", tables.RESETS)
ALL = ("mean", "var", "rate", "guard")
#: Interpreted and emulated kernels are slow; and a few hundred elements hold every branch of them.
SMALL = (12, 3, 5, 6)


def large(backend: str) -> tuple[int, ...]:
    """Enough for several threads and blocks, where that costs nothing."""
    return (6, 16, 24, 15, 15) if backend == "cpu" or GPU else SMALL


def draw(backend: str, *shape: int, seed: int = 0, dtype=torch.float32, mean: float = 0.4, spread: float = 0.8) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * spread + mean).to(dtype).to(device_of(backend))


def bits(values) -> list[Tensor]:
    return [value.detach().clone() for value in values if value is not None]


def everything(backend: str, shape, threads: int | None = None) -> list[Tensor]:
    """All outputs and all gradients of one call with learned parameters of several forms."""
    if threads is not None:
        torch.set_num_threads(threads)
    x, v0 = draw(backend, *shape).requires_grad_(), draw(backend, *shape[1:], seed=1).requires_grad_()
    decay = draw(backend, shape[2], seed=2, mean=0.7, spread=0.1).requires_grad_()
    threshold = draw(backend, seed=3, mean=1.0, spread=0.1).requires_grad_()
    gain = draw(backend, shape[0], seed=4, mean=1.0, spread=0.1).requires_grad_()
    out = lif(x, v0, decay=decay, threshold=threshold, gain=gain, reset="soft", statistics=ALL, guard=(0.3, 2), keep=("membrane",), backend=backend)
    outs = [out.spikes, out.v, out.membrane, *vars(out.statistics).values()]
    weights = [draw(backend, *value.shape, seed=5) for value in outs]
    return bits([*outs, *torch.autograd.grad(outs, [x, v0, decay, threshold, gain], weights)])


# ---- time and order --------------------------------------------------------------------------------------------------------


@every_backend
@every_reset
@pytest.mark.parametrize("fire", [fire for fire in tables.FIRES if fire != "none"])
def test_splitting_time(backend, reset, fire):
    """Two calls with the state carried between them are one call: bits of the results, and of the gradients."""
    steps, first = 9, 4
    options = {"decay": 0.8, "reset": reset, "fire": fire, "backend": backend}
    if fire == "gaussian":
        options |= {"noise": 0.4, "seed": 11}
    x, v0 = draw(backend, steps, 3, 4, 5), draw(backend, 3, 4, 5, seed=1)
    weight, weight_v = draw(backend, *x.shape, seed=2), draw(backend, *v0.shape, seed=3)

    def run(cuts: list[int]):
        leaves = x.clone().requires_grad_(), v0.clone().requires_grad_()
        v, spikes, start = leaves[1], [], 0
        for part in leaves[0].split(cuts):
            out = lif(part, v, first_step=start, **options)
            v, start = out.v, start + len(part)
            spikes.append(out.spikes)
        spikes = torch.cat(spikes)
        return [spikes, v, *torch.autograd.grad([spikes, v], leaves, [weight, weight_v])]

    for name, one, two in zip(("spikes", "v", "gradient of x", "gradient of v0"), run([steps]), run([first, steps - first])):
        assert_same_bits(name, two.detach(), one.detach())


@every_backend
@every_reset
def test_splitting_noise_with_a_default_state(backend, reset):
    x = draw(backend, 8, 2, 3, 4)
    options = {"reset": reset, "v_reset": -0.25, "fire": "gaussian", "noise": 0.4, "seed": -5, "backend": backend}
    whole = lif(x, first_step=100, **options)
    head = lif(x[:3], first_step=100, **options)
    tail = lif(x[3:], head.v, first_step=103, **options)
    assert_same_bits("spikes", torch.cat([head.spikes, tail.spikes]), whole.spikes)
    assert_same_bits("v", tail.v, whole.v)


@every_backend
@every_reset
def test_permuting_neurons(backend, reset):
    x, weight = draw(backend, *SMALL), draw(backend, *SMALL, seed=1)
    orders = [torch.randperm(size, generator=torch.Generator().manual_seed(size)).to(x.device) for size in SMALL[1:]]

    def permuted(value: Tensor) -> Tensor:
        for dim, order in enumerate(orders, 1):
            value = value.index_select(dim, order)
        return value

    def run(x: Tensor, weight: Tensor):
        x = x.detach().requires_grad_()
        out = lif(x, reset=reset, decay=0.9, keep=("membrane",), backend=backend)
        return out.spikes, out.membrane, torch.autograd.grad(out.spikes, x, weight)[0]

    for name, there, back in zip(("spikes", "membrane", "gradient"), run(permuted(x), permuted(weight)), run(x, weight)):
        assert_same_bits(name, there.detach(), permuted(back.detach()))


@every_backend
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "batch_inner"])
def test_noise_does_not_depend_on_the_memory_format(backend, form):
    x = draw(backend, 3, 2, 4, 3, 3)
    order = {"contiguous": [0, 1, 2, 3, 4], "channels_last": [0, 1, 3, 4, 2], "batch_inner": [0, 2, 3, 4, 1]}[form]
    stored = x.permute(order).contiguous().permute([order.index(d) for d in range(5)])
    options = {"fire": "gaussian", "noise": 0.4, "seed": 1, "backend": backend}
    assert_same_bits("spikes", lif(stored, **options).spikes, lif(x, **options).spikes)


@every_backend
def test_constant_current_is_the_expanded_current(backend):
    x, steps = draw(backend, 1, 2, 3, 5), 6
    weight = draw(backend, steps, 2, 3, 5, seed=1)
    found = []
    for value in (x.clone(), x.expand(steps, -1, -1, -1).clone(), x.expand(steps, -1, -1, -1)):
        value = value.detach().requires_grad_()
        out = lif(value, steps=steps, decay=0.8, statistics=ALL, guard=(0.3, 1), backend=backend)
        (grad,) = torch.autograd.grad(out.spikes, value, weight)
        found.append([out.spikes, out.v, *vars(out.statistics).values(), grad.sum(0, keepdim=True)])
    for other in found[1:]:
        for ours, theirs in zip(found[0][:-1], other):
            assert_same_bits("output", theirs.detach(), ours.detach())
        assert_close("gradient", found[0][-1], other[-1], 1e-5)


# ---- the same bits ---------------------------------------------------------------------------------------------------------


@every_backend
def test_repeated_runs_give_the_same_bits(backend):
    first = everything(backend, large(backend))
    for _ in range(2):
        for place, (a, b) in enumerate(zip(first, everything(backend, large(backend)))):
            assert_same_bits(f"result {place}", b, a)


def test_threads_do_not_change_a_bit():
    """Spikes, statistics, gradients of parameters: whatever the number of threads, also more than there are cores."""
    before = torch.get_num_threads()
    try:
        for shape in ((6, 16, 24, 15, 15), (4, 64, 300), (4, 2, 3, 120, 120)):
            one = everything("cpu", shape, threads=1)
            for threads in (2, 3, 7):
                for place, (a, b) in enumerate(zip(one, everything("cpu", shape, threads))):
                    assert_same_bits(f"{shape}, result {place} with {threads} threads", b, a)
    finally:
        torch.set_num_threads(before)


def test_instruction_sets_agree():
    """Spikes, membranes and states are the same bits with every instruction set of this machine; sums to rounding."""
    cpu = backends.BACKENDS["cpu"]
    best = cpu.instruction_set
    shape = (5, 4, 9, 7, 7)
    wanted, ran = everything("cpu", shape), []
    try:
        for name in ("baseline", "v3", "v4"):
            if not cpu.use_instruction_set(name):
                continue
            assert cpu.instruction_set == name
            ran.append(name)
            for place, (a, b) in enumerate(zip(wanted, everything("cpu", shape))):
                if place < 3:
                    assert_same_bits(f"{name}, result {place}", b, a)
                else:
                    assert_close(f"{name}, result {place}", b, a, 2e-6 * max(1.0, float(a.abs().max())))
    finally:
        cpu.use_instruction_set(best)
    assert ran[0] == "baseline" and best in ran
    assert not cpu.use_instruction_set("v9") and cpu.instruction_set == best


# ---- statistics --------------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("away", [0.0, 30.0, -1000.0])
@pytest.mark.parametrize("shape", [(3, 4, 3, 6, 6), (3, 40, 7), (3, 2, 2, 65), (2, 3, 1, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_are_those_of_the_membrane(backend, shape, away, dtype):
    """To 1e-5 of a standard deviation, also where the mean is a thousand deviations away."""
    sigma, threshold = 0.01, 0.5
    x = draw(backend, *shape, dtype=dtype, mean=threshold + away * sigma, spread=sigma)
    out = lif(x, decay=0.0, threshold=threshold, reset="none", statistics=ALL, guard=(0.02, 2), keep=("membrane",), backend=backend)
    z = (out.membrane - torch.tensor(threshold, dtype=dtype)).double()
    dims = [1, *range(3, z.dim())]
    mean, var = z.mean(dims), z.var(dims, correction=0)
    # A float32 result cannot be nearer to the mean than half an ulp of it: 6e-5 of a deviation a thousand away.
    assert ((out.statistics.mean - mean).abs() <= 1e-5 * var.sqrt() + torch.finfo(dtype).eps / 2 * mean.abs()).all()
    assert ((out.statistics.var.double().sqrt() - var.sqrt()).abs() <= 1e-5 * var.sqrt()).all()
    assert_close("rate", out.statistics.rate, out.spikes.double().mean(dims).to(dtype), 1e-6)
    guard = torch.relu(0.02 - z.abs()).square().mean(dims)
    assert ((out.statistics.guard - guard).abs() <= 1e-5 * 0.02**2).all()


@every_backend
@pytest.mark.parametrize("space", [(), (40,)], ids=["narrow", "wide"])
@pytest.mark.parametrize("reset", ["hard", "none"])
@pytest.mark.parametrize("charge", ["leak", "leak_input", "leak_state"])
def test_statistics_far_from_zero_with_a_state(backend, charge, reset, space):
    """The state carries the mean as well: whatever a kernel sums from must be near h, not near x."""
    shape, sigma = (2, 24, 3, *space), 0.01
    x, v0 = draw(backend, *shape, mean=10, spread=sigma), draw(backend, *shape[1:], seed=1, mean=10, spread=sigma)
    options = {"charge": charge, "reset": reset, "statistics": ("mean", "var"), **({"decay": 0.5} if charge == "leak" else {"tau": 2.0})}
    got = lif(x, v0, backend=backend, **options).statistics  # by itself: asking for the membrane may choose another kernel
    z = (lif(x, v0, backend="reference", keep=("membrane",), **options).membrane - 1).double()
    dims = [1, *range(3, z.dim())]
    mean, deviation = z.mean(dims), z.var(dims, correction=0).sqrt()
    assert ((got.mean - mean).abs() <= 1e-5 * deviation + torch.finfo(torch.float32).eps / 2 * mean.abs()).all()
    assert ((got.var.double().sqrt() - deviation).abs() <= 1e-5 * deviation).all()


def hard(name: str, shape: tuple[int, ...]) -> Tensor:
    """Input [1, *shape] that is hard to sum: hardly any but one value, or a first one far from the rest."""
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    if name in ("sparse", "dense"):
        return ((x.abs() > 2.6) == (name == "sparse")).float() * 0.1
    if name == "one event":
        x = torch.full_like(x, 0.1)
    first = x[:, 0].flatten(2)[..., 0] if len(shape) > 2 else x[:, 0]  # of every channel
    first.fill_(0.7 if name == "one event" else 1000.0)
    return x


@pytest.mark.parametrize("name", ["sparse", "dense", "one event", "first far"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 64, 16, 16), (16, 8, 32, 32), (4096, 64), (40000, 64)], ids=str)
def test_statistics_of_hard_membranes(shape, memory, name):
    """On the CPU, which sums in single precision for a while: within 1e-5 of a deviation all the same."""
    x = hard(name, shape)
    if len(shape) > 2:
        x = x[0].contiguous(memory_format=memory)[None]
    found = lif(x, decay=1.0, statistics=("mean", "var"), backend="cpu").statistics
    z = (x - 1).double()
    dims = [1, *range(3, z.dim())]
    mean, deviation = z.mean(dims), z.var(dims, correction=0).sqrt()
    assert ((found.mean - mean).abs() <= 1e-5 * deviation + torch.finfo(torch.float32).eps / 2 * mean.abs()).all()
    assert ((found.var.double().sqrt() - deviation).abs() <= 1e-5 * deviation).all()


@every_backend
@pytest.mark.parametrize("shape", [(1, 7, 9, 30), (2, 3, 13, 5), (1, 8, 32, 22)], ids=str)
def test_statistics_of_channels_far_from_each_other(backend, shape):
    """A unit of work may begin within a channel: its sums must not be taken from a membrane of the next one."""
    means = draw(backend, 1, 1, shape[2], 1, seed=2, spread=3.0)
    x = draw(backend, *shape, spread=0.01, seed=3) + means - 10
    out = lif(x, decay=0.0, reset="none", statistics=("mean", "var"), keep=("membrane",), backend=backend)
    want = (out.membrane - 1).double().var((1, 3), correction=0)
    assert ((out.statistics.var.double() - want).abs() <= 1e-5 * want).all()


@every_backend
@pytest.mark.parametrize("away", [0.0, 30.0, 1000.0])
def test_gradient_of_the_variance_far_from_zero(backend, away):
    """d var / dz = 2 (z - mean) / n, in which z and the mean cancel: the mean must be more exact than z."""
    sigma, shape = 0.01, (2, 20, 3, 10)
    x = draw(backend, *shape, mean=1 + away * sigma, spread=sigma).requires_grad_()
    out = lif(x, decay=0.0, reset="none", statistics=("mean", "var"), keep=("membrane",), backend=backend)
    weight = draw(backend, 2, 3, seed=1)
    (grad,) = torch.autograd.grad(out.statistics.var, x, weight)
    z = (out.membrane.detach() - 1).double()
    want = 2 * weight[:, None, :, None].double() * (z - z.mean((1, 3), keepdim=True)) / (shape[1] * shape[3])
    assert ((grad.double() - want).abs() <= 1e-5 * 2 * weight.abs()[:, None, :, None] * sigma / (shape[1] * shape[3])).all()


# ---- edges -------------------------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(("fire", "fires"), [("ge", 1.0), ("gt", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_exactly_at_the_threshold(backend, fire, fires, dtype):
    x = torch.full((1, 1, 37), 0.75, dtype=dtype, device=device_of(backend))
    out = lif(x, threshold=0.75, fire=fire, backend=backend)
    assert (out.spikes == fires).all()
    eps = torch.finfo(dtype).eps
    assert not lif(x * (1 - eps), threshold=0.75, fire=fire, backend=backend).spikes.any()
    assert lif(x * (1 + eps), threshold=0.75, fire=fire, backend=backend).spikes.all()


@every_backend
@every_reset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_infinities_and_nan(backend, reset, dtype):
    odd = [math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-40, 0.0, -0.0, 1.0]
    x = torch.tensor(odd).to(dtype).repeat(5)[torch.randperm(45, generator=torch.Generator().manual_seed(0))].reshape(5, 1, 9)
    x = x.to(device_of(backend))
    got, want = (lif(x, reset=reset, keep=("membrane",), statistics=("mean", "var", "rate"), backend=name) if x.dim() > 2 else None for name in (backend, "reference"))
    for name in ("spikes", "v", "membrane"):
        assert_same_bits(name, getattr(got, name), getattr(want, name))
    assert_same_bits("rate", got.statistics.rate, want.statistics.rate)
    nan = want.membrane.isnan()
    assert nan.any() and got.statistics.mean[nan.flatten(1).any(1)].isnan().any()


@every_backend
def test_no_gradient_in_no_gradient_out(backend):
    x, v0 = draw(backend, *SMALL).requires_grad_(), draw(backend, *SMALL[1:]).requires_grad_()
    decay = draw(backend, SMALL[2], mean=0.7, spread=0.1).requires_grad_()
    out = lif(x, v0, decay=decay, statistics=ALL, guard=(0.3, 2), keep=("membrane",), backend=backend)
    outs = [out.spikes, out.v, out.membrane, *vars(out.statistics).values()]
    for grad in torch.autograd.grad(outs, [x, v0, decay], [torch.zeros_like(value) for value in outs]):
        assert not grad.any() and grad.isfinite().all()
    with torch.no_grad():
        assert not lif(x, v0, decay=decay, backend=backend).spikes.requires_grad
    assert not lif(x.detach(), backend=backend).spikes.requires_grad
    for fixed in (lif(x, decay=decay.detach(), backend=backend), lif(x.detach(), v0, decay=decay, backend=backend)):
        assert fixed.spikes.requires_grad


@every_backend
@pytest.mark.parametrize("name", ["spikes", "v", "membrane", "mean", "var", "rate", "guard"])
def test_one_output_alone_gets_a_gradient(backend, name):
    found = []
    for which in (backend, "reference"):
        x = draw(backend, *SMALL).requires_grad_()
        out = lif(x, decay=0.8, statistics=ALL, guard=(0.3, 2), keep=("membrane",), backend=which)
        value = {"spikes": out.spikes, "v": out.v, "membrane": out.membrane, **vars(out.statistics)}[name]
        (grad,) = torch.autograd.grad(value, x, draw(backend, *value.shape, seed=1))
        found.append(grad)
    assert found[1].any()
    assert_close("gradient of x", *found, 1e-5 * float(found[1].abs().max()))


# ---- memory ------------------------------------------------------------------------------------------------------------------

DENSE = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "batch_inner": lambda x: x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
    "every second step": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 1).flatten(0, 1)[::2],
    "offset": lambda x: torch.cat([torch.full_like(x[:1], math.nan), x])[1:],
}


@every_backend
@pytest.mark.parametrize("form", DENSE)
def test_dense_steps_are_not_copied(backend, form, monkeypatch):
    """The kernel reads x where it lies, and every result keeps its memory format."""
    x = DENSE[form](draw(backend, 3, 2, 4, 3, 5)).detach().requires_grad_()
    monkeypatch.setattr(plans, "_plans", {})  # a plan does not go by what is watched here
    seen = []
    found = backends.BACKENDS[backend]
    for name in ("forward", "backward"):
        original = getattr(found, name)
        monkeypatch.setattr(found, name, lambda call, original=original: (seen.append(call.tensors["x"].data_ptr()), original(call))[1], raising=False)
    out = lif(x, keep=("membrane",), statistics=("mean",), backend=backend)
    (grad,) = torch.autograd.grad(out.spikes, x, torch.ones_like(out.spikes))
    assert seen == [x.data_ptr()] * 2
    for value in (out.spikes, out.membrane, grad):
        assert value.stride()[1:] == x.stride()[1:]
    assert out.v.stride() == x.stride()[1:]


@every_backend
def test_steps_with_holes_are_copied_and_right(backend):
    wide = draw(backend, 3, 2, 4, 6)
    for view in (wide[..., ::2], wide[:, :, 1:3], wide.transpose(0, 1).contiguous().transpose(0, 1), wide.transpose(1, 3), wide[:, :1].expand(-1, 5, -1, -1)):
        want = lif(view.contiguous(), backend="reference")
        got = lif(view, backend=backend)
        assert_same_bits("spikes", got.spikes, want.spikes)
        assert_same_bits("v", got.v, want.v)


# ---- anchors -----------------------------------------------------------------------------------------------------------------


@every_backend
def test_bptr_is_constant_over_time_and_silent_for_the_silent(backend):
    x = draw(backend, *SMALL)
    x[:, 0] = -1.0
    x.requires_grad_()
    spikes = lif(x, backend=backend).spikes
    with adjoint("bptr"):
        (grad,) = torch.autograd.grad(spikes, x, draw(backend, 1, *SMALL[1:], seed=1).expand(SMALL))
    assert (grad == grad[:1]).all()
    assert (grad[:, spikes.sum(0) == 0] == 0).all() and (grad[:, spikes.sum(0) > 0] != 0).all()


@every_backend
def test_straight_through_with_soft_reset_passes_the_gradient(backend):
    """decay 1, threshold 1: what the reset takes away is what the membrane carries on."""
    x = draw(backend, *SMALL).requires_grad_()
    options = {"decay": 1.0, "reset": "soft", "surrogate": surrogates.StraightThrough(), "backend": backend}
    whole = torch.randint(-8, 9, SMALL, generator=torch.Generator().manual_seed(1)).float().to(x.device)
    (grad,) = torch.autograd.grad(lif(x, **options).spikes, x, whole)
    assert_same_bits("gradient", grad, whole)
    weight = draw(backend, *SMALL, seed=2)
    (grad,) = torch.autograd.grad(lif(x, **options).spikes, x, weight)
    assert_close("gradient", grad, weight, torch.finfo(torch.float32).eps * float(weight.abs().max()))


# ---- low precision -----------------------------------------------------------------------------------------------------------


@every_backend
@every_reset
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_errs_no_more_than_its_dtype(backend, reset, dtype):
    """At most twice the error of the same mathematics rounded to that precision; measured against float64."""
    x = draw(backend, *SMALL, dtype=dtype)
    weight = draw(backend, *SMALL, seed=1, dtype=dtype)

    def run(dtype: torch.dtype, backend: str):
        leaf = x.to(dtype).requires_grad_()
        out = lif(leaf, decay=0.8, reset=reset, surrogate=surrogates.ATan(2.0), keep=("membrane",), backend=backend)
        return out, torch.autograd.grad(out.spikes, leaf, weight.to(dtype))[0]

    (out, grad), (exact, exact_grad) = run(dtype, backend), run(torch.float64, "reference")
    # The input is representable and state is float32: a spike may only flip within a few float32 ulp of the threshold.
    flips = out.spikes.double() != exact.spikes
    assert ((exact.membrane - 1).abs()[flips] < 1e-5).all() and flips.float().mean() < 0.01
    same = ~flips.any(0)
    error = (grad.double() - exact_grad)[:, same].abs()
    rounded = (exact_grad.to(dtype).double() - exact_grad)[:, same].abs()
    assert error.max() <= 2 * rounded.max() and error.mean() <= 2 * rounded.mean()
