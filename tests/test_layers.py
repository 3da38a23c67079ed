"""The modules: what they hold, what they pass in and out, and that they are `lif` and nothing more."""

import copy
import io
import pickle

import pytest
import torch
from cases import assert_same_bits
from fastsnn import IF, LI, LIF, Neuron, NoisyLIF, ParametricLIF, adjoint, lif, record, surrogates
from torch import Tensor, nn

STEPS, SHAPE = 6, (3, 4, 5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.4


X = draw(STEPS, *SHAPE)


def noisy(**options) -> NoisyLIF:
    layer = NoisyLIF(0.4, **options)
    layer.seed = 7
    return layer


#: Every layer, and the call of `lif` that it stands for.
LAYERS = {
    "LIF": (LIF, {"decay": 0.5}),
    "LIF with decay": (lambda **o: LIF(decay=0.9, threshold=0.7, reset="soft", **o), {"decay": 0.9, "threshold": 0.7, "reset": "soft"}),
    "LIF with tau": (lambda **o: LIF(tau=2.0, charge="leak_input", **o), {"tau": 2.0, "charge": "leak_input"}),
    "LIF with tensors": (
        lambda **o: LIF(decay=torch.full((4,), 0.8), threshold=torch.ones(1, 4, 5), **o),
        {"decay": torch.full((4,), 0.8), "threshold": torch.ones(1, 4, 5)},
    ),
    "IF": (IF, {"decay": 1.0}),
    "IF with v_reset": (lambda **o: IF(v_reset=-0.5, detach_reset=True, **o), {"decay": 1.0, "v_reset": -0.5, "detach_reset": True}),
    "ParametricLIF": (ParametricLIF, {"inverse_tau": 0.5, "charge": "leak_input"}),
    "ParametricLIF on the state": (lambda **o: ParametricLIF(2.0, decay_input=False, **o), {"inverse_tau": 0.5, "charge": "leak_state"}),
    "NoisyLIF": (noisy, {"decay": 0.5, "fire": "gaussian", "noise": 0.4, "seed": 7, "surrogate": surrogates.Gaussian(0.4)}),
    "LI": (lambda **o: LI(0.8, **o), {"decay": 0.8, "reset": "none", "fire": "none"}),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_a_layer_is_a_call_of_lif(name):
    make, options = LAYERS[name]
    weight, found = draw(STEPS, *SHAPE, seed=1), []
    for run in (make(), lambda x: lif(x, **options).spikes):
        x = X.clone().requires_grad_()
        spikes = run(x)
        found += [(spikes, torch.autograd.grad(spikes, x, weight)[0])]
    (spikes, grad), (want, want_grad) = found
    assert isinstance(spikes, Tensor)
    assert_same_bits("spikes", spikes.detach(), want.detach())
    assert_same_bits("gradient", grad, want_grad)


@every_layer
def test_state_in_state_out(name):
    layer = LAYERS[name][0]()
    v0 = draw(*SHAPE, seed=2)
    spikes, v = layer(X, v0)
    assert v.shape == torch.Size(SHAPE) and v.dtype == torch.float32
    if name != "NoisyLIF":  # whose parts would need first_step
        first, middle = layer(X[:2], v0)
        second, end = layer(X[2:], middle)
        assert_same_bits("spikes", torch.cat([first, second]).detach(), spikes.detach())
        assert_same_bits("v", end.detach(), v.detach())
    assert layer.v is None, "a layer kept a state that nobody asked it to keep"
    both = layer(X, return_state=True)
    assert len(both) == 2 and isinstance(layer(X, v0, return_state=False), Tensor)


@every_layer
def test_merged_steps(name):
    make = LAYERS[name][0]
    plain, merged = make(), make(steps=STEPS, merged=True)
    spikes, v = plain(X, return_state=True)
    flat, flat_v = merged(X.flatten(0, 1), return_state=True)
    assert flat.shape == (STEPS * SHAPE[0], *SHAPE[1:])
    assert_same_bits("spikes", flat.detach(), spikes.flatten(0, 1).detach())
    assert_same_bits("v", flat_v.detach(), v.detach())


def test_simulate_returns_everything():
    layer = LIF(decay=0.9, steps=STEPS, merged=True)
    out, want = layer.simulate(X.flatten(0, 1), statistics=("mean",), keep=("membrane",)), lif(X, decay=0.9, statistics=("mean",), keep=("membrane",))
    for name in ("spikes", "v", "membrane"):
        assert_same_bits(name, getattr(out, name), getattr(want, name))
    assert_same_bits("mean", out.statistics.mean, want.statistics.mean)


def test_merged_steps_keep_channels_last():
    x = draw(STEPS * 2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    spikes = LIF(steps=STEPS, merged=True)(x)
    assert spikes.is_contiguous(memory_format=torch.channels_last)


def test_constant_current():
    layer = LIF(steps=STEPS)
    assert_same_bits("spikes", layer(X[:1]), LIF()(X[:1].repeat(STEPS, 1, 1, 1)))


def test_statistics_are_returned_in_order():
    layer = LIF()
    spikes, statistics = layer(X, statistics=("mean", "rate"))
    assert statistics.mean.shape == statistics.rate.shape == (STEPS, SHAPE[1])
    assert statistics.var is None and statistics.guard is None
    spikes, v, statistics = layer(X, draw(*SHAPE), ("guard",), (0.3, 2))
    assert v.shape == torch.Size(SHAPE) and statistics.guard.shape == (STEPS, SHAPE[1])


# ---- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [("decay",), ("threshold",), ("decay", "threshold"), ("tau",)], ids=str)
def test_learned_values_are_parameters_and_move(learn):
    layer = LIF(learn=learn, **({"tau": 2.0, "charge": "leak_state"} if "tau" in learn else {}))
    assert {name for name, _ in layer.named_parameters()} == set(learn)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimiser = torch.optim.SGD(layer.parameters(), lr=1e-2)
    layer(X).sum().backward()
    optimiser.step()
    for name, value in layer.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and (value != before[name]).all()


def test_learned_tensors():
    start = torch.full((4,), 0.8)
    layer = LIF(decay=start, threshold=torch.ones(1, 4, 5), learn=("decay", "threshold"))
    layer(X).sum().backward()
    assert layer.decay.grad.shape == (4,) and layer.threshold.grad.shape == (1, 4, 5)
    with torch.no_grad():
        layer.decay.add_(1)
    assert (start == 0.8).all(), "the layer learns in the caller's tensor"


def test_parametric_lif_learns_its_time_constant():
    layer = ParametricLIF(init_tau=4.0)
    assert {name for name, _ in layer.named_parameters()} == {"w"}
    assert abs(1 / layer.w.sigmoid().item() - 4.0) < 1e-5
    layer(X).sum().backward()
    assert layer.w.grad.isfinite() and layer.w.grad != 0


def test_tensors_that_are_not_learned_are_buffers():
    layer = LIF(decay=torch.full((4,), 0.8))
    assert not list(layer.parameters()) and set(layer.state_dict()) == {"decay"}


# ---- copies ------------------------------------------------------------------------------------------------------------


def copies(layer: nn.Module) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@every_layer
def test_copies_are_equal_and_their_own(name):
    layer = LAYERS[name][0]()
    layer(X)
    want = layer(X).detach()
    for how, other in copies(layer).items():
        assert_same_bits(how, other(X).detach(), want)
        assert repr(other) == repr(layer) and other._number != layer._number


def test_a_copy_amid_a_sequence_goes_on_where_its_original_does():
    layer = LIF(decay=0.9, stateful=True, learn=("decay",))
    layer(X).sum().backward()
    held = copies(layer)
    assert layer.v.requires_grad
    want = layer(X).detach()
    for how, other in held.items():
        assert not other.v.requires_grad
        assert_same_bits(how, other(X).detach(), want)
        assert_same_bits(f"{how}: state", other.v.detach(), layer.v.detach())


def test_an_adjoint_tells_a_copy_from_its_original():
    original = LIF(surrogate=surrogates.ATan(2.0))
    layers = [original, *copies(original).values()]
    for layer in layers:
        x, seen = X.clone().requires_grad_(), []
        with adjoint(lambda which, mean, var: (seen.append(which), surrogates.ATan(2.0))[1]):
            layer(x).sum().backward()
        assert seen == [layer]


@every_layer
def test_state_dict_round_trip(name):
    make = LAYERS[name][0]
    layer, other = make(), make()
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.mul_(0.9)
    other.load_state_dict(layer.state_dict())
    assert_same_bits("spikes", other(X).detach(), layer(X).detach())


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(name, dtype):
    layer = LAYERS[name][0]().to(dtype)
    spikes, v = layer(X.to(dtype), return_state=True)
    assert spikes.dtype == dtype and v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    mixed = LAYERS[name][0]()(X.to(dtype))  # parameters in float32, x not
    assert mixed.dtype == dtype


# ---- held state --------------------------------------------------------------------------------------------------------


def test_a_stateful_layer_goes_on_and_forgets():
    layer = LIF(decay=0.9, stateful=True)
    whole = LIF(decay=0.9)(X)
    parts = torch.cat([layer(X[:2]), layer(X[2:])])
    assert_same_bits("spikes", parts, whole)
    assert_same_bits("after that", layer(X), lif(X, LIF(decay=0.9)(X, return_state=True)[1], decay=0.9).spikes)
    layer.forget()
    assert layer.v is None
    assert_same_bits("from the start", layer(X), whole)
    assert "stateful=True" in repr(layer) and "v" not in layer.state_dict()


def test_a_state_that_is_passed_counts_more_than_the_held_one():
    layer, v0 = LIF(stateful=True), draw(*SHAPE, seed=3)
    layer(X)
    spikes, v = layer(X, v0)
    assert_same_bits("spikes", spikes, lif(X, v0, decay=0.5).spikes)
    assert_same_bits("held", layer.v, v)


# ---- noise -------------------------------------------------------------------------------------------------------------


def test_seeds():
    layer = NoisyLIF(0.4)
    torch.manual_seed(0)
    first, second = layer(X), layer(X)
    torch.manual_seed(0)
    assert_same_bits("torch's generator decides", layer(X), first)
    assert (first != second).any()
    layer.seed = 7
    fixed = layer(X)
    assert_same_bits("a fixed seed", layer(X), fixed)
    layer.seed = torch.tensor([7])
    assert_same_bits("the same as a tensor", layer(X), fixed)
    assert isinstance(NoisyLIF(0.4).surrogate, surrogates.Gaussian)


# ---- repr --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (LIF(), "LIF(decay=0.5, threshold=1, charge=leak, fire=ge, reset=hard, surrogate=Triangle(width=1, height=1))"),
        (LIF(0.9, torch.ones(4), learn=("decay",)), "LIF(decay=0.9 (learned), threshold=tensor[4], charge=leak,"),
        (IF(v_reset=-1.0, detach_reset=True), "v_reset=-1, surrogate=Triangle(width=1, height=1), detach_reset=True)"),
        (LIF(steps=4, merged=True, backend="cpu"), "steps=4, merged=True, backend='cpu')"),
        (NoisyLIF(0.4), "noise=0.4, surrogate=Gaussian(sigma=0.4, mean=0))"),
        (LI(0.8), "LI(decay=0.8, threshold=1, charge=leak, fire=none, reset=none)"),
        (ParametricLIF(4.0), "ParametricLIF(tau=4 (learned), threshold=1, charge=leak_input,"),
        (LIF(surrogate=surrogates.ATan(torch.ones(4), relative=True)), "surrogate=ATan(alpha=tensor[4], relative=True)"),
    ],
)
def test_repr(layer, text):
    assert text in repr(layer)


def test_layers_without_memory():
    with torch.device("meta"):
        layers = [LIF(learn=("threshold",)), ParametricLIF(), LIF(threshold=torch.ones(()))]
    assert [name in repr(layer) for name, layer in zip(("threshold=tensor[] (learned)", "tau=tensor[] (learned)", "threshold=tensor[]"), layers)] == [True] * 3


# ---- somebody else's model ---------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A model that knows nothing of statistics, and calls one of its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = LIF(decay=0.9), nn.Sequential(nn.Linear(5, 5), IF())

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.body(self.first(x)))


