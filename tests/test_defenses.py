"""Defenses: Omega and the training loss against plain PyTorch, adversarial batches, REG's map, and sums."""

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_bits
from fastsnn import IF, LI, LIF, models
from fastsnn.attacks import PGD
from fastsnn.defenses import AT, DEFENSES, HIRE, MPDSGR, REG, Defense, Run, Sum, Vanilla, forward_with_statistics, make_defense, mean_omega, omega, project_simplex
from fastsnn.functional import Statistics
from fastsnn.models.resnet import Combine
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import Triangle
from torch import Tensor, nn

STEPS, CLASSES = 4, 3
every_defense = pytest.mark.parametrize("name", DEFENSES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(10, 2, 6, 6), torch.arange(10) % CLASSES


class Net(nn.Module):
    """Convolution, batch norm, IF, linear, leaky LIF with a soft reset, linear; a model that knows nothing of statistics."""

    def __init__(self, backend: str = "auto", integrator: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.first = IF(steps=STEPS, backend=backend)
        self.hidden = nn.Linear(64, 7)
        self.second = LIF(decay=0.8, threshold=0.6, reset="soft", backend=backend)
        self.out = nn.Linear(7, CLASSES)
        self.readout = LI(1.0) if integrator else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        spikes = self.first(self.norm(self.conv(images))[None])
        return self.readout(self.out(self.second(self.hidden(spikes.flatten(2)) * 3))).mean(0)


def plain_omega(mean: Tensor, var: Tensor, gamma: float) -> Tensor:
    """Omega from its definition, with the error function."""
    sigma = torch.sqrt(var + 1e-5)
    return 0.5 * (torch.erf((mean + gamma) / sigma / 2**0.5) - torch.erf((mean - gamma) / sigma / 2**0.5))


def plain_loss(net: Net, images: Tensor, labels: Tensor, eta: float, gamma: float, average: str) -> Tensor:
    """The training loss of MPD-SGR on `Net`, as a loop over steps; none of fastsnn's code runs."""
    current = F.batch_norm(F.conv2d(images, net.conv.weight, net.conv.bias), None, None, net.norm.weight, net.norm.bias, training=True)
    v, w = torch.zeros_like(current), torch.zeros(len(images), 7, dtype=images.dtype)
    logits, layers = 0.0, ([], [])
    for _ in range(STEPS):
        z = v + current - 1.0
        s = Triangle.apply(z)
        v = (z + 1.0) * (1 - s)
        layers[0].append(plain_omega(z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False), gamma))
        z = 0.8 * w + 3 * F.linear(s.flatten(1), net.hidden.weight, net.hidden.bias) - 0.6
        s = Triangle.apply(z)
        w = z + 0.6 - 0.6 * s
        layers[1].append(plain_omega(z.mean(0), z.var(0, unbiased=False), gamma))
        logits = logits + F.linear(s, net.out.weight, net.out.bias) / STEPS
    values = [torch.stack(layer) for layer in layers]
    mean = torch.cat([value.flatten() for value in values]).mean() if average == "flat" else (values[0].mean() + values[1].mean()) / 2
    return F.cross_entropy(logits, labels) + eta * mean


# ---- Omega -------------------------------------------------------------------------------------------------------------


def test_omega_at_known_points():
    """The values of the standard normal table, and the derivatives of the equations."""
    for mean, want, to_mean, to_sigma in ((0.0, 0.682689, 0.0, -0.483941), (0.5, 0.624655, -0.222548, None)):
        mu = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        sigma = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        value = omega(mu, sigma**2 - 1e-5, 1.0)
        assert value.item() == pytest.approx(want, abs=5e-7)
        grads = torch.autograd.grad(value, (mu, sigma))
        assert grads[0].item() == pytest.approx(to_mean, abs=5e-7)
        if to_sigma is not None:
            assert grads[1].item() == pytest.approx(to_sigma, abs=5e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_omega_and_its_gradients_by_the_equations(dtype, gamma):
    mean = torch.linspace(-3, 3, 25, dtype=dtype)[:, None].expand(25, 12).clone().requires_grad_()
    var = torch.logspace(-2, 1, 12, dtype=dtype)[None].expand(25, 12).clone().requires_grad_()
    value = omega(mean, var, gamma)
    found = torch.autograd.grad(value.sum(), (mean, var))
    mu, sigma = mean.detach().double(), (var.detach().double() + 1e-5).sqrt()
    high, low = (mu + gamma) / sigma, (mu - gamma) / sigma

    def density(x: Tensor) -> Tensor:
        return torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

    to_mean = (density(high) - density(low)) / sigma
    to_sigma = ((mu - gamma) * density(low) - (mu + gamma) * density(high)) / sigma**2
    tolerance = dict(rtol=1e-11, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(value.detach().double(), plain_omega(mu, var.detach().double(), gamma), **tolerance)
    torch.testing.assert_close(found[0].double(), to_mean, **tolerance)
    torch.testing.assert_close(found[1].double(), to_sigma / (2 * sigma), **tolerance)


def test_omega_far_from_the_threshold():
    """In a tail the difference of two numbers near 1 would be 0; the value and its gradient are not."""
    for sign in (-1, 1):
        mean = torch.tensor(sign * 8.0, requires_grad=True)
        value = omega(mean, torch.tensor(1.0 - 1e-5), 1.0)
        exact = 0.5 * (math.erfc(7 / 2**0.5) - math.erfc(9 / 2**0.5))
        assert value.item() == pytest.approx(exact, rel=1e-4, abs=0)
        assert torch.autograd.grad(value, mean)[0].item() == pytest.approx(-sign * math.exp(-24.5) / math.sqrt(2 * math.pi), rel=1e-3, abs=0)
    still = torch.zeros(3, requires_grad=True)
    values = omega(torch.tensor([0.0, 1.0, 5.0]), still, 1.0)
    assert values.tolist() == [1.0, 0.5, 0.0]
    assert torch.autograd.grad(values.sum(), still)[0].isfinite().all()


def test_the_mean_over_layers_and_the_flat_mean():
    def entry(mean: float, channels: int) -> Statistics:
        return Statistics(mean=torch.full((2, channels), mean), var=torch.ones(2, channels))

    values = [omega(torch.tensor(mean), torch.tensor(1.0)).item() for mean in (0.0, 3.0)]
    entries = [entry(0.0, 1), entry(3.0, 9)]
    assert mean_omega(entries, 1.0, "layers").item() == pytest.approx(sum(values) / 2)
    assert mean_omega(entries, 1.0, "flat").item() == pytest.approx(0.1 * values[0] + 0.9 * values[1])


# ---- the training loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("average", ["layers", "flat"])
@pytest.mark.parametrize("gamma", [1.0, 0.4])
def test_loss_and_gradients_against_a_plain_loop(backend, average, gamma):
    net = Net(backend).double()
    x = X.clone().requires_grad_()
    names, parameters = zip(*net.named_parameters())
    for eta in (0.0, 0.7):
        want = plain_loss(net, x, Y, eta, gamma, average)
        loss = MPDSGR(eta, gamma, average).loss(net, x, Y)
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
        grads = zip(("images", *names), torch.autograd.grad(loss, (x, *parameters)), torch.autograd.grad(want, (x, *parameters)))
        for name, got, expected in grads:
            assert expected.abs().max() > 1e-6 or name == "conv.bias", "a test without a gradient tests nothing"
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


def test_float32_is_near_to_float64():
    net, exact = Net(), Net().double()
    # Rounding must not flip a spike here: the loss would jump.
    net.load_state_dict(exact.state_dict())
    loss, want = MPDSGR(0.7).loss(net, X.float(), Y), plain_loss(exact, X.float().double(), Y, 0.7, 1.0, "layers")
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    for (name, got), expected in zip(net.named_parameters(), torch.autograd.grad(want, tuple(exact.parameters()))):
        (grad,) = torch.autograd.grad(loss, got, retain_graph=True)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("average", ["layers", "flat"])
def test_omega_is_taken_over_all_processes(monkeypatch, average):
    """Two processes with half of the batch each, one after the other: `fastsnn.distributed.moments` pools what both gave."""
    from fastsnn.defenses import mpd_sgr

    net, group, seen = Net().double().eval(), object(), []

    def pool(mean: Tensor, var: Tensor, given) -> tuple[Tensor, Tensor]:
        assert given is group
        seen.append((mean, var))
        means, variances = map(torch.stack, zip(*seen))
        return means.mean(0), (variances + (means - means.mean(0)).square()).mean(0)

    monkeypatch.setattr(mpd_sgr, "moments", pool)
    defense = MPDSGR(eta=1.0, average=average)
    for half in (slice(0, 5), slice(5, 10)):
        outcome = defense.step(net, X[half], Y[half], group=group)
    monkeypatch.undo()
    torch.testing.assert_close(outcome.terms["omega"], defense.step(net, X, Y).terms["omega"], rtol=1e-12, atol=0)
    assert len(seen) == 2, "one exchange for all layers"


@pytest.mark.parametrize("name", ["small_cnn", "resnet20"])
def test_models_with_statistics_of_their_own(name):
    """A fastsnn model returns its statistics; seen through a stranger's wrapper they are recorded: the loss is the same."""

    class Stranger(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)

    torch.manual_seed(0)
    model = models.build(name, image=(1, 8, 8), classes=CLASSES, steps=2).eval()
    x = draw(4, 1, 8, 8).float()
    logits, statistics = forward_with_statistics(model, x, ("mean", "rate"))
    assert len(statistics) == len(model.spiking_layers()) and statistics[0].mean.shape[0] == 2 and statistics[0].var is None
    assert_same_bits("logits", logits.detach(), model(x).detach())
    losses = [MPDSGR(0.5).loss(network, x, Y[:4]) for network in (model, Stranger(model))]
    assert_same_bits("loss", losses[0].detach(), losses[1].detach())


def test_a_leaky_integrator_is_no_spiking_layer():
    net = Net(integrator=True).double()
    _, statistics = forward_with_statistics(net, X, ("mean", "rate"))
    assert [entry.mean.shape[1] for entry in statistics] == [4, 7]


def test_terms_and_logits():
    net = Net().double()
    outcome = MPDSGR(eta=0.2).step(net, X, Y, progress=0.5)
    assert set(outcome.terms) == {"task", "mpd-sgr", "omega"}
    assert not outcome.logits.requires_grad and not any(value.requires_grad for value in outcome.terms.values())
    assert outcome.loss.item() == pytest.approx((outcome.terms["task"] + outcome.terms["mpd-sgr"]).item())
    assert outcome.terms["mpd-sgr"].item() == pytest.approx(0.2 * outcome.terms["omega"].item())
    assert outcome.terms["task"].item() == pytest.approx(F.cross_entropy(outcome.logits, Y).item())
    smooth = Vanilla().step(net, X, Y, smoothing=0.1)
    assert smooth.loss.item() == pytest.approx(F.cross_entropy(smooth.logits, Y, label_smoothing=0.1).item())


def test_the_forward_that_is_passed_is_the_one_that_runs():
    net, calls = Net().double(), []

    def forward(images, **options):
        calls.append(options)
        return net(images)

    for defense in (Vanilla(), MPDSGR(), AT()):
        defense.step(net, X, Y, forward=forward)
    assert len(calls) == 3, "the attack of AT runs the plain model"
    compiled = torch.compile(net, backend="eager")
    assert_same_bits("loss", MPDSGR().step(compiled, X, Y).loss.detach(), MPDSGR().loss(net, X, Y).detach())


@every_defense
@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).double()])
def test_an_ordinary_network(name, make):
    model, defense = make(), make_defense(name)
    if defense.statistics or name in NETWORKS or defense.needs:
        with pytest.raises(ValueError, match="no spiking layer|wanted a network of fastsnn.models|wanted GatedLIF"):
            defense.prepare(model)
            defense.loss(model, X, Y)
        return
    defense.prepare(model)
    defense.loss(model, X, Y).backward()
    assert all(value.grad is not None for value in model.parameters())
    defense.after_step(model)


