"""Calls that repeat: when a plan serves them, and that nobody can tell but by the time. The bits: cases.assert_repeats."""

import pytest
import torch
from cases import assert_same_bits
from fastsnn import LIF, adjoint, backends, lif, plans, surrogates
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

X = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def none_yet(monkeypatch):
    monkeypatch.setattr(plans, "_plans", {})


@pytest.fixture
def ran(monkeypatch):
    """The plans that ran a forward pass, one entry for each call."""
    found, forward = [], plans.Plan.forward
    monkeypatch.setattr(plans.Plan, "forward", lambda plan, x: (found.append(plan), forward(plan, x))[1])
    return found


def leaf(x: torch.Tensor = X) -> torch.Tensor:
    return x.clone().requires_grad_()


def test_the_second_call_has_a_plan(ran):
    for _ in range(3):
        lif(leaf(), decay=0.9, backend="cpu").spikes.sum().backward()
    assert len(ran) == 2 and ran[0] is ran[1]


OTHER = {
    "shape": lambda: lif(X[:, :2], decay=0.9, backend="cpu"),
    "dtype": lambda: lif(X.double(), decay=0.9, backend="cpu"),
    "layout": lambda: lif(X.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), decay=0.9, backend="cpu"),
    "decay": lambda: lif(X, decay=0.8, backend="cpu"),
    "sign of zero": lambda: lif(X, decay=0.9, v_reset=-0.0, backend="cpu"),
    "surrogate": lambda: lif(X, decay=0.9, surrogate=surrogates.ATan(), backend="cpu"),
    "statistics": lambda: lif(X, decay=0.9, statistics=("mean",), backend="cpu"),
    "state": lambda: lif(X, X[0], decay=0.9, backend="cpu"),
    "tensor": lambda: lif(X, decay=torch.tensor(0.9), backend="cpu"),
    "gain": lambda: lif(X, decay=0.9, gain=torch.ones(4), backend="cpu"),
    "chance": lambda: lif(X, decay=0.9, fire="gaussian", noise=0.1, backend="cpu"),
    "reference": lambda: lif(X, decay=0.9, backend="reference"),
    "list": lambda: lif(X, decay=0.9, statistics=["mean"], backend="cpu"),
    "no dense x": lambda: lif(X[..., ::2], decay=0.9, backend="cpu"),
}


@pytest.mark.parametrize("other", OTHER)
def test_another_call_is_not_served_by_this_plan(ran, other):
    lif(X, decay=0.9, backend="cpu")
    (plan,) = plans._plans.values()
    OTHER[other]()
    OTHER[other]()
    assert plan not in ran


def test_what_cannot_be_served_is_tried_once(monkeypatch):
    made, init = [], plans.Plan.__init__
    monkeypatch.setattr(plans.Plan, "__init__", lambda plan, *arguments: (made.append(plan), init(plan, *arguments))[1])
    for _ in range(3):
        lif(X[..., ::2], decay=0.9, backend="cpu")
    assert len(made) == 1 and not made[0].serves


def test_a_surrogate_that_changes_before_the_backward_pass():
    def gradient(change: bool) -> torch.Tensor:
        surrogate, x = surrogates.Rectangle(1.0), leaf()
        spikes = lif(x, decay=0.9, surrogate=surrogate, backend="cpu").spikes
        if change:
            surrogate.width = 3.0
        return torch.autograd.grad(spikes.sum(), x)[0]

    want = gradient(False)
    for _ in range(3):
        assert_same_bits("gradient", gradient(True), want)


def test_x_that_must_be_copied_has_no_plan(ran):
    for x in (X[..., ::2], X[:1].expand(4, -1, -1, -1)):
        want = lif(x.contiguous(), decay=0.9, backend="reference").spikes
        for _ in range(3):
            assert_same_bits("spikes", lif(x, decay=0.9, backend="cpu").spikes, want)
    assert not ran


