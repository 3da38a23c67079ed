"""Neurons of single papers against loops in plain PyTorch, in networks and under attack; the defenses that are about them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fastsnn import adjoint, checkpoints, models
from fastsnn.attacks import PGD
from fastsnn.attacks.adaptive import Adaptive, Pass
from fastsnn.attacks.expectation import RANDOM_EOT, default_eot, is_random
from fastsnn.defenses import AT, DEFENSES, FEEL, StoG, make_defense
from fastsnn.encodings import Frequency
from fastsnn.models import NEURONS, count_neurons, count_parameters, twin
from fastsnn.paper_neurons import EPSILON, DynamicLIF, EvolutionaryLIF, Fitted, GatedLIF
from fastsnn.recipes import Config
from fastsnn.runs import build_optimizer
from fastsnn.surrogates import ATan
from fastsnn.training import train
from plain import Triangle
from torch import Tensor, nn

STEPS, CLASSES, IMAGE = 4, 3, (2, 8, 8)
FITTED = [name for name, kind in NEURONS.items() if issubclass(kind.make, Fitted)]
NETWORKS = [name for name, defense in DEFENSES.items() if defense.needs and name != "hire"]  # HIRE has further conditions
every_neuron = pytest.mark.parametrize("neuron", FITTED)
every_network = pytest.mark.parametrize("name", NETWORKS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(model: str = "small_cnn", **options) -> nn.Module:
    torch.manual_seed(0)
    widths = {"widths": (4, 8)} if model == "small_cnn" else {}
    return models.build(model, **{"image": IMAGE, "classes": CLASSES, "steps": STEPS, **widths, **options})


X, Y = draw(6, *IMAGE).sigmoid(), torch.arange(6) % CLASSES


# ---- the layers --------------------------------------------------------------------------------------------------------


def plain(x: Tensor, leak, weight, reset: str) -> tuple[Tensor, Tensor]:
    """Spikes and the last state, step by step; leak and weight are asked for the step t."""
    v, spikes = torch.zeros_like(x[0]), []
    for t in range(len(x)):
        h = leak(t) * v + weight(t) * x[t]
        s = Triangle.apply(h - 1)
        v = h * (1 - s) if reset == "hard" else h - s
        spikes.append(s)
    return torch.stack(spikes), v


def assert_near(what: str, found: Tensor, wanted: Tensor, scale: float = 1e-12) -> None:
    assert found.shape == wanted.shape, (what, found.shape, wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=scale, atol=scale, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("shape", [(3, 5, 4), (7,)])
@pytest.mark.parametrize("kind", [EvolutionaryLIF, DynamicLIF])
def test_the_recurrence_and_all_its_gradients(kind, shape, reset):
    layer = kind(reset=reset)
    layer.fit(STEPS, shape, draw(1))
    with torch.no_grad():
        own = getattr(layer, layer.own)
        assert own.shape == ((STEPS, *shape) if kind is EvolutionaryLIF else (STEPS,)) and (own == 1).all()
        own.copy_(1 + 0.3 * draw(*own.shape, seed=1))
    x, weights, last = draw(STEPS, 2, *shape, seed=2) * 1.5, draw(STEPS, 2, *shape, seed=3), draw(2, *shape, seed=4)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    values = own.detach().clone().requires_grad_()
    leak, weight = ((lambda t: values[t]), lambda t: 1.0) if kind is EvolutionaryLIF else ((lambda t: 0.99), lambda t: values[t])
    spikes, v = plain(theirs, leak, weight, reset)
    found, state = layer(ours, return_state=True)
    assert 0.1 < spikes.mean() < 0.9
    assert_near("spikes", found, spikes)
    assert_near("state", state, v)
    ((spikes * weights).sum() + (v * last).sum()).backward()
    ((found * weights).sum() + (state * last).sum()).backward()
    assert_near("gradient of x", ours.grad, theirs.grad)
    assert_near(f"gradient of {layer.own}", own.grad, values.grad)


def gate_of(shape: tuple[int, ...], r: Tensor, seed: int = 7, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """Gates and their relaxation for the random numbers of a seed, as the paper writes them."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = torch.nn.functional.hardtanh(r, 0.1, 1.0)
    odds = p / (1 - p + EPSILON) * u / (1 - u + EPSILON)
    return (odds.log() >= 0).double(), 1 / (1 + odds ** (-1 / temperature))


