"""Drop-in parity with SpikingJelly 2.0 and snnTorch 1.0, measured against the packages themselves.

Spikes, membranes and states must be the same bits; gradients of x, of the first state and of learnable parameters
must agree to 1e-6 of their norm. A missing package fails the collection of this file:
`pip install --no-deps -r requirements-peers.txt`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import snntorch
import torch
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import neuron, surrogate as sj_surrogate

import fastsnn
from conftest import GPU, device_of
from fastsnn import surrogates

#: Of the norm of the peer's gradient; both sides round in float32, in another order.
GRADIENT_TOLERANCE = 1e-6

BACKENDS = ["reference", "cpu", *(["triton", "cuda"] if GPU else [])]


@dataclass(frozen=True)
class Problem:
    """An input: T, the shape of a step, and how its values are drawn."""

    steps: int
    shape: tuple[int, ...]
    values: str = "normal"  # or "threshold": quarters and halves, so that h meets the threshold exactly and often
    seed: int = 0

    def draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, *shape], v0 [*shape] below the threshold, and the gradients of spikes and final state."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.values == "normal":
            x = 1.5 * torch.randn(self.steps, *self.shape, generator=generator) + 0.8
            v0 = 0.3 * torch.randn(self.shape, generator=generator).clamp(max=2)
        else:
            levels = torch.tensor([-0.5, 0.0, 0.25, 0.5, 1.0, 2.0])
            x = levels[torch.randint(6, (self.steps, *self.shape), generator=generator)]
            v0 = levels[torch.randint(4, self.shape, generator=generator)]
        return x, v0, torch.randn(x.shape, generator=generator), torch.randn(self.shape, generator=generator)

    def __str__(self) -> str:
        return f"T{self.steps}-{'x'.join(map(str, self.shape))}-{self.values}-{self.seed}"


PROBLEMS = [
    Problem(1, (3, 33)),
    Problem(4, (2, 3, 4, 4), seed=1),
    Problem(16, (2, 3, 4, 4), seed=2),
    Problem(7, (5, 33), seed=3),
    Problem(16, (2, 64), seed=4),
    Problem(4, (3, 5), "threshold", seed=5),
    Problem(16, (2, 7, 3), "threshold", seed=6),
    Problem(8, (1, 2, 3, 5), "threshold", seed=7),
]
#: Enough for cases that vary something else than the recurrence.
FEW = [PROBLEMS[2], PROBLEMS[6]]


@dataclass
class Run:
    """What one side computed; every tensor on the CPU."""

    spikes: torch.Tensor
    v: torch.Tensor
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    membrane: torch.Tensor | None = None


def leaf(value: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    return value.detach().clone().to(device).requires_grad_()


def finish(spikes, v, g_spikes, g_v, inputs: dict[str, torch.Tensor], membrane=None) -> Run:
    """Backward from the two given gradients to `inputs`."""
    loss = (spikes * g_spikes.to(spikes.device)).sum() + (v * g_v.to(v.device)).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    gradients = {name: gradient.cpu() for name, gradient in zip(inputs, gradients, strict=True)}
    return Run(spikes.detach().cpu(), v.detach().cpu(), gradients, None if membrane is None else membrane.detach().cpu())


def run_fastsnn(backend: str, problem: Problem, learn: dict[str, torch.Tensor] | None = None, membrane=False, **options) -> Run:
    """fastsnn.lif; `learn` names the arguments that get a gradient."""
    x, v0, g_spikes, g_v = problem.draw()
    device = device_of(backend)
    inputs = {"x": leaf(x, device), "v0": leaf(v0, device)}
    inputs |= {name: leaf(value, device) for name, value in (learn or {}).items()}
    out = fastsnn.lif(**inputs, **options, keep=("membrane",) if membrane else (), backend=backend)
    return finish(out.spikes, out.v, g_spikes, g_v, inputs, out.membrane if membrane else None)


def run_spikingjelly(node: torch.nn.Module, problem: Problem, calls: int = 1) -> Run:
    """A SpikingJelly node in multi-step mode; with `calls`, T is split and the node carries its state."""
    x, v0, g_spikes, g_v = problem.draw()
    inputs = {"x": leaf(x), "v0": leaf(v0)} | dict(node.named_parameters())
    node.step_mode = "m"
    node.v = inputs["v0"]
    spikes = torch.cat([node(part) for part in inputs["x"].chunk(calls)])
    return finish(spikes, node.v, g_spikes, g_v, inputs)


def run_snntorch(layer: snntorch.Leaky, problem: Problem) -> Run:
    """A snnTorch layer in the loop over T that its users write."""
    x, v0, g_spikes, g_v = problem.draw()
    inputs = {"x": leaf(x), "v0": leaf(v0)} | dict(layer.named_parameters())
    v, spikes, membranes = inputs["v0"], [], []
    for current in inputs["x"].unbind(0):
        spike, v = layer(current, v)
        spikes.append(spike)
        membranes.append(v)
    return finish(torch.stack(spikes), v, g_spikes, g_v, inputs, torch.stack(membranes))


def assert_same_bits(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    different = (ours != theirs).sum().item()
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, f"{name}: {ours.dtype} {ours.shape}, peer {theirs.dtype} {theirs.shape}"
    assert different == 0, f"{name}: {different} of {ours.numel()} differ, by up to {(ours - theirs).abs().max().item():.3g}"


def assert_parity(ours: Run, theirs: Run, names: dict[str, str] | None = None, scales: dict[str, float] | None = None) -> None:
    """names: our argument -> the peer's parameter. scales: what a gradient's error is measured by, where not its norm."""
    assert theirs.spikes.any() and not theirs.spikes.all(), "the problem fires always or never: it tests nothing"
    assert_same_bits("spikes", ours.spikes, theirs.spikes)
    assert_same_bits("v", ours.v, theirs.v)
    for name, gradient in ours.gradients.items():
        wanted = theirs.gradients[(names or {}).get(name, name)]
        error = (gradient.double().flatten() - wanted.double().flatten()).norm().item()
        scale = (scales or {}).get(name, wanted.double().norm().item())
        assert math.isfinite(error) and error <= GRADIENT_TOLERANCE * scale, f"gradient of {name}: off by {error / scale:.2g} of its norm"


def spikingjelly_reset(v_reset: float | None) -> dict[str, object]:
    return {"reset": "soft"} if v_reset is None else {"reset": "hard", "v_reset": v_reset}


resets = pytest.mark.parametrize("v_reset", [0.0, -0.25, None], ids=["hard", "hard_nonzero", "soft"])
detached = pytest.mark.parametrize("detach_reset", [False, True], ids=["attached", "detached"])
decay_inputs = pytest.mark.parametrize("decay_input", [True, False], ids=["decay_input", "decay_state"])
on_backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@detached
@resets
@decay_inputs
@pytest.mark.parametrize("tau", [2.0, 1.3])
def test_spikingjelly_lif(backend, problem, tau, decay_input, v_reset, detach_reset):
    node = neuron.LIFNode(tau=tau, decay_input=decay_input, v_reset=v_reset, detach_reset=detach_reset)
    ours = run_fastsnn(
        backend, problem, tau=tau, charge="leak_input" if decay_input else "leak_state", detach_reset=detach_reset,
        surrogate=surrogates.Sigmoid(4.0), **spikingjelly_reset(v_reset),
    )
    assert_parity(ours, run_spikingjelly(node, problem))


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@detached
@resets
def test_spikingjelly_if(backend, problem, v_reset, detach_reset):
    node = neuron.IFNode(v_threshold=0.75, v_reset=v_reset, detach_reset=detach_reset, surrogate_function=sj_surrogate.ATan())
    ours = run_fastsnn(
        backend, problem, decay=1.0, threshold=0.75, detach_reset=detach_reset, surrogate=surrogates.ATan(2.0),
        **spikingjelly_reset(v_reset),
    )
    assert_parity(ours, run_spikingjelly(node, problem))


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@detached
@resets
@decay_inputs
def test_spikingjelly_parametric_lif(backend, problem, decay_input, v_reset, detach_reset):
    def node() -> neuron.ParametricLIFNode:
        return neuron.ParametricLIFNode(init_tau=2.5, decay_input=decay_input, v_reset=v_reset, detach_reset=detach_reset)

    theirs = node()
    x, v0, g_spikes, g_v = problem.draw()
    device = device_of(backend)
    inputs = {"x": leaf(x, device), "v0": leaf(v0, device), "w": leaf(theirs.w)}
    out = fastsnn.lif(
        inputs["x"], inputs["v0"], inverse_tau=inputs["w"].sigmoid().to(device), charge="leak_input" if decay_input else "leak_state",
        detach_reset=detach_reset, surrogate=surrogates.Sigmoid(4.0), backend=backend, **spikingjelly_reset(v_reset),
    )
    ours = finish(out.spikes, out.v, g_spikes, g_v, inputs)
    assert_parity(ours, run_spikingjelly(theirs, problem), scales={"w": summands(node(), "w", problem, run_spikingjelly)})


@on_backends
@pytest.mark.parametrize("steps", [2, 6, 16])
@resets
def test_spikingjelly_carries_state(backend, steps, v_reset):
    problem = Problem(steps, (2, 3, 5), seed=steps)
    node = neuron.LIFNode(tau=1.7, v_reset=v_reset)
    ours = run_fastsnn(backend, problem, tau=1.7, charge="leak_input", surrogate=surrogates.Sigmoid(4.0), **spikingjelly_reset(v_reset))
    assert_parity(ours, run_spikingjelly(node, problem, calls=2))


@on_backends
@resets
def test_spikingjelly_first_state(backend, v_reset):
    x, *_ = PROBLEMS[1].draw()
    node = neuron.LIFNode(v_reset=v_reset, step_mode="m")
    device = device_of(backend)
    out = fastsnn.lif(x.to(device), tau=2.0, charge="leak_input", backend=backend, **spikingjelly_reset(v_reset))
    assert_same_bits("spikes", out.spikes.cpu(), node(x))
    assert_same_bits("v", out.v.cpu(), node.v)


SPIKINGJELLY_SURROGATES = {
    "Sigmoid": (4.0, lambda a: surrogates.Sigmoid(a)),
    "ATan": (2.0, lambda a: surrogates.ATan(a)),
    "PiecewiseQuadratic": (1.0, lambda a: surrogates.Triangle(1 / a)),
    "PiecewiseExp": (1.0, lambda a: surrogates.Exponential(a / 2, a)),
    "SoftSign": (2.0, lambda a: surrogates.SoftSign(a)),
    "SuperSpike": (1.0, lambda a: surrogates.FastSigmoid(1.0, height=a)),
    "Erf": (2.0, lambda a: surrogates.Erf(a)),
    "Rect": (1.0, lambda a: surrogates.Rectangle(1 / a)),
}


@on_backends
@pytest.mark.parametrize("problem", FEW, ids=str)
@resets
@pytest.mark.parametrize("alpha", ["default", 0.5, 3.0])
@pytest.mark.parametrize("name", SPIKINGJELLY_SURROGATES)
def test_spikingjelly_surrogates(backend, problem, name, alpha, v_reset):
    default, equivalent = SPIKINGJELLY_SURROGATES[name]
    theirs = getattr(sj_surrogate, name)() if alpha == "default" else getattr(sj_surrogate, name)(alpha=alpha)
    ours = run_fastsnn(
        backend, problem, tau=2.0, charge="leak_state", surrogate=equivalent(default if alpha == "default" else alpha),
        **spikingjelly_reset(v_reset),
    )
    assert_parity(ours, run_spikingjelly(neuron.LIFNode(decay_input=False, v_reset=v_reset, surrogate_function=theirs), problem))


SNNTORCH_RESETS = {
    ("subtract", True): "delayed_soft",
    ("subtract", False): "snntorch_soft",
    ("zero", True): "delayed_hard",
    ("zero", False): "hard",
    ("none", True): "none",
    ("none", False): "none",
}
snntorch_resets = pytest.mark.parametrize("mechanism, delay", SNNTORCH_RESETS, ids=lambda v: v if isinstance(v, str) else ("now", "delayed")[v])


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@snntorch_resets
@pytest.mark.parametrize("beta, threshold", [(0.5, 1.0), (0.9, 0.8)])
def test_snntorch_leaky(backend, problem, mechanism, delay, beta, threshold):
    layer = snntorch.Leaky(beta, threshold=threshold, reset_mechanism=mechanism, reset_delay=delay)
    ours = run_fastsnn(
        backend, problem, decay=beta, threshold=threshold, fire="gt", reset=SNNTORCH_RESETS[mechanism, delay],
        surrogate=surrogates.ATan(2.0), membrane=True,
    )
    theirs = run_snntorch(layer, problem)
    assert_parity(ours, theirs)
    if delay or mechanism == "none":  # otherwise the membrane that snnTorch returns is the one after the reset
        assert_same_bits("membrane", ours.membrane, theirs.membrane)


def summands(layer: torch.nn.Module, name: str, problem: Problem, run) -> float:
    """The sum of |contribution of each neuron| to the gradient of a parameter that all share.

    Positive and negative contributions cancel, so the norm of their sum says nothing about its rounding error.
    """
    parameter = getattr(layer, name)
    setattr(layer, name, torch.nn.Parameter(parameter.detach().expand(problem.shape).clone()))
    return run(layer, problem).gradients[name].double().abs().sum().item()


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@snntorch_resets
@pytest.mark.parametrize("learnt", ["beta", "threshold", "both"])
def test_snntorch_learns(backend, problem, mechanism, delay, learnt):
    def layer() -> snntorch.Leaky:
        return snntorch.Leaky(
            0.7, threshold=0.9, reset_mechanism=mechanism, reset_delay=delay,
            learn_beta=learnt != "threshold", learn_threshold=learnt != "beta",
        )

    theirs = layer()
    learn = {ours: getattr(theirs, name).detach() for ours, name in (("decay", "beta"), ("threshold", "threshold")) if learnt in (name, "both")}
    fixed = {"decay": 0.7, "threshold": 0.9}
    ours = run_fastsnn(
        backend, problem, learn, fire="gt", reset=SNNTORCH_RESETS[mechanism, delay], surrogate=surrogates.ATan(2.0),
        **{name: value for name, value in fixed.items() if name not in learn},
    )
    names = {"decay": "beta"}
    scales = {name: summands(layer(), names.get(name, name), problem, run_snntorch) for name in learn}
    assert_parity(ours, run_snntorch(theirs, problem), names, scales)


@on_backends
@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if len(problem.shape) == 2], ids=str)
@snntorch_resets
def test_snntorch_learns_per_neuron(backend, problem, mechanism, delay):
    # snnTorch broadcasts a vector over the last dimension, which is the channel where a step is [N, C].
    generator = torch.Generator().manual_seed(8)
    beta, threshold = (low + 0.3 * torch.rand(problem.shape[1], generator=generator) for low in (0.6, 0.7))
    layer = snntorch.Leaky(
        beta, threshold=threshold, reset_mechanism=mechanism, reset_delay=delay, learn_beta=True, learn_threshold=True
    )
    ours = run_fastsnn(
        backend, problem, {"decay": beta, "threshold": threshold}, fire="gt", reset=SNNTORCH_RESETS[mechanism, delay],
        surrogate=surrogates.ATan(2.0),
    )
    assert_parity(ours, run_snntorch(layer, problem), {"decay": "beta"})


SNNTORCH_SURROGATES = {
    "atan": (snn_surrogate.atan(alpha=2.0), surrogates.ATan(2.0)),
    "atan_3": (snn_surrogate.atan(alpha=3.0), surrogates.ATan(3.0)),
    "fast_sigmoid": (snn_surrogate.fast_sigmoid(), surrogates.FastSigmoid(25.0)),
    "fast_sigmoid_4": (snn_surrogate.fast_sigmoid(slope=4), surrogates.FastSigmoid(4.0)),
    # exp(-slope*z) overflows below z = -88.7/slope and snnTorch's gradient is NaN there: slopes that stay clear of it.
    "sigmoid_4": (snn_surrogate.sigmoid(slope=4), surrogates.Sigmoid(4.0)),
    "sigmoid_10": (snn_surrogate.sigmoid(slope=10), surrogates.Sigmoid(10.0)),
    "straight_through": (snn_surrogate.straight_through_estimator(), surrogates.StraightThrough()),
}


@on_backends
@pytest.mark.parametrize("problem", FEW, ids=str)
@snntorch_resets
@pytest.mark.parametrize("name", SNNTORCH_SURROGATES)
def test_snntorch_surrogates(backend, problem, name, mechanism, delay):
    theirs, equivalent = SNNTORCH_SURROGATES[name]
    layer = snntorch.Leaky(0.5, spike_grad=theirs, reset_mechanism=mechanism, reset_delay=delay)
    ours = run_fastsnn(backend, problem, decay=0.5, fire="gt", reset=SNNTORCH_RESETS[mechanism, delay], surrogate=equivalent)
    assert_parity(ours, run_snntorch(layer, problem))
