"""Bad input: one error each that says what, got, wanted and the cure, and never an assertion or a silent result."""

import math

import pytest
import torch
from fastsnn import IF, LI, LIF, NoisyLIF, ParametricLIF, adjoint, backends, lif, record, surrogates

X = torch.zeros(4, 2, 3, 5)
INT = torch.zeros(4, 2, 3, dtype=torch.int32)

#: what is wrong: (the arguments of lif, the error, parts of its message)
BAD = {
    "no tensor": (dict(x=[1.0, 2.0]), TypeError, ("x is a list", "wanted a tensor [T, N, C, *S]")),
    "one dimension": (dict(x=torch.zeros(4)), ValueError, ("shape [4]", "wanted [T, N, C, *S]", "x[:, None]")),
    "no dimension": (dict(x=torch.zeros(())), ValueError, ("shape []", "wanted [T, N, C, *S]")),
    "sparse": (dict(x=X.to_sparse()), TypeError, ("x is a sparse_coo tensor", "wanted a dense one", "x.to_dense()")),
    "sparse rows": (dict(x=torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))), TypeError, ("x is a sparse_csr tensor", "wanted a dense one")),
    "statistics None": (dict(x=X, statistics=None), TypeError, ("statistics is None", "wanted a tuple of names", "statistics=('mean',)")),
    "statistics a generator": (dict(x=X, statistics=(name for name in ("mean",))), TypeError, ("statistics is <generator", "wanted a tuple of names")),
    "keep None": (dict(x=X, keep=None), TypeError, ("keep is None", "wanted a tuple of names")),
    "first_step too large": (dict(x=X, first_step=2**63), ValueError, ("first_step is 9223372036854775808", "63 bits")),
    "no steps": (dict(x=torch.zeros(0, 2, 3)), ValueError, ("shape [0, 2, 3]", "at least one step and one neuron")),
    "no neurons": (dict(x=torch.zeros(4, 0, 3)), ValueError, ("shape [4, 0, 3]", "at least one step and one neuron", "Skip")),
    "integers": (dict(x=INT), TypeError, ("x is int32 on cpu", "float16, bfloat16, float32, float64", "x.float()")),
    "booleans": (dict(x=INT.bool()), TypeError, ("x is bool", "x.float()")),
    "complex": (dict(x=INT.to(torch.complex64)), TypeError, ("x is complex64", "float32")),
    "steps of another x": (dict(x=X, steps=3), ValueError, ("steps=3", "4 steps", "wanted 3, or 1", "merged=True")),
    "steps below one": (dict(x=X[:1], steps=0), ValueError, ("steps is 0", "wanted an int >= 1")),
    "steps not an int": (dict(x=X, steps=4.0), ValueError, ("steps is 4.0", "wanted an int >= 1")),
    "v0 of another shape": (dict(x=X, v0=torch.zeros(2, 3, 4)), ValueError, ("v0 has shape [2, 3, 4]", "wanted [2, 3, 5]")),
    "v0 of one step": (dict(x=X, v0=X[:1]), ValueError, ("v0 has shape [1, 2, 3, 5]", "wanted [2, 3, 5]")),
    "v0 an integer tensor": (dict(x=X, v0=torch.zeros(2, 3, 5, dtype=torch.int64)), TypeError, ("v0 is int64", "floating-point", "v0.float()")),
    "v0 a number": (dict(x=X, v0=0.0), TypeError, ("v0 is a float", "wanted a floating-point tensor")),
    "v0 elsewhere": (dict(x=X, v0=torch.zeros(2, 3, 5, device="meta")), ValueError, ("v0 is on meta", "x on cpu", "v0.to(x.device)")),
    "decay above one": (dict(x=X, decay=1.5), ValueError, ("decay is 1.5", "wanted a number in [0, 1]")),
    "decay below zero": (dict(x=X, decay=-0.1), ValueError, ("decay is -0.1", "[0, 1]")),
    "decay nan": (dict(x=X, decay=math.nan), ValueError, ("decay is nan", "finite")),
    "decay a word": (dict(x=X, decay="slow"), TypeError, ("decay is 'slow'", "wanted a number or a tensor")),
    "decay elsewhere": (dict(x=X, decay=torch.tensor(0.5, device="meta")), ValueError, ("decay is on meta", "x on cpu", "decay.to(x.device)")),
    "decay integers": (dict(x=X, decay=torch.tensor(1)), TypeError, ("decay is int64", "decay.float()")),
    "decay of another shape": (dict(x=X, decay=torch.ones(4)), ValueError, ("decay has shape [4]", "[3] (one per channel)", "[T or 1, 3, 5]")),
    "decay of other steps": (dict(x=X, decay=torch.ones(3, 3, 5)), ValueError, ("decay has 3 steps", "wanted 1 or 4")),
    "tau one": (dict(x=X, tau=1.0, charge="leak_input"), ValueError, ("tau is 1.0", "wanted a number > 1", "decay=1")),
    "tau nan": (dict(x=X, tau=math.nan, charge="leak_state"), ValueError, ("tau is nan", "finite")),
    "tau for leak": (dict(x=X, tau=2.0), ValueError, ("tau is set", "'leak' takes decay", "charge='leak_input'")),
    "decay for leak_input": (dict(x=X, decay=0.5, charge="leak_input"), ValueError, ("decay is set", "takes tau", "charge='leak'")),
    "no tau": (dict(x=X, charge="leak_input"), ValueError, ("takes tau", "neither")),
    "both taus": (dict(x=X, charge="leak_state", tau=2.0, inverse_tau=0.5), ValueError, ("one of them", "both")),
    "inverse_tau above one": (dict(x=X, charge="leak_input", inverse_tau=2.0), ValueError, ("inverse_tau is 2.0", "[0, 1]")),
    "threshold nan": (dict(x=X, threshold=math.nan), ValueError, ("threshold is nan", "finite")),
    "threshold infinite": (dict(x=X, threshold=math.inf), ValueError, ("threshold is inf", "finite")),
    "threshold of another shape": (dict(x=X, threshold=torch.ones(2)), ValueError, ("threshold has shape [2]", "[3] (one per channel)")),
    "threshold None": (dict(x=X, threshold=None), TypeError, ("threshold is None", "wanted a number or a tensor")),
    "v_reset nan": (dict(x=X, v_reset=math.nan), ValueError, ("v_reset is nan", "finite")),
    "v_reset a word": (dict(x=X, v_reset="r"), TypeError, ("v_reset is 'r'", "wanted a number")),
    "gain of another length": (dict(x=X, gain=torch.ones(3)), ValueError, ("gain has shape [3]", "wanted [4]")),
    "gain with channels": (dict(x=X, gain=torch.ones(4, 3)), ValueError, ("gain has shape [4, 3]", "wanted [4]")),
    "gain a number": (dict(x=X, gain=2.0), TypeError, ("gain is a float", "tensor")),
    "gain integers": (dict(x=X, gain=torch.ones(4, dtype=torch.int64)), TypeError, ("gain is int64", "gain.float()")),
    "charge unknown": (dict(x=X, charge="leak_inputs"), ValueError, ("charge 'leak_inputs' is unknown", "leak, leak_input, leak_state", "Did you mean 'leak_input'?")),
    "charge by its row": (dict(x=X, charge="leak_input_q"), ValueError, ("charge 'leak_input_q' is unknown", "wanted one of")),
    "fire unknown": (dict(x=X, fire="gauss"), ValueError, ("fire 'gauss' is unknown", "Did you mean 'gaussian'?")),
    "reset unknown": (dict(x=X, reset="Hard"), ValueError, ("reset 'Hard' is unknown", "Did you mean 'hard'?")),
    "reset None": (dict(x=X, reset=None), ValueError, ("reset None is unknown", "wanted one of hard, soft")),
    "backend unknown": (dict(x=X, backend="tritn"), ValueError, ("backend 'tritn' is unknown", "auto", "Did you mean 'triton'?")),
    "statistic unknown": (dict(x=X, statistics=("men",)), ValueError, ("statistic 'men' is unknown", "Did you mean 'mean'?")),
    "statistics a word": (dict(x=X, statistics="mean"), TypeError, ("wanted a tuple of names", "statistics=('mean',)")),
    "keep unknown": (dict(x=X, keep=("membranes",)), ValueError, ("keep 'membranes' is unknown", "Did you mean 'membrane'?")),
    "statistics without channels": (dict(x=torch.zeros(4, 2), statistics=("mean",)), ValueError, ("per channel", "[4, 2]", "x.unsqueeze(2)")),
    "rate of an integrator": (dict(x=X, fire="none", reset="none", statistics=("rate",)), ValueError, ("'rate' counts spikes", "leave it out")),
    "guard without its numbers": (dict(x=X, statistics=("guard",)), ValueError, ("guard=(delta, power)", "only one of them")),
    "guard without its name": (dict(x=X, guard=(0.3, 2)), ValueError, ("guard=(delta, power)", "only one of them")),
    "guard a number": (dict(x=X, statistics=("guard",), guard=0.3), TypeError, ("guard is 0.3", "wanted (delta, power)", "(0.25, 2)")),
    "guard of three": (dict(x=X, statistics=("guard",), guard=(0.3, 2, 1)), TypeError, ("wanted (delta, power)",)),
    "guard power three": (dict(x=X, statistics=("guard",), guard=(0.3, 3)), ValueError, ("power 0, 1 or 2",)),
    "guard delta zero": (dict(x=X, statistics=("guard",), guard=(0.0, 2)), ValueError, ("delta > 0",)),
    "guard delta nan": (dict(x=X, statistics=("guard",), guard=(math.nan, 2)), ValueError, ("delta > 0",)),
    "surrogate a name": (dict(x=X, surrogate="triangle"), TypeError, ("surrogate is 'triangle'", "surrogates.Triangle(1.0)")),
    "surrogate a class": (dict(x=X, surrogate=surrogates.ATan), TypeError, ("wanted an instance", "surrogates.Triangle(1.0)")),
    "noise without gaussian": (dict(x=X, noise=0.4), ValueError, ("noise is 0.4", "fire='gaussian'")),
    "gaussian without noise": (dict(x=X, fire="gaussian"), ValueError, ("noise is 0.0", "wanted a number > 0")),
    "noise below zero": (dict(x=X, fire="gaussian", noise=-1.0), ValueError, ("noise is -1.0", "> 0")),
    "noise nan": (dict(x=X, fire="gaussian", noise=math.nan), ValueError, ("noise is nan", "finite")),
    "seed a float": (dict(x=X, fire="gaussian", noise=0.4, seed=1.5), TypeError, ("seed is 1.5", "an int of 64 bits", "None")),
    "seed a bool": (dict(x=X, fire="gaussian", noise=0.4, seed=True), TypeError, ("seed is True",)),
    "seed too wide": (dict(x=X, fire="gaussian", noise=0.4, seed=2**63), TypeError, ("64 bits",)),
    "seed a float tensor": (dict(x=X, fire="gaussian", noise=0.4, seed=torch.zeros(1)), ValueError, ("seed is float32", "wanted int64 [1]")),
    "seed of two": (dict(x=X, fire="gaussian", noise=0.4, seed=torch.zeros(2, dtype=torch.int64)), ValueError, ("seed is int64 [2]", "int64 [1]")),
    "first_step below zero": (dict(x=X, first_step=-1), ValueError, ("first_step is -1", "wanted an int >= 0")),
    "first_step a float": (dict(x=X, first_step=1.0), ValueError, ("first_step is 1.0", "int")),
    "an integrator that resets": (dict(x=X, fire="none"), ValueError, ("never spikes", "'hard'", "reset='none'")),
}