def gated(shape: tuple[int, ...], low: float = 0.15, high: float = 0.95, **options) -> GatedLIF:
    """A layer with gates between low and high, and the same random numbers at each call."""
    layer = GatedLIF(**options)
    layer.fit(STEPS, shape, draw(1))
    layer.seed = 7
    with torch.no_grad():
        layer.r.copy_(low + (high - low) * draw(*shape).sigmoid())
    return layer


@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_the_gates_gradient_is_that_of_the_concrete_relaxation(temperature):
    layer, x = gated((3, 4), temperature=temperature), 1.5 * draw(STEPS, 5, 3, 4, seed=1)
    weights = draw(STEPS, 5, 3, 4, seed=2)
    spikes, _ = plain(x, lambda t: 1.0, lambda t: 1.0, "hard")
    found = layer(x)
    assert_near("gated spikes", found, spikes * gate_of(x.shape, layer.r.detach())[0])
    (found * weights).sum().backward()

    def relaxed(r: Tensor) -> Tensor:
        return (spikes * weights * gate_of(x.shape, r, temperature=temperature)[1]).sum()

    step, r = 1e-6, layer.r.detach()
    numeric = torch.zeros_like(r)
    for place in range(r.numel()):
        e = torch.zeros_like(r)
        e.view(-1)[place] = step
        numeric.view(-1)[place] = (relaxed(r + e) - relaxed(r - e)) / (2 * step)
    assert numeric.abs().min() > 1e-4
    assert_near("gradient of r", layer.r.grad, numeric, 1e-6)


def test_the_gradient_of_the_input_passes_open_gates_only():
    layer, x, weights = gated((3, 4)), 1.5 * draw(STEPS, 5, 3, 4, seed=1), draw(STEPS, 5, 3, 4, seed=2)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    (plain(theirs, lambda t: 1.0, lambda t: 1.0, "hard")[0] * gate_of(x.shape, layer.r.detach())[0] * weights).sum().backward()
    (layer(ours) * weights).sum().backward()
    assert_near("gradient of x", ours.grad, theirs.grad)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7, 1.0])
def test_gates_open_with_their_probability_in_eval_mode_too(p):
    layer, count = GatedLIF().eval(), 50_000
    layer.fit(STEPS, (10,), draw(1))
    with torch.no_grad():
        layer.r.fill_(p if p > 0.1 else -3.0)  # below the least probability it is the least
        torch.manual_seed(3)
        opened = layer(torch.full((STEPS, count // 40 // STEPS * 4, 10), 2.0, dtype=torch.float64))
    k = (1 - p + EPSILON) / p  # open where u/(1 - u + e) >= k
    wanted = 1 - k * (1 + EPSILON) / (1 + k)
    error = math.sqrt(wanted * (1 - wanted) / opened.numel())
    assert abs(opened.mean().item() - wanted) < 5 * error + 1e-9
    for dim in range(3):  # fresh for each step, sample and neuron
        assert p == 1.0 or not torch.equal(opened.select(dim, 0), opened.select(dim, 1))


def test_gates_repeat_with_a_seed_and_differ_without():
    layer, x = gated((10,)), torch.full((STEPS, 8, 10), 2.0, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x))
    layer.seed = None
    assert not torch.equal(layer(x), layer(x))


def test_at_its_bounds_a_gate_still_learns():
    layer = GatedLIF()
    layer.fit(STEPS, (3,), draw(1))
    with torch.no_grad():
        layer.r.copy_(torch.tensor([1.0, 0.1, 1.5]))
    layer.probability.sum().backward()
    assert layer.r.grad.tolist() == [1, 1, 0]


def test_statistics_are_those_before_the_gate():
    layer, x = gated((3, 4), high=0.5), 1.5 * draw(STEPS, 5, 3, 4, seed=1)
    passed, statistics = layer(x, statistics=("rate",))
    spikes, _ = plain(x, lambda t: 1.0, lambda t: 1.0, "hard")
    assert_near("rate", statistics.rate, spikes.mean((1, 3)))
    assert passed.sum() < 0.7 * spikes.sum()


@every_neuron
def test_a_layer_of_ones_own_takes_its_shape_from_the_first_call_or_from_what_it_loads(neuron):
    first, second = NEURONS[neuron].make(), NEURONS[neuron].make()
    assert not list(first.parameters()) and "learned" in repr(first)
    x = 1.5 * draw(STEPS, 2, 3, 4)
    first.seed = second.seed = 3
    first(x)
    with torch.no_grad():
        for value in first.parameters():
            assert value.dtype == torch.float64
            value.copy_(0.5 + 0.2 * torch.rand(value.shape))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x)) and repr(first) == repr(second)
    with pytest.raises(ValueError, match="shape"):
        first(draw(STEPS, 2, 3, 5) if neuron != "dlif" else draw(STEPS + 1, 2, 3, 4))


