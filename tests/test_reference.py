"""The definition itself: derivatives by finite differences, traces by hand, published loops, random numbers by their test vectors."""

import math

import pytest
import torch
from fastsnn import lif, reference, surrogates, tables
from fastsnn.reference import Dynamics, simulate
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

STEPS, SHAPE = 3, torch.Size((2, 2, 2))
#: Of the surrogates; OTHER for parameters of rows to come.
PARAMETERS, OTHER = {"width": 1.3, "height": 0.7, "slope": 1.7, "alpha": 1.4, "sigma": 0.6, "mean": 0.15}, 1.2
#: Twice differentiable at almost every place, and not piecewise linear.
SMOOTH = ("sigmoid", "atan", "gaussian", "erf")


def draw(*shape: int, seed: int = 0, low: float = -1.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def make(name: str, relative: bool = False) -> surrogates.Surrogate:
    kind = surrogates.BY_NAME[name]
    return kind(*(PARAMETERS.get(parameter, OTHER) for parameter in kind.parameters), relative=relative)


class Soft(torch.autograd.Function):
    """A soft step whose backward pass is the surrogate's: finite differences of the first check the second."""

    @staticmethod
    def forward(ctx, z, theta, surrogate, hard):
        ctx.save_for_backward(z, theta)
        ctx.surrogate = surrogate
        at = z / theta if surrogate.relative else z
        return (z >= 0).to(z.dtype) if hard else surrogate.primitive(at, *surrogate.values)

    @staticmethod
    def backward(ctx, grad):
        z, theta = ctx.saved_tensors
        if not ctx.surrogate.relative:
            return grad * ctx.surrogate(z), None, None, None
        g_z = grad * ctx.surrogate(z / theta) / theta
        return g_z, -g_z * (z / theta), None, None


def soft_step(surrogate: surrogates.Surrogate, hard: bool = False):
    return lambda z, theta, t: Soft.apply(z, theta.expand_as(z), surrogate, hard)


def assert_gradients(dynamics: Dynamics, soft=None, gain=True, decay=(1, 2), threshold=(1, 2), second=False, seed=0) -> None:
    """gradcheck of every output with respect to every input; decay and threshold by their [steps, columns]."""
    low, high = {"leak": (0.5, 0.9), "leak_input": (1.5, 3.0), "leak_state": (1.5, 3.0)}.get(dynamics.charge, (0.3, 0.7))
    inputs = [
        draw(STEPS, *SHAPE, seed=seed, low=-0.5, high=1.8),
        draw(*SHAPE, seed=seed + 1, low=-0.5, high=1.6),
        draw(*decay, seed=seed + 2, low=low, high=high),
        draw(*threshold, seed=seed + 3, low=0.7, high=1.2),
        draw(STEPS, seed=seed + 4, low=0.6, high=1.4) if gain else None,
    ]
    inputs = [None if value is None else value.requires_grad_() for value in inputs]

    def run(x, v0, p, theta, g):
        trace = simulate(x, v0, p, theta, g, None, STEPS, dynamics, statistics=True, soft=soft)
        found = (trace.spikes, trace.v, trace.membrane, trace.mean, trace.var, trace.rate, trace.guard)
        return tuple(value for value in found if value is not None and value.requires_grad)

    # Double precision and steps of 1e-6: 1e-6 is what central differences reach.
    assert (gradgradcheck if second else gradcheck)(run, inputs, atol=2e-6, rtol=1e-5)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", tables.RESETS)
@pytest.mark.parametrize("charge", tables.CHARGES)
def test_gradients_of_charge_and_reset(charge, reset):
    assert_gradients(Dynamics(charge, "ge", reset, v_reset=-0.2, guard=(0.6, 2)), soft_step(make("sigmoid")))


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", tables.SURROGATES)
def test_gradients_of_surrogates(name, relative):
    assert_gradients(Dynamics(reset="soft"), soft_step(make(name, relative)), gain=False)


@pytest.mark.parametrize("fire", tables.FIRES)
def test_gradients_of_fire(fire):
    if fire == "none":
        assert_gradients(Dynamics(fire="none", reset="none", guard=(0.6, 1)))
    else:
        # Gaussian firing is differentiated by the mean of its spike, which is the surrogate's own primitive.
        kind = "gaussian" if fire == "gaussian" else "atan"
        assert_gradients(Dynamics(fire=fire, noise=0.6, guard=(0.6, 1)), soft_step(make(kind)))


@pytest.mark.parametrize("columns", [(1, 1), (1, 2), (1, 4), (STEPS, 1), (STEPS, 2), (STEPS, 4)], ids=str)
def test_gradients_of_parameters(columns):
    assert_gradients(Dynamics(reset="soft"), soft_step(make("sigmoid", relative=True)), decay=columns, threshold=columns)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("reset", tables.RESETS)
def test_second_derivatives(reset, name):
    assert_gradients(Dynamics(reset=reset), soft_step(make(name)), gain=False, second=True)


def test_second_derivatives_of_lif():
    x = draw(STEPS, *SHAPE, high=1.8).requires_grad_()
    out = lif(x, decay=0.8, reset="soft", surrogate=make("sigmoid"), backend="reference")
    (first,) = torch.autograd.grad(out.spikes.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all() and second.any()


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("reset", tables.RESETS)
def test_the_spike_differentiates_like_its_soft_step(reset, detach, relative):
    """The same spikes, the soft step's backward pass: the gradients that `lif` takes are those that were checked above."""
    surrogate = make("atan", relative)
    found = []
    for soft in (None, soft_step(surrogate, hard=True)):
        leaves = [draw(STEPS, *SHAPE, high=2.0), draw(1, 2, low=0.5, high=0.9), draw(1, 4, low=0.7, high=1.2)]
        x, decay, threshold = (leaf.requires_grad_() for leaf in leaves)
        dynamics = Dynamics(reset=reset, detach_reset=detach, guard=(0.5, 2))
        trace = simulate(x, None, decay, threshold, None, None, STEPS, dynamics, True, surrogate, soft=soft)
        outs = [trace.spikes, trace.v, trace.membrane, trace.mean, trace.var, trace.rate, trace.guard]
        found.append(torch.autograd.grad([(out * draw(*out.shape, seed=9)).sum() for out in outs], [x, decay, threshold]))
    for ours, soft in zip(*found):
        assert (ours - soft).abs().max() <= 1e-13


# ---- surrogates --------------------------------------------------------------------------------------------------------


def functions() -> dict:
    """What an expression of kernels/lif.def may call, and its formulas, in PyTorch."""
    wide = lambda value: torch.as_tensor(value, dtype=torch.float64)
    known = {
        "lit": wide,
        "divide": lambda a, b: a / b,
        "absolute": torch.abs,
        "maximum": lambda a, b: torch.maximum(wide(a), wide(b)),
        "select": lambda condition, yes, no: torch.where(condition, wide(yes), wide(no)),
        "exponential": torch.exp,
        "unused": wide(0.0),
    }
    for name, argument, text in tables.read_rows("FORMULA"):
        known[name] = eval(f"lambda {argument}: {text}", known)
    return known


def evaluate(text: str, **values: Tensor) -> Tensor:
    return eval(text, functions(), {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()})


@pytest.mark.parametrize("name", tables.SURROGATES)
def test_derivative_of_the_primitive(name):
    surrogate = make(name)
    z = draw(500, low=-3, high=3).requires_grad_()
    (slope,) = torch.autograd.grad(surrogate.primitive(z, *surrogate.values).sum(), z)
    assert (slope - surrogate(z.detach())).abs().max() <= 1e-12
    step = 1e-6
    with torch.no_grad():
        numeric = (surrogate.primitive(z + step, *surrogate.values) - surrogate.primitive(z - step, *surrogate.values)) / (2 * step)
    away = ~((z.abs() - 0.5 * PARAMETERS["width"]).abs() < 2 * step)  # the rectangle's edges
    assert (slope - numeric)[away].abs().max() <= 1e-8


@pytest.mark.parametrize(("name", "a", "b", "text"), tables.read_rows("SURROGATE"), ids=tables.SURROGATES)
def test_derivative_is_the_row_of_the_table(name, a, b, text):
    kind = surrogates.BY_NAME[name]
    assert kind.parameters == tuple(word for word in (a, b) if word != "unused")
    surrogate = make(name)
    z = torch.cat([draw(1000, low=-3, high=3), torch.tensor([0.0, -0.0, 1.3, -0.65], dtype=torch.float64)])
    first, second = surrogate.values
    difference = (evaluate(text, z=z, a=first, b=second) - surrogate(z)).abs()
    assert difference.max() <= 1e-14 * max(1.0, float(surrogate(z).abs().max()))


@pytest.mark.parametrize("name", tables.SURROGATES)
def test_area_of_normalised_surrogates(name):
    """Those with one parameter rise by 1 from far left to far right (straight-through rises without end)."""
    kind = surrogates.BY_NAME[name]
    if len(kind.parameters) == 1:
        ends = make(name).primitive(torch.tensor([-1e7, 1e7], dtype=torch.float64), PARAMETERS.get(kind.parameters[0], OTHER), 0.0)
        assert abs(float(ends[1] - ends[0]) - 1) < 1e-6


# ---- tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", tables.read_rows("CHARGE"), ids=tables.CHARGES)
def test_charge_is_the_row_of_the_table(row):
    name, kind, h, dh_dx, dh_dv, dh_dp = row
    low, high = (1.2, 4.0) if kind == "tau" else (0.2, 0.9)
    v, x, p = draw(50, seed=1).requires_grad_(), draw(50, seed=2).requires_grad_(), draw(50, seed=3, low=low, high=high).requires_grad_()
    r = torch.tensor(-0.25, dtype=torch.float64)
    values = {"v": v.detach(), "x": x.detach(), "p": p.detach(), "r": r}
    found = reference.charge(name, v, x, p, r)
    assert torch.equal(found, evaluate(h, **values))
    for leaf, text in ((x, dh_dx), (v, dh_dv), (p, dh_dp)):
        (slope,) = torch.autograd.grad(found.sum(), leaf, retain_graph=True)
        assert (slope - evaluate(text, **values)).abs().max() <= 1e-14


@pytest.mark.parametrize("row", tables.read_rows("RESET"), ids=tables.RESETS)
def test_reset_is_the_row_of_the_table(row):
    name, delayed, _, _, v_next, keep, jump, _ = row
    h, s, fired = draw(50, seed=1, high=2).requires_grad_(), (draw(50, seed=2) > 0).double().requires_grad_(), (draw(50, seed=3) > 0).double()
    threshold, r = torch.tensor(0.9, dtype=torch.float64), torch.tensor(-0.25, dtype=torch.float64)
    values = {"h": h.detach(), "s": s.detach(), "fired": fired, "threshold": threshold, "r": r}
    found = reference.next_state(name, h, s, threshold, fired if delayed == "1" else None, r)
    assert torch.equal(found, evaluate(v_next, **values).expand_as(found))
    for leaf, text in ((h, keep), (s, jump)):
        (slope,) = torch.autograd.grad(found.sum(), leaf, retain_graph=True, allow_unused=True)
        slope = torch.zeros_like(leaf) if slope is None else slope
        assert (slope - evaluate(text, **values)).abs().max() <= 1e-14


def test_unknown_rows_raise():
    one = torch.ones(1, 1, dtype=torch.float64)
    for dynamics in (Dynamics(charge="new"), Dynamics(fire="new"), Dynamics(reset="new")):
        with pytest.raises(ValueError, match="has a row in kernels/lif.def and no branch here"):
            simulate(one[None], None, 0.5, 1.0, None, None, 1, dynamics)


# ---- traces by hand ------------------------------------------------------------------------------------------------------

TRACES = {
    # name: (arguments, x, h, spikes, v after the last step)
    "hard": ({"decay": 0.5}, [0.5, 0.5, 1.0, 0.25], [0.5, 0.75, 1.375, 0.25], [0, 0, 1, 0], 0.25),
    "hard to -1": ({"decay": 0.5, "v_reset": -1.0}, [2.0, 1.0, 1.5], [1.5, 0.5, 1.75], [1, 0, 1], -1.0),
    "soft": ({"decay": 0.5, "reset": "soft"}, [0.5, 0.5, 1.0, 0.25], [0.5, 0.75, 1.375, 0.4375], [0, 0, 1, 0], 0.4375),
    "no reset": ({"decay": 0.5, "reset": "none"}, [2.0, 0.5, 0.25], [2.0, 1.5, 1.0], [1, 1, 1], 1.0),
    "integrate": ({"decay": 1.0}, [0.25, 0.25, 0.25, 0.25, 0.25], [0.25, 0.5, 0.75, 1.0, 0.25], [0, 0, 0, 1, 0], 0.25),
    "at the threshold, ge": ({"decay": 0.5}, [1.0, 1.0], [1.0, 1.0], [1, 1], 0.0),
    "at the threshold, gt": ({"decay": 0.5, "fire": "gt"}, [1.0, 1.0], [1.0, 1.5], [0, 1], 0.0),
    "delayed soft": ({"decay": 0.5, "reset": "delayed_soft"}, [1.5, 0.5, 0.5], [1.5, 0.25, 0.625], [1, 0, 0], 0.625),
    "delayed hard": ({"decay": 0.5, "reset": "delayed_hard"}, [1.5, 0.5, 0.5], [1.5, 0.5, 0.75], [1, 0, 0], 0.75),
    "snntorch soft": ({"decay": 0.5, "reset": "snntorch_soft"}, [1.5, 0.5, 0.5], [1.5, 0.75, 0.875], [1, 0, 0], 0.875),
    "leak on the input": ({"tau": 2.0, "charge": "leak_input"}, [2.0, 1.0, 2.0], [1.0, 0.5, 1.25], [1, 0, 1], 0.0),
    "leak on the state": ({"tau": 4.0, "charge": "leak_state"}, [0.5, 0.5, 0.5], [0.5, 0.875, 1.15625], [0, 0, 1], 0.0),
    "q on the input, reset to -1": ({"inverse_tau": 0.25, "charge": "leak_input", "v_reset": -1.0}, [4.0, 8.0], [0.0, 1.75], [0, 1], -1.0),
    "q on the state, reset to -1": ({"inverse_tau": 0.5, "charge": "leak_state", "v_reset": -1.0}, [1.0, 0.25, 2.0], [0.0, -0.25, 1.375], [0, 0, 1], -1.0),
    "integrator": ({"decay": 0.5, "reset": "none", "fire": "none"}, [2.0, 0.5, 0.25], [2.0, 1.5, 1.0], [2.0, 1.5, 1.0], 1.0),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_by_hand(name):
    options, x, h, spikes, v = TRACES[name]
    out = lif(torch.tensor(x).reshape(-1, 1, 1), **options, keep=("membrane",), backend="reference")
    assert out.membrane.flatten().tolist() == h
    assert out.spikes.flatten().tolist() == spikes
    assert out.v.item() == v


def test_delayed_resets_read_the_first_state():
    v0 = torch.tensor([[1.5]])
    for reset, h in (("delayed_soft", 0.25), ("delayed_hard", 0.5), ("snntorch_soft", 0.25)):
        out = lif(torch.tensor([[[0.5]]]), v0, decay=0.5, reset=reset, keep=("membrane",), backend="reference")
        assert out.membrane.item() == h


# ---- the published loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v_reset", [None, 0.0, -0.25])
@pytest.mark.parametrize("decay_input", [True, False])
def test_loop_of_spikingjelly(decay_input, v_reset):
    tau, x = 1.7, draw(20, 3, 5, high=3.0).float()
    v, spikes = torch.full((3, 5), 0.0 if v_reset is None else v_reset), []
    for current in x:
        rest = v if v_reset is None or v_reset == 0 else v - v_reset
        v = v + (current - rest) / tau if decay_input else v - rest / tau + current
        spike = (v - 1.0 >= 0).float()
        v = v - spike * 1.0 if v_reset is None else (1.0 - spike) * v + spike * v_reset
        spikes.append(spike)
    reset = {"reset": "soft"} if v_reset is None else {"reset": "hard", "v_reset": v_reset}
    out = lif(x, tau=tau, charge="leak_input" if decay_input else "leak_state", **reset, backend="reference")
    assert torch.equal(out.spikes, torch.stack(spikes)) and torch.equal(out.v, v)


@pytest.mark.parametrize(("mechanism", "reset"), [("subtract", "delayed_soft"), ("zero", "delayed_hard")])
def test_loop_of_snntorch(mechanism, reset):
    beta, threshold, x = 0.9, 0.8, draw(20, 3, 5, high=2.0).float()
    memory, spikes = torch.zeros(3, 5), []
    for current in x:
        fired = (memory - threshold > 0).float()
        memory = beta * memory + current - fired * threshold if mechanism == "subtract" else beta * ((1 - fired) * memory) + current
        spikes.append((memory - threshold > 0).float())
    out = lif(x, decay=beta, threshold=threshold, fire="gt", reset=reset, backend="reference")
    assert torch.equal(out.spikes, torch.stack(spikes)) and torch.equal(out.v, memory)


# ---- random numbers ----------------------------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python's integers, as the paper writes it."""
    mask = 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & mask, (a >> 32) ^ counter[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123, tests/kat_vectors
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


def test_philox_gives_the_known_answers():
    for counter, key, words in KNOWN_ANSWERS:
        assert philox(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**32 + 5])
def test_uniform_is_the_first_word_of_philox(seed, step):
    like = torch.zeros((), dtype=torch.float64)
    found = reference.uniform(torch.tensor([seed]), torch.Size((2, 3)), step, like).flatten()
    key = [seed & ONES, (seed >> 32) & ONES]
    assert found.tolist() == [(philox([index, 0, step & ONES, 0], key)[0] >> 8) / 2**24 for index in range(6)]


def test_uniform_is_uniform_and_independent():
    count = 200_000
    steps = torch.stack([reference.uniform(torch.tensor([7]), torch.Size((count,)), t, torch.zeros((), dtype=torch.float64)) for t in range(4)])
    assert steps.min() >= 0 and steps.max() < 1
    # Five standard errors of the mean, of the variance (1/180 is the variance of (u - 1/2)^2), and of a correlation.
    assert (steps.mean(1) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / count)
    assert (steps.var(1) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / count)
    neighbours = torch.cat([steps[:, 1:], steps[:, :-1]])
    off = torch.corrcoef(neighbours) - torch.eye(8)
    assert off.abs().max() < 5 / math.sqrt(count)


# In float32 the 16th power multiplies the rounding of its root by 16: 16 * 2^-24.
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1.5e-7), (torch.float32, 1.5e-7 + 2**-20)])
def test_normal_cdf(dtype, error):
    y = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    exact = 0.5 * torch.erfc(-y / math.sqrt(2))
    assert (reference.normal_cdf(y.to(dtype)).double() - exact).abs().max() < error
    assert reference.normal_cdf(torch.tensor([-math.inf, math.inf], dtype=dtype)).tolist() == [0, 1]