def assert_explains(error: BaseException, parts: tuple[str, ...]) -> None:
    text = str(error)
    assert not isinstance(error, AssertionError), "a bare assertion reached the user"
    for part in parts:
        assert part in text, f"{part!r} is not in: {text}"
    assert text.rstrip()[-1] in ".?!)", f"no sentence: {text}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend):
    arguments, kind, parts = BAD[name]
    with pytest.raises(kind) as caught:
        lif(**{"backend": backend, **arguments})
    assert_explains(caught.value, parts)
    assert str(caught.value).startswith("lif: ")


@pytest.mark.parametrize("name", ["decay of another shape", "steps of another x", "integers"])
def test_bad_input_raises_alike_for_auto(name):
    arguments, kind, parts = BAD[name]
    with pytest.raises(kind) as caught:
        lif(**arguments)
    assert_explains(caught.value, parts)


# ---- surrogates and adjoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (lambda: surrogates.Triangle(0.0), ValueError, ("Triangle: width is 0.0", "above 0")),
        (lambda: surrogates.Triangle(-1.0), ValueError, ("Triangle: width is -1.0", "above 0")),
        (lambda: surrogates.ATan(math.nan), ValueError, ("ATan: alpha is nan", "finite number above 0")),
        (lambda: surrogates.Gaussian(0.5, mean=math.inf), ValueError, ("Gaussian: mean is inf", "finite")),
        (lambda: surrogates.Exponential(1.0, 0.0), ValueError, ("Exponential: slope is 0.0", "above 0")),
        (lambda: surrogates.Sigmoid(torch.tensor(4)), TypeError, ("Sigmoid: slope is a torch.int64 tensor", "slope.float()")),
    ],
)  # fmt: skip
def test_bad_surrogates(make, kind, parts):
    with pytest.raises(kind) as caught:
        make()
    assert_explains(caught.value, parts)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_surrogate_of_another_shape(backend):
    x = X.clone().requires_grad_()
    spikes = lif(x, surrogate=surrogates.ATan(torch.ones(4)), backend=backend).spikes
    with pytest.raises(ValueError) as caught:
        spikes.sum().backward()
    assert_explains(caught.value, ("ATan", "shape [4]", "[3] (one per channel)"))


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        (("spacial",), ValueError, ("adjoint: 'spacial' is unknown", "bptt, bptr, spatial, hart, rga", "Did you mean 'spatial'?")),
        ((surrogates.Triangle,), TypeError, ("wanted a name", "surrogates.Triangle(1.0)", "callable")),
        ((3,), TypeError, ("got 3", "wanted a name")),
        (("spatial", "triangle"), TypeError, ("surrogate is a str", "fastsnn.surrogates")),
        ((surrogates.ATan(2.0), surrogates.ATan(2.0)), ValueError, ("surrogate goes with a name", "Drop one")),
    ],
)  # fmt: skip
def test_bad_adjoints(arguments, kind, parts):
    with pytest.raises(kind) as caught, adjoint(*arguments):
        pass
    assert_explains(caught.value, parts)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_rule_that_returns_no_surrogate(backend):
    x = X.clone().requires_grad_()
    spikes = lif(x, backend=backend).spikes
    with adjoint(lambda layer, mean, var: 0.5), pytest.raises(TypeError) as caught:
        spikes.sum().backward()
    assert_explains(caught.value, ("returned float", "fastsnn.surrogates"))