#: Options of small_cnn for defenses that are about certain networks, where they are not what the defense says that it needs.
NETWORKS = {
    "dlif": {"neuron": "dlif"},
    "hire": {**HIRE.needs, "neuron_options": {**HIRE.needs["neuron_options"], "threshold": 0.3}},  # so that it is not silent
    "poisson": {**DEFENSES["poisson"].needs, "readout": "sum"},  # larger steps: the images that it sees are coarse
}


def network_for(name: str) -> nn.Module:
    """A network that a defense trains: `Net`, or one of its own."""
    options = NETWORKS.get(name) or DEFENSES[name].needs
    if not options:
        return Net()
    net = models.small_cnn(image=(2, 6, 6), classes=CLASSES, steps=STEPS, widths=(4, 8), **options)
    net.encoding.seed = 0  # what a random encoding sees repeats: ten images are few
    return net


@every_defense
def test_training_lowers_the_loss(name):
    torch.manual_seed(0)
    net, defense = network_for(name).double(), make_defense(name)
    defense.prepare(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for step in range(25):
        for outcome in defense.updates(net, X, Y, progress=step / 25):
            optimiser.zero_grad()
            outcome.loss.backward()
            optimiser.step()
            defense.after_step(net)
        losses.append(outcome.loss.item())
    assert min(losses[-5:]) < 0.8 * losses[0], losses


# ---- adversarial training ----------------------------------------------------------------------------------------------


def test_at_trains_on_pgd_in_the_models_own_mode():
    net = Net().double().train()
    attack = PGD(2 / 255, steps=2, step_size=1 / 255, seed=3)
    found = attack(net, X, Y)
    assert (found - X).abs().max() > 1.5 / 255 and net.training
    defense = AT(seed=3)
    assert (defense.eps, defense.steps, defense.step_size) == (2 / 255, 2, 1 / 255)
    before = net.norm.num_batches_tracked.item()
    outcome = defense.step(net, X, Y)
    assert net.norm.num_batches_tracked.item() == before + 1, "crafting touched the running statistics"
    assert_same_bits("logits", outcome.logits, net(found).detach())
    outcome.loss.backward()
    assert all(value.grad is not None for value in net.parameters())


def test_statistics_are_those_of_the_adversarial_batch():
    net = Net().double()
    sum_ = AT(eps=0.2, step_size=0.1, seed=3) + MPDSGR(eta=0.5)
    found = sum_.parts[0].attack(net, X, Y)
    torch.testing.assert_close(sum_.loss(net, X, Y), MPDSGR(eta=0.5).loss(net, found, Y))


# ---- REG ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), beta=st.floats(0, 0.4), seed=st.integers(0, 99), conv=st.booleans())
def test_reg_maps_singular_values(rows, columns, beta, seed, conv):
    layer = (nn.Conv2d(columns, rows, (1, 2)) if conv else nn.Linear(columns, rows)).double()
    with torch.no_grad():
        layer.weight.copy_(2 * draw(*layer.weight.shape, seed=seed) - 1)
    u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
    bias = layer.bias.detach().clone()
    REG(beta).after_step(nn.Sequential(layer))
    torch.testing.assert_close(layer.weight.detach().flatten(1), u @ torch.diag((1 + beta) * s - beta * s**3) @ v, rtol=1e-11, atol=1e-11)
    assert_same_bits("bias", layer.bias.detach(), bias)


def test_reg_of_a_large_linear_layer_moves_a_share_of_its_rows():
    model = nn.Sequential(nn.Linear(300, 199, bias=False), nn.Linear(300, 200, bias=False), nn.Conv1d(3, 250, 1)).double()
    before = [layer.weight.detach().clone() for layer in model]
    torch.manual_seed(1)
    REG(0.1).after_step(model)
    rows = [(layer.weight.detach() != old).flatten(1).any(1) for layer, old in zip(model, before)]
    assert rows[0].all() and rows[2].all() and rows[1].sum() == 60
    part = before[1][rows[1]]
    torch.testing.assert_close(model[1].weight.detach()[rows[1]], 1.1 * part - 0.1 * part @ part.T @ part, rtol=1e-11, atol=1e-11)
    first = rows[1]
    REG(0.1).after_step(model)
    assert ((model[1].weight.detach() != before[1]).any(1) & ~first).any(), "the same rows again"


def test_reg_draws_weights_towards_orthogonal_rows():
    layer = nn.Linear(20, 8).double()
    for _ in range(300):
        REG(0.1).after_step(layer)
    w = layer.weight.detach()
    torch.testing.assert_close(w @ w.T, torch.eye(8, dtype=torch.float64), atol=1e-6, rtol=0)


def test_reg_leaves_everything_else():
    net = Net().double()
    touched = {"conv.weight", "hidden.weight", "out.weight"}
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    REG(0.1).after_step(net)
    assert {name for name, value in net.named_parameters() if (value != before[name]).any()} == touched
    assert all(value.requires_grad and value.grad_fn is None for value in net.parameters())


def test_reg_projects_the_scalars_of_residual_sums():
    combine = Combine()
    with torch.no_grad():
        combine.weights.copy_(torch.tensor([0.9, 0.5]))
    REG().after_step(nn.Sequential(combine))
    torch.testing.assert_close(combine.weights.detach(), torch.tensor([0.7, 0.3]))


@settings(max_examples=60)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_projection_on_the_simplex(values):
    x = torch.tensor(values, dtype=torch.float64)
    p = project_simplex(x)
    assert (p >= 0).all() and p.sum().item() == pytest.approx(1)
    # The nearest point: the angle to every corner is obtuse.
    assert all((x - p) @ (corner - p) <= 1e-9 for corner in torch.eye(len(x), dtype=torch.float64))
    torch.testing.assert_close(project_simplex(p), p)


# ---- sums --------------------------------------------------------------------------------------------------------------


class Part(Defense):
    """A defense that says what is asked of it."""

    def __init__(self, name: str, **attributes) -> None:
        self.name, self.log = name, []
        vars(self).update(attributes)

    def prepare(self, model):
        self.log.append("prepare")

    @contextlib.contextmanager
    def watch(self, model):
        self.log.append("enter")
        yield
        self.log.append("exit")

    def penalty(self, run):
        self.log.append("penalty")
        return {self.name: run.logits.square().mean() * 0.1}

    def report(self, run):
        return {f"{self.name}-seen": run.labels.sum()}

    def after_step(self, model):
        self.log.append("after_step")


class Own(Part):
    def objective(self, run):
        return run.logits.square().sum()


def all_orders(parts):
    for order in itertools.permutations(parts):
        total = order[0]
        for part in order[1:]:
            total = total + part
        yield total


def test_sums_do_not_depend_on_the_order():
    found = []
    for total in all_orders([MPDSGR(0.3), AT(seed=1), REG(0.1), Part("part")]):
        torch.manual_seed(2)
        net = Net().double()
        total.prepare(net)
        outcome = total.step(net, X, Y)
        outcome.loss.backward()
        with torch.no_grad():
            for value in net.parameters():
                value -= 0.1 * value.grad
        total.after_step(net)
        assert total.statistics == ("mean", "var") and total.weight_decay == 0.0 and total.guard is None
        found.append((outcome, [value.detach() for value in net.parameters()]))
    assert len(found) == 24
    for outcome, parameters in found[1:]:
        assert set(outcome.terms) == {"task", "mpd-sgr", "omega", "part", "part-seen"}
        for name, value in outcome.terms.items():
            assert_same_bits(name, value, found[0][0].terms[name])
        for value, want in zip(parameters, found[0][1]):
            torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-14)