# ---- in networks -------------------------------------------------------------------------------------------------------


def maps_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of one step of each spiking layer's output, by its name."""
    found = {}
    layers = model.spiking_layers()
    handles = [layer.register_forward_hook(lambda _, args, out, name=name: found.update({name: tuple(out.shape[2:])})) for name, layer in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *model.image))
    for handle in handles:
        handle.remove()
    return found


@every_neuron
@pytest.mark.parametrize("options", [{"norm": "bntt"}, {"model": "resnet20"}])
def test_a_network_has_the_parameters_of_its_maps(neuron, options):
    plainly, model = network(neuron="if", **options), network(neuron=neuron, **options)
    maps = maps_of(plainly)
    wanted = {"feel": lambda shape: (STEPS, *shape), "dlif": lambda shape: (STEPS,), "stog": lambda shape: shape}[neuron]
    own = {name: wanted(shape) for name, shape in maps.items()}
    assert {name: tuple(getattr(layer, layer.own).shape) for name, layer in model.spiking_layers()} == own
    assert count_neurons(model) == count_neurons(plainly)
    assert count_parameters(model) == count_parameters(plainly) + sum(math.prod(shape) for shape in own.values())
    assert model.training and all(layer.training for layer in model.modules())
    for name, value in plainly.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), f"{name}: making the parameters changed it"
    names = {name for name, _ in plainly.named_parameters()}
    assert {name for name, _ in twin(model).named_parameters()} == names, "the twin has ReLU, and no parameters of neurons"


@every_neuron
def test_a_network_is_built_again_and_copied(neuron):
    model = network(neuron=neuron).double()
    with torch.no_grad():
        for _, layer in model.spiking_layers():
            getattr(layer, layer.own).mul_(0.8)
            layer.seed = 5
    again = models.build(**model.spec).double()
    again.load_state_dict(model.state_dict())
    twice = copy.deepcopy(model)
    for _, layer in again.spiking_layers():
        layer.seed = 5
    assert torch.equal(model(X), again(X)) and torch.equal(model(X), twice(X))
    twice(X).sum().backward()
    assert all(value.grad is None for value in model.parameters()) and all(value.grad is not None for value in twice.parameters())


class Constant(Adaptive):
    """A surrogate of its own for each sample: the same for all."""

    per_sample = True

    def surrogate(self, z: Tensor, state: dict, run: Pass) -> ATan:
        return ATan(torch.full_like(z, 2.0))


@every_neuron
def test_a_surrogate_for_each_sample_sees_the_same_network(neuron):
    model = network(neuron=neuron).double().eval()
    with torch.no_grad():
        for place, (_, layer) in enumerate(model.spiking_layers()):
            own = getattr(layer, layer.own)
            own.sub_(0.4 * draw(*own.shape, seed=place).sigmoid())
            layer.seed = 5

    def gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
        x = X.clone().requires_grad_()
        logits = model(x)
        return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, Y), x)[0]

    with adjoint(ATan(2.0)):
        logits, wanted = gradient(model)
    with Constant().forward(model, Pass(samples=len(X))) as folded:
        same, found = gradient(folded)
    assert torch.equal(same, logits) and wanted.abs().max() > 0
    assert_near("gradient", found, wanted)