def test_a_second_derivative_names_the_cure():
    x = torch.rand(4, 2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(lif(x, backend="cpu").spikes.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(grad.sum(), x)
    assert_explains(caught.value, ("second derivative", "backend='reference'"))


# ---- backends ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unforced(monkeypatch):
    monkeypatch.delenv(backends.FORCE, raising=False)
    monkeypatch.delenv(backends.REQUIRE, raising=False)
    yield monkeypatch
    backends._ready.cache_clear()


def test_a_backend_that_cannot_serve_gives_every_reason(unforced, tmp_path):
    unforced.setitem(backends.BACKENDS, "cpu", backends.CPU(tmp_path / "none.so"))
    with pytest.raises(RuntimeError) as caught:
        lif(X, backend="cpu")
    text = str(caught.value)
    assert "backend 'cpu' cannot serve this call" in text and "does not load" in text and "Reinstall" in text
    for other in set(backends.BACKENDS) - {"cpu"}:
        assert f"\n  {other}: " in text


def test_a_tensor_on_another_device():
    with pytest.raises(RuntimeError) as caught:
        lif(torch.zeros(2, 3, device="meta"), backend="cpu")
    assert "x is on meta" in str(caught.value) and "x.cpu()" in str(caught.value)


def test_kernels_required_and_none_there(unforced, tmp_path):
    unforced.setenv(backends.REQUIRE, "1")
    for name in ("cuda", "triton", "cpu"):
        unforced.setitem(backends.BACKENDS, name, backends.CPU(tmp_path / "none.so"))
    backends._ready.cache_clear()
    with pytest.raises(RuntimeError) as caught:
        lif(X)
    text = str(caught.value)
    assert backends.REQUIRE in text and "no compiled backend" in text and text.count("does not load") == 3


def test_auto_falls_back_and_can_say_why(unforced, tmp_path):
    for name in ("cuda", "triton", "cpu"):
        unforced.setitem(backends.BACKENDS, name, backends.CPU(tmp_path / "none.so"))
    backends._ready.cache_clear()
    assert not lif(X).spikes.any()
    text = backends.why(X)
    assert "auto takes 'reference'" in text and "does not load" in text


def test_a_forced_backend_is_taken_and_checked(unforced):
    unforced.setenv(backends.FORCE, "reference")
    assert backends.resolve("auto", X).name == "reference"
    unforced.setenv(backends.FORCE, "refrence")
    with pytest.raises(ValueError) as caught:
        lif(X)
    assert_explains(caught.value, ("backend 'refrence' is unknown", "Did you mean 'reference'?"))


# ---- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (lambda: LIF(learn=("treshold",)), ValueError, ("LIF: learn names 'treshold'", "decay, threshold", "Did you mean 'threshold'?")),
        (lambda: LIF(learn=("tau",)), ValueError, ("learn names 'tau'", "decay, threshold")),
        (lambda: LIF(learn="decay"), TypeError, ("tuple of names", "learn=('decay',)")),
        (lambda: LIF(learn=None), TypeError, ("learn is None", "wanted a tuple of names")),
        (lambda: LIF(decay=1.5, learn=("decay",)), ValueError, ("decay is 1.5", "[0, 1]")),
        (lambda: LIF(tau=0.5, charge="leak_input", learn=("tau",)), ValueError, ("tau is 0.5", "> 1")),
        (lambda: LIF(threshold=math.nan, learn=("threshold",)), ValueError, ("threshold is nan", "finite")),
        (lambda: LIF(merged=True), ValueError, ("merged=True", "set steps=T")),
        (lambda: LIF(steps=0), ValueError, ("steps is 0", "int >= 1")),
        (lambda: LIF(decay=2.0), ValueError, ("decay is 2.0", "[0, 1]")),
        (lambda: LIF(tau=2.0), ValueError, ("takes decay",)),
        (lambda: LIF(reset="hrad"), ValueError, ("reset 'hrad' is unknown", "Did you mean 'hard'?")),
        (lambda: LIF(fire="g"), ValueError, ("fire 'g' is unknown", "wanted one of")),
        (lambda: LIF(charge="leaky"), ValueError, ("charge 'leaky' is unknown", "Did you mean 'leak'?")),
        (lambda: LIF(backend="gpu"), ValueError, ("backend 'gpu' is unknown", "wanted one of")),
        (lambda: LIF(surrogate="atan"), TypeError, ("surrogate is 'atan'", "instance")),
        (lambda: IF(threshold=math.nan), ValueError, ("threshold is nan", "finite")),
        (lambda: NoisyLIF(sigma=0.0), ValueError, ("noise is 0.0", "> 0")),
        (lambda: ParametricLIF(init_tau=1.0), ValueError, ("tau is 1.0", "> 1")),
        (lambda: LI(decay=-1.0), ValueError, ("decay is -1.0", "[0, 1]")),
    ],
)  # fmt: skip
def test_bad_layers(make, kind, parts):
    with pytest.raises(kind) as caught:
        make()
    assert_explains(caught.value, parts)