def test_another_number_of_threads_has_another_plan(ran):
    lif(X, decay=0.9, backend="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        lif(X, decay=0.9, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert not ran and len(plans._plans) == 2


def test_a_surrogate_that_was_changed_counts_as_another():
    layer, width = LIF(decay=0.9, surrogate=surrogates.Rectangle(1.0), backend="cpu"), surrogates.Rectangle(3.0)

    def gradient(layer):
        x = leaf()
        return torch.autograd.grad(layer(x).sum(), x)[0]

    for _ in range(3):
        narrow = gradient(layer)
    layer.surrogate.width = 3.0
    for _ in range(3):
        assert_same_bits("gradient", gradient(layer), gradient(LIF(decay=0.9, surrogate=width, backend="reference")))
    assert not torch.equal(gradient(layer), narrow)


def test_one_forward_pass_serves_every_adjoint_again_and_again():
    rules = ["bptr", "hart", surrogates.ATan(), surrogates.Triangle(torch.tensor(0.7)), lambda layer, mean, var: surrogates.Gaussian(var.mean().sqrt().item())]

    def gradients(backend):
        x = leaf()
        spikes = lif(x, decay=0.9, backend=backend).spikes
        found = []
        for rule in rules:
            with adjoint(rule):
                found.append(torch.autograd.grad(spikes, x, torch.ones_like(spikes), retain_graph=True)[0])
        return found

    want = gradients("reference")
    for _ in range(3):
        for one, other in zip(gradients("cpu"), want):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_layer_is_told_to_the_adjoint(ran):
    first, second, seen = LIF(backend="cpu"), LIF(backend="cpu"), []

    def rule(layer, mean, var):
        seen.append(layer)
        return surrogates.ATan()

    for _ in range(2):
        x = leaf()
        out = second(first(x))
        with adjoint(rule):
            out.sum().backward()
    assert seen == [second, first] * 2 and ran


@pytest.mark.parametrize("used", [("mean",), ("var",), ("rate",), ("guard",), ("mean", "var"), ("mean", "var", "rate", "guard")])
def test_gradients_of_some_rows(used):
    def gradient(backend):
        x = leaf()
        found = lif(x, decay=0.9, backend=backend, statistics=("mean", "var", "rate", "guard"), guard=(0.4, 2)).statistics
        return torch.autograd.grad(sum((getattr(found, name) ** 2).sum() for name in used), x)[0]

    want = gradient("reference")
    for _ in range(3):
        assert torch.allclose(gradient("cpu"), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rows_and_their_gradients_are_those_of_the_operators(ran, dtype):
    """A plan's kernel rounds the rows itself, and takes their gradients as they come, in any layout."""
    given, numbers = X.to(dtype), torch.randn(5, 10, generator=torch.Generator().manual_seed(1), dtype=torch.promote_types(dtype, torch.float32))

    def once():
        x = leaf(given)
        found = lif(x, decay=0.9, backend="cpu", statistics=("mean", "var", "rate", "guard"), guard=(0.4, 2)).statistics
        rows = [found.mean, found.var, found.rate, found.guard]
        upstream = [numbers[0, 0].expand(4, 5), numbers[:, :4].T, numbers[:4, :5], numbers[:4, ::2]]
        return [*(row.detach() for row in rows), *torch.autograd.grad(rows, x, upstream)]

    first = once()
    for _ in range(2):
        for name, one, other in zip(("mean", "var", "rate", "guard", "gradient"), first, once()):
            assert one.dtype == other.dtype
            assert_same_bits(name, one, other)
    assert len(ran) == 2 and first[1].abs().min() > 0


def test_a_second_derivative_is_refused_as_ever(ran):
    for _ in range(3):
        x = leaf()
        (first,) = torch.autograd.grad((lif(x, decay=0.9, backend="cpu").spikes * x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            first.sum().backward()
    assert len(ran) == 2


def test_gradients_through_a_created_graph():
    """Rows and spikes that arrive under create_graph go the long way, with the same values."""

    def gradient(**options):
        x = leaf()
        found = lif(x, decay=0.9, backend="cpu", statistics=("var",))
        return torch.autograd.grad((found.spikes * X).sum() + found.statistics.var.sum(), x, **options)[0]

    gradient()
    want = gradient()
    assert_same_bits("gradient", gradient(create_graph=True).detach(), want)


def test_a_saved_input_must_not_change():
    lif(leaf(), decay=0.9, backend="cpu")
    x = leaf()
    y = x * 1.0
    spikes = lif(y, decay=0.9, backend="cpu").spikes
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_those_who_look_on_see_the_operators():
    for _ in range(2):
        lif(leaf(), decay=0.9, backend="cpu").spikes.sum().backward()
    with Seen() as seen:
        lif(leaf(), decay=0.9, backend="cpu").spikes.sum().backward()
    assert {"fastsnn::lif_forward", "fastsnn::lif_backward"} <= set(seen.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        lif(leaf(), decay=0.9, backend="cpu").spikes.sum().backward()
    assert {"fastsnn::lif_forward", "fastsnn::lif_backward"} <= {event.key for event in profile.key_averages()}
    batch = torch.stack([X, X + 1])
    want = torch.stack([lif(x, decay=0.9, backend="cpu").spikes for x in batch])
    assert_same_bits("vmap", torch.func.vmap(lambda x: lif(x, decay=0.9, backend="cpu").spikes)(batch), want)


class Named(torch.Tensor):
    """A subclass: what torch does for it is its own affair."""


def test_tensors_of_other_kinds_go_the_long_way(ran):
    lif(X, decay=0.9, backend="cpu")
    lif(X.as_subclass(Named), decay=0.9, backend="cpu")
    assert not ran
    lif(nn.Parameter(X), decay=0.9, backend="cpu")
    assert len(ran) == 1


def test_a_backend_that_is_replaced(monkeypatch, ran):
    lif(X, decay=0.9, backend="cpu")
    monkeypatch.setitem(backends.BACKENDS, "cpu", backends.CPU())
    lif(X, decay=0.9, backend="cpu")
    assert not ran


def test_bad_arguments_are_told_each_time():
    lif(X, decay=0.9, steps=4, backend="cpu")
    for options in ({"decay": 1.5}, {"decay": 0.9, "steps": 4.0}, {"decay": 0.9, "keep": "membrane"}, {"decay": 0.9, "threshold": float("nan")}):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError)):
                lif(X, **{"backend": "cpu", **options})


def test_the_number_of_plans_is_bounded(monkeypatch):
    monkeypatch.setattr(plans, "MOST", 4)
    for size in range(1, 12):
        lif(torch.zeros(2, size, 3), backend="cpu")
        assert len(plans._plans) <= 4


@pytest.mark.parametrize("use", [("mean",), ("var",), ("rate",), ("guard",), ("rate", "var")], ids="+".join)
def test_some_of_the_statistics_have_a_gradient(use):
    """The bits of the operators, for which all rows are one table."""
    x, grads = torch.randn(1, 2, 5, 6, 6, generator=torch.Generator().manual_seed(1)), []
    for _ in range(3):
        leaf_ = leaf(x)
        out = lif(leaf_, tau=2.0, charge="leak_input", steps=48, reset="soft", detach_reset=True, statistics=("mean", "var", "rate", "guard"), guard=(0.3, 2), backend="cpu")
        weight = torch.linspace(-1, 1, 48)[:, None]
        grads += torch.autograd.grad(sum((getattr(out.statistics, name) * weight).sum() for name in use), leaf_)
    assert grads[0].any()
    for again in grads[1:]:
        assert_same_bits("gradient of x, again", again, grads[0])