def test_sums_are_flat():
    a, b, c = MPDSGR(), AT(), REG()
    for total in ((a + b) + c, a + (b + c), Sum((a, b, c))):
        assert total.parts == (a, b, c) and total.name == "mpd-sgr+at+reg"
        assert repr(total) == f"{a!r} + {b!r} + {c!r}"
        assert total.options() == {"mpd-sgr": a.options(), "at": b.options(), "reg": c.options()}


def test_every_method_reaches_every_part():
    parts = [Part("a"), Part("b")]
    total, net = parts[0] + parts[1], Net().double()
    total.prepare(net)
    total.loss(net, X, Y)
    total.after_step(net)
    assert parts[0].log == parts[1].log == ["prepare", "enter", "penalty", "exit", "after_step"]


def test_statistics_are_united_and_the_guard_is_shared():
    guarded = Part("guarded", statistics=("guard", "rate"), guard=(0.3, 2))
    seen = []
    guarded.penalty = lambda run: (seen.append(run.statistics), {})[1]
    for total in (guarded + MPDSGR(), MPDSGR() + guarded, guarded + MPDSGR() + Part("other", statistics=("guard",), guard=(0.3, 2))):
        assert set(total.statistics) == {"mean", "var", "rate", "guard"} and total.guard == (0.3, 2)
        total.loss(Net().double(), X, Y)
        assert all(value is not None for entry in seen[-1] for value in (entry.mean, entry.var, entry.rate, entry.guard))
    with pytest.raises(ValueError, match="different values of guard"):
        guarded + Part("other", statistics=("guard",), guard=(0.25, 2))