def test_bad_input_of_layers():
    with pytest.raises(ValueError) as caught:
        LIF(merged=True, steps=4)(torch.zeros(6, 3))
    assert_explains(caught.value, ("LIF: x has shape [6, 3]", "[T*N, C, *S]", "steps = 4"))
    with pytest.raises(ValueError) as caught:
        LIF(merged=True, steps=4)(torch.zeros(4))
    assert_explains(caught.value, ("shape [4]", "[T*N, C, *S]"))
    with pytest.raises(ValueError) as caught:
        LIF()(torch.zeros(4, 2), statistics=("mean",))
    assert_explains(caught.value, ("statistics are per channel",))


def test_a_state_of_another_batch():
    layer = LIF(stateful=True)
    layer(torch.zeros(4, 2, 3))
    with pytest.raises(ValueError) as caught:
        layer(torch.zeros(4, 5, 3))
    assert_explains(caught.value, ("state that it holds has shape [2, 3]", "a step of x [5, 3]", "forget()"))


class Steeper(surrogates.Triangle):
    """A row's class with another derivative."""

    def derivative(self, z, a, b):
        return 2 * super().derivative(z, a, b)


class Unknown(surrogates.Surrogate):
    """No row's class."""

    def derivative(self, z, a, b):
        return torch.ones_like(z)