@every_neuron
@pytest.mark.parametrize("approximation", [None, "bptr", "pdsg", "assg", "cba"])
def test_attacks_run_on_it(neuron, approximation):
    model = network(neuron=neuron).eval()
    x = X.float()
    attack = PGD(8 / 255, steps=2, eot=2 if is_random(model) else 1, adjoint=approximation, seed=1)
    found = attack(model, x, Y)
    assert 0 < (found - x).abs().max() <= 8 / 255 + 1e-6


def test_which_are_random():
    for name in NEURONS:
        assert is_random(network(neuron=name)) == (name in ("stog", "noisy"))
    for name in NETWORKS:
        random = name != "feel"
        assert default_eot(network(**DEFENSES[name].needs)) == (RANDOM_EOT if random else 1)


@pytest.mark.parametrize("size", [8, 9])
def test_all_frequencies_return_the_image(size):
    images = draw(2, 3, size, size)
    encoded = Frequency(STEPS, radii=((size + 1) // 2,) * STEPS)(images)
    assert_near("|x|", encoded, images.abs().expand(STEPS, -1, -1, -1, -1))


# ---- the defenses ------------------------------------------------------------------------------------------------------


@every_network
def test_it_trains_its_network_and_refuses_others(name):
    defense = make_defense(name)
    model = network(**defense.needs).double()
    defense.prepare(model)
    model.encoding.seed = 2
    for _, layer in model.spiking_layers():
        layer.seed = 2
    outcome = defense.step(model, X, Y)
    wanted = F.cross_entropy(model(X), Y)
    assert outcome.terms["task"].item() == pytest.approx(wanted.item(), rel=1e-12)
    outcome.loss.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())
    with pytest.raises(ValueError) as caught:
        defense.prepare(network())
    for option, value in defense.needs.items():
        assert f"{option}={value!r}" in str(caught.value)
    word = next(iter(defense.needs))
    assert f"--{word} {defense.needs[word]}" in str(caught.value)
    if name != "stog":
        with pytest.raises(ValueError, match="it is not known how it was made"):
            defense.prepare(nn.Linear(2, 2))


@every_network
def test_it_adds_up_with_adversarial_training(name):
    model, defense = network(**DEFENSES[name].needs), make_defense(name) + AT()
    defense.prepare(model)
    assert defense.step(model, X.float(), Y).loss.isfinite()


def test_only_what_is_missing_is_asked_for():
    with pytest.raises(ValueError) as caught:
        FEEL().prepare(network(neuron="feel"))
    assert "encoding='frequency'" in str(caught.value) and "neuron" not in str(caught.value)


def test_the_prior_of_stog_and_its_schedule():
    model = network(neuron="stog").double()
    gates = [layer.r for _, layer in model.spiking_layers()]
    with torch.no_grad():
        for place, r in enumerate(gates):
            r.copy_(0.2 + 0.7 * draw(*r.shape, seed=place).sigmoid())
    defense = StoG(gamma=0.01, until=0.25)
    wanted = 0.005 * sum((r.detach() ** 2).sum().item() for r in gates)
    for progress, weight in ((0.0, 1), (0.24, 1), (0.25, 0), (1.0, 0)):
        outcome = defense.step(model, X, Y, progress=progress)
        assert outcome.terms["stog"].item() == pytest.approx(weight * wanted, rel=1e-12)
    assert outcome.terms["gate"].item() == pytest.approx(torch.cat([r.detach().flatten() for r in gates]).mean().item(), rel=1e-12)
    optimiser = build_optimizer(Config(defense="stog", neuron="stog", lr=0.3), model, defense.groups(model))
    rest, own = optimiser.param_groups
    assert (own["lr"], own["own_rate"], own["weight_decay"], rest["lr"]) == (0.1, True, 0.0, 0.3)
    assert {id(value) for value in own["params"]} == {id(r) for r in gates}
    assert "lr" not in StoG(lr=0).groups(model)[0]
    before = None
    for progress in (0.0, 0.3, 0.6):
        optimiser.zero_grad()
        defense.step(model, X, Y, progress=progress).loss.backward()
        defense.before_step(model, progress)
        optimiser.step()
        defense.after_step(model)
        now = [r.detach().clone() for r in gates]
        assert all((0.1 <= r).all() and (r <= 1).all() for r in now)
        if before is not None:
            assert all(torch.equal(a, b) for a, b in zip(before, now)), "momentum must not move gates that are done"
        else:
            assert not torch.equal(now[0], 0.2 + 0.7 * draw(*gates[0].shape).sigmoid())
        before = now


def gates_of(folder, which: str = "last") -> list[Tensor]:
    model, _ = checkpoints.load_run(folder, which)
    return [layer.r.detach() for _, layer in model.spiking_layers()]


def test_gates_learn_in_the_first_part_of_a_training_that_is_resumed(tmp_path):
    settings = dict(model="small_cnn", model_options={"widths": [4, 8]}, neuron="stog", defense="stog", defense_options={"stog.gamma": 0.01})
    settings |= dict(train_limit=128, batch_size=32, epochs=4, validation=0.0, out=str(tmp_path / "run"))
    folder = train(Config(max_steps=4, **settings), progress=False)
    early = gates_of(folder)
    train(Config(max_steps=8, **settings), resume=True, progress=False)
    half = gates_of(folder)
    train(Config(**settings), resume=True, progress=False)
    assert all(0.1 <= b.min() and b.mean() < a.mean() < 1 for a, b in zip(early, half)), "the prior closes gates"
    assert all(torch.equal(a, b) for a, b in zip(half, gates_of(folder)))
    records = [line for line in checkpoints.read_lines(folder / "log.jsonl") if line["kind"] == "epoch"]
    assert records[-1]["stog"] == 0 < records[0]["stog"] and records[0]["gate"] > records[-1]["gate"]


def test_leaks_are_learned_in_a_training(tmp_path):
    settings = dict(model="small_cnn", model_options={"widths": [4, 8]}, neuron="feel", encoding="frequency", defense="feel", train_limit=128, batch_size=32)
    folder = train(Config(epochs=2, out=str(tmp_path / "run"), **settings), progress=False)
    model, run = checkpoints.load_run(folder, "last")
    assert all((layer.decay != 1).double().mean() > 0.5 for _, layer in model.spiking_layers())
    assert run["model"]["neuron"] == "feel" and run["model"]["encoding"] == "frequency"
    records = [line for line in checkpoints.read_lines(folder / "log.jsonl") if line["kind"] == "epoch"]
    assert records[-1]["leak"] != 1.0


BAD = {
    "learned anyway": (lambda: EvolutionaryLIF(learn=("decay",)), ValueError, "learns in any case"),
    "start": (lambda: EvolutionaryLIF(decay="1"), TypeError, "wanted a number"),
    "start above": (lambda: EvolutionaryLIF(decay=2.0), ValueError, "decay is 2.0"),
    "no channels": (lambda: EvolutionaryLIF()(draw(STEPS, 2)), ValueError, r"wanted \[T, N, C"),
    "no tensor": (lambda: GatedLIF()([1.0]), TypeError, "wanted a tensor"),
    "lowest": (lambda: GatedLIF(lowest=0.0), ValueError, "lowest is 0.0"),
    "temperature": (lambda: GatedLIF(temperature=0), ValueError, "temperature is 0"),
    "other gates": (lambda: gated((3, 4))(draw(STEPS, 2, 3, 5)), ValueError, r"the gates \[3, 4\]"),
    "no gates yet": (lambda: StoG().prepare(nn.Sequential(GatedLIF())), ValueError, "not made yet"),
    "option": (lambda: network(neuron="stog", neuron_options={"temprature": 1}), TypeError, "Did you mean 'temperature'"),
    "gamma": (lambda: StoG(gamma=-1), ValueError, "gamma is -1"),
    "rate": (lambda: StoG(lr=math.nan), ValueError, "lr is nan"),
    "until": (lambda: StoG(until=2), ValueError, "until is 2"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, error, words = BAD[what]
    with pytest.raises(error, match=words):
        call()