def test_normal_cdf_is_the_row_of_the_table():
    y = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    assert torch.equal(reference.normal_cdf(y), functions()["normal_cdf"](y))


def test_noisy_firing_rate():
    count, sigma, z = 100_000, 0.4, torch.tensor([-0.6, -0.2, 0.0, 0.1, 0.5])
    x = (1 + z).reshape(1, 1, 5, 1).expand(1, 1, 5, count)
    rate = lif(x, fire="gaussian", noise=sigma, seed=3, backend="reference").spikes.mean((0, 1, 3)).double()
    wanted = 0.5 * torch.erfc(-z.double() / sigma / math.sqrt(2))
    assert ((rate - wanted).abs() < 5 * (wanted * (1 - wanted) / count).sqrt()).all()


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_guard_of_a_membrane_that_is_no_number(backend, power):
    x = torch.zeros(4, 2, 3)
    x[1, 0, 0] = float("nan")
    guard = lif(x, statistics=("guard",), guard=(0.5, power), backend=backend).statistics.guard
    assert guard.isnan().tolist() == [[t >= 1 and c == 0 for c in range(3)] for t in range(4)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_surrogate_that_is_changed_after_the_forward_pass(backend):
    surrogate, x = surrogates.ATan(2.0), torch.linspace(-1, 3, 24).reshape(4, 2, 3).requires_grad_()
    want = torch.autograd.grad(lif(x, surrogate=surrogates.ATan(2.0), backend=backend).spikes.sum(), x)[0]
    out = lif(x, surrogate=surrogate, backend=backend)
    surrogate.alpha = 5.0
    assert torch.equal(torch.autograd.grad(out.spikes.sum(), x)[0], want)