def test_record():
    torch.manual_seed(0)
    model, x = Foreign(), X.clone().requires_grad_()
    plain = model(x)
    with record(model, "mean", "var") as found:
        recorded = model(x)
    assert_same_bits("spikes", recorded.detach(), plain.detach())
    assert {name: len(calls) for name, calls in found.items()} == {"first": 2, "body.1": 1}
    _, want = model.first(x, statistics=("mean", "var"))
    assert_same_bits("mean", found["first"][0].mean.detach(), want.mean.detach())
    assert found["first"][0].rate is None
    sum(call.var.sum() for calls in found.values() for call in calls).backward()
    assert x.grad.any() and model.body[0].weight.grad.any()
    model(x)
    assert sum(map(len, found.values())) == 3, "recorded outside of the block"


def test_record_nests_and_leaves_nothing_behind():
    model = Foreign()
    with record(model, "mean") as outer:
        model(X)
        with record(model.body, "guard", guard=(0.3, 2)) as inner:
            model(X)
        with pytest.raises(KeyError):
            with record(model, "rate"):
                raise KeyError
        model(X)
    assert all(not layer._records for layer in model.modules() if isinstance(layer, Neuron))
    assert len(outer["body.1"]) == 3 and len(outer["first"]) == 6  # each block collects for itself
    assert inner["1"][0].guard is not None and inner["1"][0].mean is None


def test_record_of_a_model_with_a_readout_that_never_fires():
    model = nn.Sequential(LIF(), LI())
    with record(model, "mean", "rate") as found:
        model(X)
    assert found["0"][0].rate is not None and found["1"][0].rate is None and found["1"][0].mean is not None


def test_record_beside_statistics_that_are_returned():
    layer = LIF()
    with record(nn.Sequential(layer), "mean") as found:
        spikes, statistics = layer(X, statistics=("var",))
    assert statistics.var is not None and statistics.mean is None
    assert found["0"][0].mean is not None