def test_one_part_may_replace_the_task_loss():
    net = Net().double()
    own, want = Own("own"), None
    for total in (own + MPDSGR(0.0), MPDSGR(0.0) + own):
        outcome = total.step(net, X, Y)
        assert outcome.terms["task"].item() == pytest.approx(outcome.logits.square().sum().item())
        assert want is None or outcome.loss.item() == want
        want = outcome.loss.item()
    with pytest.raises(ValueError, match="first and second replace the task loss"):
        Own("first") + Vanilla() + Own("second")


def test_a_defense_can_ask_for_the_images_gradient_and_run_the_model_again():
    """What SR, TRADES and MART need of a run."""

    class Sharp(Part):
        input_gradient = True

        def penalty(self, run: Run):
            (grad,) = torch.autograd.grad(run.logits.square().sum(), run.images, retain_graph=True)
            moved = run.forward(run.images + 0.01 * grad.sign())
            return {self.name: (moved - run.logits).square().mean()}

    net = Net().double()
    for total in (Sharp("sharp") + AT(seed=0), AT(seed=0) + Sharp("sharp")):
        outcome = total.step(net, X, Y)
        outcome.loss.backward()
        assert outcome.terms["sharp"] > 0
    assert not X.requires_grad


def test_a_defense_with_a_loop_of_its_own_stands_alone():
    class Twice(Part):
        def updates(self, model, images, labels, **options):
            for part in (slice(0, 5), slice(5, 10)):
                yield self.step(model, images[part], labels[part], **options)

    assert len(list(Twice("twice").updates(Net().double(), X, Y))) == 2
    with pytest.raises(ValueError, match="twice replace the training step"):
        Twice("twice") + Vanilla()


