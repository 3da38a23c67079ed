"""Which gradient flows, chosen when the backward pass runs: formulas written out, and the lateness of the choice."""

import gc
import threading

import pytest
import torch
from cases import assert_close, assert_same_bits
from conftest import COMPILED, device_of
from fastsnn import LIF, LI, adjoint, adjoints, lif, surrogates, tables
from torch import Tensor

every_backend = pytest.mark.parametrize("backend", ["reference", *COMPILED], indirect=True)
APPROXIMATIONS = [name for name in tables.ADJOINTS if name != "bptt"]
STEPS, SHAPE = 5, (2, 3, 4)
TRIANGLE, WIDE = surrogates.Triangle(1.0), surrogates.Exponential(0.3, 1.0)


def draw(backend: str, *shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.4
    return values.to(device_of(backend))


def gradient(spikes: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(spikes, x, weight, retain_graph=True)[0]


# ---- the formulas --------------------------------------------------------------------------------------------------------


def written_out(name: str, g_s: Tensor, x: Tensor, spikes: Tensor, z: Tensor, surrogate, decay: float, threshold: float, q: float) -> Tensor:
    """The gradient of x under an approximation; q: dh/dx of the charge, decay: its dh/dv."""
    if name == "bptr":
        return g_s * (spikes.mean(0) > 0)
    if name == "rga":
        tau, gamma = decay, 0.2
        mean = (x / threshold).mean(0)
        low = ((mean >= 0) & (mean <= 1 - tau)).float() * gamma
        high = ((mean > 1 - tau) & (mean <= 2)).float() * (1 - gamma + gamma * tau) / (1 + tau)
        return g_s * (low + high) / threshold
    local = g_s * surrogate(z) * q
    return local if name == "spatial" else local.mean(0).expand_as(local)


CHARGES = {
    "leak": ({"decay": 0.7}, 0.7, 1.0),
    "leak_input": ({"tau": 2.5, "charge": "leak_input"}, 0.6, 0.4),
    "leak_state": ({"tau": 2.5, "charge": "leak_state"}, 0.6, 1.0),
    "leak_input_q": ({"inverse_tau": 0.4, "charge": "leak_input"}, 0.6, 0.4),
    "leak_state_q": ({"inverse_tau": 0.4, "charge": "leak_state"}, 0.6, 1.0),
}


@every_backend
@pytest.mark.parametrize("charge", CHARGES)
@pytest.mark.parametrize("by_step", [False, True], ids=["", "by step"])
@pytest.mark.parametrize("steps", [7, 40])
def test_rga_where_its_weight_jumps(backend, charge, by_step, steps):
    """Means that are 1 - leak or 2 but for the last bit: the weight is 0.2 on one side, another on the other. Every backend takes the same side."""
    options, leak, _ = CHARGES[charge]
    options, threshold = dict(options), 0.7
    if by_step:
        name = next(key for key in ("decay", "tau", "inverse_tau") if key in options)
        options[name] = torch.full((steps, 4, 1), options[name], device=device_of(backend))
    noise = torch.randn(steps, 40, 4, 1, generator=torch.Generator().manual_seed(0))
    noise = noise - noise.mean(0)  # moves the terms, and the mean by roundings alone
    target = torch.tensor([1 - leak, 2.0, 1 - leak, 2.0])[:, None]
    x = ((target + 3 * noise) * threshold).to(device_of(backend)).requires_grad_()

    def found(name: str) -> Tensor:
        spikes = lif(x, threshold=threshold, reset="soft", backend=name, **options).spikes
        with adjoint("rga"):
            return torch.autograd.grad(spikes.sum(), x)[0]

    got, want = found(backend), found("reference")
    # Both sides are met; not so at 1 - leak where the leak's own mean is rounded, always to the same side.
    assert len(want[0, :, 1].unique()) > 1 and (by_step or len(want[0, :, 0].unique()) > 1)
    assert_close("rga", got, want, 1e-6)


def test_every_charge_is_tried():
    assert set(CHARGES) == set(tables.CHARGES)


@every_backend
@pytest.mark.parametrize("gained", [False, True], ids=["", "gain"])
@pytest.mark.parametrize("charge", CHARGES)
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_formulas(backend, name, charge, gained):
    options, decay, q = CHARGES[charge]
    x, weight = draw(backend, STEPS, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1)
    x.data[:, 0] -= 0.8  # a few neurons stay silent
    gain = torch.linspace(0.5, 1.5, STEPS).to(x.device) if gained else None
    out = lif(x, threshold=0.8, reset="soft", surrogate=WIDE, gain=gain, keep=("membrane",), backend=backend, **options)
    with adjoint(name):
        got = gradient(out.spikes, x, weight)
    factor = gain.reshape(-1, 1, 1, 1) if gained else 1.0
    current = x.detach() * factor
    want = factor * written_out(name, weight, current, out.spikes.detach(), out.membrane.detach() - 0.8, WIDE, decay, 0.8, q)
    assert_close("gradient of x", got, want, 2e-6)
    assert got.any()


@every_backend
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_formulas_through_two_layers(backend, name):
    """A network is differentiated layer by layer, each by the formula with what arrives from above."""
    x, weight = draw(backend, STEPS, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1)
    options = {"decay": 0.7, "surrogate": TRIANGLE, "keep": ("membrane",), "backend": backend}
    one = lif(x, **options)
    current = 0.9 * one.spikes
    two = lif(current, **options)
    with adjoint(name):
        got = gradient(two.spikes, x, weight)
    between = 0.9 * written_out(name, weight, current.detach(), two.spikes.detach(), two.membrane.detach() - 1, TRIANGLE, 0.7, 1.0, 1.0)
    want = written_out(name, between, x.detach(), one.spikes.detach(), one.membrane.detach() - 1, TRIANGLE, 0.7, 1.0, 1.0)
    assert_close("gradient of x", got, want, 5e-6)
    assert got.any()


@every_backend
def test_bptt_written_out(backend):
    """The recurrence of the gradient for a hard reset, step by step."""
    x, weight, decay = draw(backend, STEPS, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1), 0.7
    out = lif(x, decay=decay, v_reset=-0.25, surrogate=WIDE, keep=("membrane",), backend=backend)
    h, s = out.membrane.detach(), out.spikes.detach()
    g_v, want = torch.zeros_like(h[0]), []
    for t in reversed(range(STEPS)):
        g_h = g_v * (1 - s[t]) + (weight[t] + g_v * (-0.25 - h[t])) * WIDE(h[t] - 1)
        want.insert(0, g_h)
        g_v = g_h * decay
    assert_close("gradient of x", gradient(out.spikes, x, weight), torch.stack(want), 5e-6)


@every_backend
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_a_constant_current_gets_the_sum_over_time(backend, name):
    x, weight = draw(backend, 1, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1)
    repeated = x.detach().repeat(STEPS, 1, 1, 1).requires_grad_()
    with adjoint(name):
        got = gradient(lif(x, steps=STEPS, backend=backend).spikes, x, weight)
        want = gradient(lif(repeated, backend=backend).spikes, repeated, weight)
    assert_close("gradient of x", got, want.sum(0, keepdim=True), 5e-6)


# ---- what else gets a gradient -----------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_parameters_get_zero_under_an_approximation(backend, name):
    leaves = {
        "v0": draw(backend, *SHAPE),
        "decay": torch.full((3,), 0.7, device=device_of(backend)),
        "threshold": torch.full((1, 3, 4), 0.9, device=device_of(backend)),
        "gain": torch.ones(STEPS, device=device_of(backend)),
    }
    leaves = {key: value.requires_grad_() for key, value in leaves.items()}
    x = draw(backend, STEPS, *SHAPE).requires_grad_()
    out = lif(x, **leaves, statistics=("mean",), keep=("membrane",), backend=backend)
    with adjoint(name):
        for grad in torch.autograd.grad(out.spikes.sum(), list(leaves.values()), retain_graph=True, allow_unused=True):
            assert grad is None or not grad.any()
        # Only spikes pass a gradient: the state, the membrane and the statistics pass none.
        for other in (out.v, out.membrane, out.statistics.mean):
            (grad,) = torch.autograd.grad(other.sum(), x, retain_graph=True, allow_unused=True)
            assert grad is None or not grad.any()
    (grad,) = torch.autograd.grad(out.v.sum(), x)
    assert grad.any()


@every_backend
@pytest.mark.parametrize("name", tables.ADJOINTS)
def test_an_integrator_keeps_its_exact_gradient(backend, name):
    """It is linear: nothing is approximated, whatever is chosen."""
    x, weight = draw(backend, STEPS, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1)
    with adjoint(name):
        got = gradient(LI(0.5, backend=backend)(x), x, weight)
    want = [weight[-1]]
    for t in reversed(range(STEPS - 1)):
        want.insert(0, weight[t] + 0.5 * want[0])
    assert_close("gradient of x", got, torch.stack(want), 1e-6)


# ---- the lateness of the choice ----------------------------------------------------------------------------------------

ENSEMBLE = [
    (surrogates.Triangle(2.0),),
    (WIDE,),
    (surrogates.Rectangle(1.0),),
    (surrogates.StraightThrough(),),
    (surrogates.ATan(2.0, relative=True),),
    *((name,) for name in tables.ADJOINTS),
    *((name, WIDE) for name in tables.ADJOINTS),
]


@every_backend
def test_one_forward_serves_many_backwards(backend):
    """The gradient does not depend on what was chosen while the forward pass ran, nor on the choices before."""

    def network(x: Tensor) -> Tensor:
        return lif(0.9 * lif(x, decay=0.7, surrogate=TRIANGLE, backend=backend).spikes, decay=0.7, surrogate=TRIANGLE, backend=backend).spikes

    weight = draw(backend, STEPS, *SHAPE, seed=1)
    shared = draw(backend, STEPS, *SHAPE).requires_grad_()
    with adjoint("rga"):
        spikes = network(shared)
    own = gradient(spikes, shared, weight)
    found = []
    for choice in ENSEMBLE:
        with adjoint(*choice):
            late = gradient(spikes, shared, weight)
        x = draw(backend, STEPS, *SHAPE).requires_grad_()
        with adjoint(*choice):
            assert_same_bits(f"{choice}", late, gradient(network(x), x, weight))
        found.append(late)
    assert_same_bits("the layer's own, after all", gradient(spikes, shared, weight), own)
    # A surrogate alone means bptt; bptr and rga take none: three pairs of the ensemble are the same.
    assert len({tuple(grad.flatten().tolist()) for grad in found}) == len(ENSEMBLE) - 3, "a choice changes nothing"


@every_backend
def test_a_chosen_surrogate_is_the_layers_own(backend):
    x, weight = draw(backend, STEPS, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1)
    for name in tables.SURROGATES:
        surrogate = surrogates.BY_NAME[name]()
        want = gradient(lif(x, surrogate=surrogate, backend=backend).spikes, x, weight)
        spikes = lif(x, backend=backend).spikes
        for choice in ((surrogate,), ("bptt", surrogate), (lambda layer, mean, var: surrogate,)):
            with adjoint(*choice):
                assert_same_bits(name, gradient(spikes, x, weight), want)


def test_blocks_nest_and_end():
    x, weight = draw("cpu", STEPS, *SHAPE).requires_grad_(), draw("cpu", STEPS, *SHAPE, seed=1)
    spikes = lif(x, surrogate=TRIANGLE, backend="cpu").spikes
    plain = gradient(spikes, x, weight)
    with adjoint("bptr"):
        outer = gradient(spikes, x, weight)
        with adjoint(WIDE):
            inner = gradient(spikes, x, weight)
        assert_same_bits("outer again", gradient(spikes, x, weight), outer)
        with pytest.raises(KeyError), adjoint("rga"):
            raise KeyError
        assert_same_bits("outer after an error", gradient(spikes, x, weight), outer)
    assert_same_bits("none", gradient(spikes, x, weight), plain)
    assert not torch.equal(inner, outer) and not torch.equal(inner, plain) and not adjoints._stack


def test_blocks_may_be_left_out_of_order():
    x, weight = draw("cpu", STEPS, *SHAPE).requires_grad_(), draw("cpu", STEPS, *SHAPE, seed=1)
    spikes = lif(x, backend="cpu").spikes
    with adjoint("rga"):
        want = gradient(spikes, x, weight)
    first, second = adjoint("bptr"), adjoint("rga")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert_same_bits("the block that is still open", gradient(spikes, x, weight), want)
    second.__exit__(None, None, None)
    assert not adjoints._stack


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_other_threads_see_the_choice(backend):
    x, weight = draw(backend, STEPS, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1)
    spikes, found = lif(x, backend=backend).spikes, []
    with adjoint("bptr"):
        want = gradient(spikes, x, weight)
        thread = threading.Thread(target=lambda: found.append(gradient(spikes, x, weight)))
        thread.start()
        thread.join()
    assert_same_bits("gradient in a thread", found[0], want)


# ---- surrogates that follow the membrane -------------------------------------------------------------------------------


@every_backend
def test_a_rule_is_given_the_layer_and_the_moments(backend):
    """PDSG: the normal density with mean sigma/2 and deviation sigma, for each channel."""
    x, weight = draw(backend, STEPS, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1)
    layer, seen = LIF(decay=0.7, backend=backend), []
    spikes, statistics = layer(x, statistics=("mean", "var"))

    def rule(which, mean, var):
        seen.append((which, mean, var))
        sigma = (var + (mean - mean.mean(0)).square()).mean(0).sqrt()
        return surrogates.Gaussian(sigma, sigma / 2)

    with adjoint(rule):
        got = gradient(spikes, x, weight)
    which, mean, var = seen[0]
    assert which is layer and all(entry[0] is layer for entry in seen)
    assert_close("mean", mean, statistics.mean.detach(), 1e-6)
    assert_close("var", var, statistics.var.detach(), 1e-6)
    own = LIF(decay=0.7, surrogate=rule(None, mean, var), backend=backend)(x)
    assert_same_bits("gradient", got, gradient(own, x, weight))


@every_backend
def test_a_rule_without_layer_and_channels(backend):
    x, seen = draw(backend, STEPS, 7).requires_grad_(), []
    spikes = lif(x, backend=backend).spikes
    with adjoint(lambda *given: (seen.append(given), WIDE)[1]):
        gradient(spikes, x, torch.ones_like(spikes))
    assert seen and all(given == (None, None, None) for given in seen)


def test_a_rule_for_a_layer_that_is_gone():
    x, seen = draw("cpu", STEPS, *SHAPE).requires_grad_(), []
    spikes = LIF(backend="cpu")(x)
    gc.collect()
    with adjoint(lambda layer, mean, var: (seen.append(layer), WIDE)[1]):
        gradient(spikes, x, torch.ones_like(spikes))
    assert seen == [None]


@every_backend
@pytest.mark.parametrize("shape", [(), (3,), (1, 3, 4), (STEPS, 3, 4), (STEPS, 1, 1), (1, 1, 4)], ids=str)
def test_surrogates_with_tensors(backend, shape):
    x, weight = draw(backend, STEPS, *SHAPE).requires_grad_(), draw(backend, STEPS, *SHAPE, seed=1)
    surrogate = surrogates.Sigmoid(draw(backend, *shape, seed=2).abs() + 0.5)
    spikes = lif(x, decay=0.7, backend=backend).spikes
    want = lif(x, decay=0.7, surrogate=surrogate, backend="reference").spikes
    with adjoint(surrogate):
        assert_close("gradient of x", gradient(spikes, x, weight), gradient(want, x, weight), 5e-6)