@pytest.mark.parametrize("kind", [Steeper, Unknown])
def test_surrogates_that_no_kernel_knows(kind):
    x = torch.randn(4, 2, 3).requires_grad_()
    with pytest.raises(TypeError) as caught:
        lif(x, surrogate=kind(), backend="cpu")
    assert_explains(caught.value, (f"no row for the surrogate {kind.__name__}", "Triangle, Rectangle", "backend='reference'", "CONTRIBUTING"))
    for _ in range(3):  # by the operator, and by a plan
        out = lif(x, backend="cpu")
        with adjoint(kind()), pytest.raises(TypeError) as caught:
            out.spikes.sum().backward()
        assert_explains(caught.value, (f"no row for the surrogate {kind.__name__}", "backend='reference'"))
    lif(x, surrogate=kind(), backend="reference").spikes.sum().backward()
    assert x.grad.any()


def test_noise_in_more_dimensions_than_a_kernel_counts():
    x = torch.randn(3, *[2] * 10).permute(0, *range(10, 0, -1))
    assert torch.equal(lif(x, backend="cpu").spikes, lif(x, backend="reference").spikes)
    with pytest.raises(ValueError) as caught:
        lif(x, fire="gaussian", noise=1.0, backend="cpu")
    assert_explains(caught.value, ("steps of 10 dimensions", "at most 8", "x.contiguous()"))


def test_bad_records():
    layer = LIF()
    with record(layer, "guard", guard=(1.0, 2)), pytest.raises(ValueError) as caught:
        layer(torch.zeros(4, 2, 3), statistics=("guard",), guard=(0.1, 0))
    assert_explains(caught.value, ("guard is asked for with (0.1, 0)", "by fastsnn.record, with (1.0, 2)"))
    with pytest.raises(ValueError) as caught, record(torch.nn.Linear(2, 2), "mean"):
        pass
    assert_explains(caught.value, ("Linear holds no fastsnn layer", "wanted a model"))
    with pytest.raises(ValueError) as caught, record(LIF()):
        pass
    assert_explains(caught.value, ("no statistic is named", "mean, var, rate, guard"))