# ---- names and bad input -----------------------------------------------------------------------------------------------


def test_make_defense():
    made = make_defense("mpd-sgr+at", {"mpd-sgr": {"eta": 0.1}, "at": {"eps": "4/255"}})
    assert [type(part) for part in made.parts] == [MPDSGR, AT]
    assert made.parts[0].eta == 0.1 and made.parts[1].eps == 4 / 255
    assert type(make_defense("vanilla")) is Vanilla


@every_defense
def test_options_say_how_to_make_it_again(name):
    defense = make_defense(name)
    assert repr(make_defense(name, {name: defense.options()})) == repr(defense)


BAD = {
    "name": (lambda: make_defense("mpd-sg"), ValueError, "Did you mean 'mpd-sgr'"),
    "name in a sum": (lambda: make_defense("at+rag"), ValueError, "Did you mean 'reg'"),
    "option": (lambda: make_defense("mpd-sgr", {"mpd-sgr": {"eat": 1}}), ValueError, "Did you mean 'eta'"),
    "option of none": (lambda: make_defense("vanilla", {"vanilla": {"eta": 1}}), ValueError, "wanted one of none"),
    "options of another": (lambda: make_defense("at", {"mpd-sgr": {"eta": 1}}), ValueError, "not in it"),
    "twice": (lambda: make_defense("at+at"), ValueError, "at is in the sum at \\+ at twice"),
    "eta": (lambda: MPDSGR(eta=-1), ValueError, "eta is -1"),
    "eta NaN": (lambda: MPDSGR(eta=math.nan), ValueError, "eta is nan"),
    "gamma": (lambda: MPDSGR(gamma=0), ValueError, "gamma is 0"),
    "average": (lambda: MPDSGR(average="layer"), ValueError, "Did you mean 'layers'"),
    "beta": (lambda: REG(beta=0.5), ValueError, "beta is 0.5"),
    "eps": (lambda: AT(eps=2), ValueError, "Divide by 255"),
    "images": (lambda: Vanilla().loss(Net(), (X * 255).byte(), Y), TypeError, r"images.float\(\) / 255"),
    "labels": (lambda: Vanilla().loss(Net(), X.float(), Y.float()), TypeError, r"labels.long\(\)"),
    "few labels": (lambda: MPDSGR().loss(Net(), X.float(), Y[:3]), TypeError, r"wanted int64 \[10\]"),
    "progress": (lambda: Vanilla().step(Net(), X.float(), Y, progress=2), ValueError, "progress is 2"),
    "smoothing": (lambda: Vanilla().step(Net(), X.float(), Y, smoothing=1.0), ValueError, "smoothing is 1"),
    "logits": (lambda: Vanilla().loss(nn.Identity(), X, Y), ValueError, r"logits of shape \[10, 2, 6, 6\]"),
    "no defense": (lambda: MPDSGR() + 1, TypeError, "unsupported operand"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, error, words = BAD[what]
    with pytest.raises(error, match=words):
        call()
