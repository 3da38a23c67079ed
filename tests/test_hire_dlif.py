"""HIRE's periods, network and dropout, and DLIF's loss, against loops in plain PyTorch."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_bits
from fastsnn import IF, LI, LIF, checkpoints, models
from fastsnn.attacks import FGSM, PGD, default_eot
from fastsnn.defenses import AT, DLIF, HIRE, MPDSGR, REG, make_defense, perturbation_of
from fastsnn.defenses.hire import Carried
from fastsnn.models.dropout import StepDropout
from fastsnn.training import Config, train
from plain import Triangle
from torch import Tensor, nn

CLASSES = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(6, 2, 4, 4), torch.arange(6) % CLASSES
X[:, :, 0] = (X[:, :, 0] > 0.5).double()  # pixels that cannot move further


def hire_network(steps: int = 5, dropout: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(0)
    neurons = {**HIRE.needs["neuron_options"], "threshold": 0.3, "decay": 0.9}
    options = {**HIRE.needs, "neuron_options": neurons, "dropout": dropout, "dropout_everywhere": True, "dropout_over_steps": True, **options}
    return models.small_cnn(image=(2, 4, 4), classes=CLASSES, steps=steps, widths=(4, 6), **options).double().train()


class Bump(torch.autograd.Function):
    """1[u > 0], with derivative 0.3*max(0, 1 - |u|)."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.3 * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


def plain_steps(parameters: dict[str, Tensor], x: Tensor, steps: int, state: list) -> tuple[Tensor, list]:
    """Output currents [T, N, classes] of `hire_network` and its membranes, as a loop over steps; none of fastsnn's code runs."""
    currents = []
    for _ in range(steps):
        y, after = x, []
        for place, name in enumerate(("features.0", "features.2")):
            threshold, leak = parameters[f"{name}.neuron.threshold"], parameters[f"{name}.neuron.decay"]
            if place:
                y = F.avg_pool2d(y, 2)
            h = F.conv2d(y, parameters[f"{name}.conv.weight"], padding=1)
            h = h if state is None else leak * state[place] + h
            y = Bump.apply(h / threshold - 1)
            after.append(h - threshold * y)
        state = after
        currents.append(F.linear(y.mean((-2, -1)), parameters["classifier.weight"]))
    return torch.stack(currents), state


# ---- the network of HIRE -----------------------------------------------------------------------------------------------


def test_the_network_of_hire_against_a_plain_loop():
    """Learned threshold and leak, soft reset, fire above the threshold, the surrogate of h/threshold - 1, output summed."""
    net = hire_network()
    names, values = zip(*net.named_parameters())
    x = X.clone().requires_grad_()
    logits, want = net(x), plain_steps(dict(zip(names, values)), x, 5, None)[0].sum(0)
    torch.testing.assert_close(logits, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(F.cross_entropy(out, Y), (x, *values)) for out in (logits, want)]
    for name, got, expected in zip(("images", *names), *grads):
        assert expected.abs().max() > 1e-7, f"{name}: a test without a gradient tests nothing"
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")


def test_dropout_with_one_mask_for_all_steps():
    torch.manual_seed(0)
    layer, x = StepDropout(0.3), torch.ones(4, 50, 40, requires_grad=True)
    y = layer(x)
    assert (y == y[:1]).all(), "steps differ"
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.7]))
    silent = (y[0] == 0).double().mean().item()
    assert abs(silent - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5, silent
    assert_same_bits("gradient", torch.autograd.grad(y.sum(), x)[0], y.detach())
    assert (layer(x) != y).any(), "the same mask in the next batch"
    assert layer.eval()(x) is x and StepDropout(0.0)(x) is x
    with pytest.raises(ValueError, match=r"StepDropout: p is 1; wanted a number in \[0, 1\)"):
        StepDropout(1)


@pytest.mark.parametrize(
    ("name", "everywhere", "over_steps"), [("small_cnn", True, False), ("small_cnn", False, True), ("vgg11_tiny", False, False), ("vgg11_tiny", True, True)]
)
def test_where_networks_drop(name, everywhere, over_steps):
    model = models.build(name, image=(1, 16, 16), classes=2, steps=3, dropout=0.2, dropout_everywhere=everywhere, dropout_over_steps=over_steps)
    found = {place for place, module in model.named_modules() if type(module) is (StepDropout if over_steps else nn.Dropout) and module.p == 0.2}
    assert found == {place.replace(".neuron", ".dropout") for place, _ in model.spiking_layers() if everywhere or place.startswith("head")}
    assert (model.spec["dropout_everywhere"], model.spec["dropout_over_steps"]) == (everywhere, over_steps)


def test_dropout_follows_the_neurons_of_convolutions():
    model, seen = models.small_cnn(image=(1, 16, 16), dropout=0.2, dropout_everywhere=True), []
    assert models.build(**json.loads(json.dumps(model.spec))).state_dict().keys() == models.small_cnn(image=(1, 16, 16)).state_dict().keys()
    stage = model.features[0]
    stage.neuron.register_forward_hook(lambda layer, inputs, spikes: seen.append(spikes))
    stage.register_forward_hook(lambda layer, inputs, y: seen.append(y))
    model(torch.rand(2, 1, 16, 16))
    spikes, y = seen
    torch.testing.assert_close(y, torch.where(y == 0, 0.0, spikes / 0.8))
    assert ((y == 0) & (spikes != 0)).any()


@pytest.mark.parametrize("option", ["dropout_everywhere", "dropout_over_steps"])
def test_dropout_options_are_true_or_false(option):
    with pytest.raises(TypeError, match=f"models.small_cnn: {option} is 0.2; wanted True or False"):
        models.small_cnn(**{option: 0.2})


# ---- HIRE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("periods", "lengths"), [(1, (5,)), (2, (3, 2)), (3, (2, 2, 1))])
@pytest.mark.parametrize("carry", [True, False])
def test_hire_against_a_loop_by_hand(periods, lengths, carry):
    """Losses, weights and images of two batches; the step is larger than what is left of eps, so that delta is clipped."""
    net, eps, step, lr = hire_network(), 0.05, 0.03, 0.2
    parameters = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
    defense = HIRE(periods, eps=eps, step_size=step, carry_output=carry)
    defense.prepare(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    seen = []
    net.encoding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().clone()))
    for batch in range(2):
        images, labels = X.roll(batch, 0), Y.roll(2 * batch)
        want, wanted_images, delta, state, total = [], [], torch.zeros_like(images), None, 0.0
        for steps in lengths:
            x = torch.clamp(images + delta, 0, 1).requires_grad_()
            currents, after = plain_steps(parameters, x, steps, state)
            logits = total + currents.sum(0)
            loss = F.cross_entropy(logits, labels)
            grad, *grads = torch.autograd.grad(loss, (x, *parameters.values()))
            with torch.no_grad():
                for (name, value), change in zip(parameters.items(), grads):
                    value -= lr * change
                    if name.endswith("decay"):
                        value.clamp_(0, 1)
            state, total = [v.detach() for v in after], logits.detach() if carry else 0.0
            delta = torch.clamp(delta + step * grad.sign(), -eps, eps)
            want.append(loss.item())
            wanted_images.append(x.detach())
        found = []
        for outcome in defense.updates(net, images, labels):
            optimiser.zero_grad()
            outcome.loss.backward()
            optimiser.step()
            defense.after_step(net)
            found.append(outcome.loss.item())
        assert found == pytest.approx(want, rel=1e-10)
        torch.testing.assert_close(torch.stack(seen), torch.stack(wanted_images), rtol=0, atol=1e-15)
        seen.clear()
    for name, value in net.named_parameters():
        torch.testing.assert_close(value.detach(), parameters[name].detach(), rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")
    if periods == 3:
        assert delta.abs().max() == eps and (wanted_images[2] == images).any(), "nothing was clipped"


@pytest.mark.parametrize("periods", [2, 5])
def test_periods_without_updates_are_one_run(periods):
    """Nothing moves: logits and membranes of the last period are those of a run that was never interrupted."""
    net = hire_network(dropout=0.0)
    torch.manual_seed(0)
    outcomes = []
    for outcome in HIRE(periods, step_size=0).updates(net, X, Y):
        outcome.loss.backward()
        outcomes.append(outcome)
    want = net(X)
    assert len(outcomes) == periods
    torch.testing.assert_close(outcomes[-1].logits, want.detach(), rtol=1e-12, atol=1e-12)
    carried, layers = Carried(net), [layer for _, layer in net.spiking_layers()]
    for steps in (2, 1, 2):
        carried.run(net, X, steps, add=True)
    for layer in layers:
        layer.stateful = True
    net(X)
    for layer in layers:
        assert not carried.layers[layer].requires_grad and layer.v.abs().max() > 0
        assert_same_bits("membrane", carried.layers[layer], layer.v.detach())


def test_a_mask_of_dropout_is_kept_for_all_periods_of_a_batch():
    net, seen = hire_network(steps=4, dropout=0.4), []
    layer = net.features[0].dropout
    layer.register_forward_hook(lambda module, inputs, output: seen.append(module.mask.clone()))
    for _ in range(2):
        for outcome in HIRE(2).updates(net, X, Y):
            outcome.loss.backward()
    assert_same_bits("mask", seen[0], seen[1])
    assert_same_bits("mask", seen[2], seen[3])
    assert (seen[0] != seen[2]).any(), "two batches with one mask"
    assert layer.mask is None and not layer.held


def test_hire_leaves_the_network_as_it_was():
    def settings():
        return [(layer.steps, layer.stateful, layer.v) for _, layer in net.spiking_layers()] + [net.features[0].dropout.mask]

    net = hire_network(dropout=0.2)
    before = settings()
    next(HIRE(2).updates(net, X, Y))
    assert settings() == before

    def broken(images):
        net(images)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        next(HIRE(2).updates(net, X, Y, forward=broken))
    assert settings() == before


def test_hire_keeps_thresholds_and_leaks_in_range():
    net = hire_network()
    with torch.no_grad():
        for _, layer in net.spiking_layers():
            layer.threshold.fill_(-1.0)
            layer.decay.fill_(1.5)
    HIRE().after_step(net)
    assert all((layer.threshold.item(), layer.decay.item()) == (pytest.approx(0.03), 1.0) for _, layer in net.spiking_layers())


def test_a_period_must_be_differentiated():
    with pytest.raises(TypeError, match=r"images is torch.uint8 .*images.float\(\) / 255"):
        next(HIRE(2).updates(hire_network(), (255 * X).byte(), Y))
    updates = HIRE(2).updates(hire_network(), X, Y)
    next(updates)
    with pytest.raises(RuntimeError, match=r"wanted outcome.loss.backward\(\)"):
        next(updates)


def test_sizes_of_hires_steps():
    assert HIRE(3, eps="8/255").step_size == pytest.approx(4 / 255) and HIRE(1, eps=0.1).step_size == 0.1
    assert HIRE(4, eps=0.1, step_size="2/255").options() == {"periods": 4, "eps": 0.1, "step_size": 2 / 255, "carry_output": True}


WRONG = {
    "encoding": ({"encoding": "rsc"}, "encoding RSC; wanted.*Set encoding='direct'"),
    "norm": ({"norm": "bn"}, "norm BatchNorm; wanted.*Set norm='none'"),
    "bias": ({"bias": True}, "a bias; wanted.*Set model option bias=False"),
    "readout": ({"readout": "mean"}, "readout 'mean'; wanted.*Set readout='sum'"),
    "reset": ({"neuron_options": {**HIRE.needs["neuron_options"], "reset": "hard"}}, "reset 'hard'; wanted.*Set neuron option reset='soft'"),
    "fire": ({"neuron_options": {**HIRE.needs["neuron_options"], "fire": "ge"}}, "fire 'ge'; wanted.*Set neuron option fire='gt'"),
    "learn": ({"neuron_options": {"reset": "soft", "fire": "gt", "learn": ["decay"]}}, r"LIF that learn decay; wanted.*learn=\['threshold', 'decay'\]"),
    "steps": ({"steps": 1}, "periods is 2, and the network has 1 steps; wanted at least a step for each"),
    "ANN": ({"neuron": "relu", "neuron_options": None}, "HIRE: the model has no spiking layer"),
}


@pytest.mark.parametrize("what", WRONG)
def test_hire_says_which_network_it_trains(what):
    options, words = WRONG[what]
    HIRE().prepare(hire_network())
    with pytest.raises(ValueError, match=words):
        HIRE().prepare(hire_network(**options))


def test_hire_trains_networks_of_fastsnn_and_stands_alone():
    with pytest.raises(ValueError, match="HIRE: the model is a Sequential; wanted a network of fastsnn.models"):
        HIRE().prepare(nn.Sequential(nn.Linear(2, 2), IF()))
    with pytest.raises(ValueError, match="hire replace the training step"):
        HIRE() + REG()
    with pytest.raises(ValueError, match="cuda_graphs captures one update a batch, and hire makes several"):
        Config(defense="hire", cuda_graphs=True)


# ---- DLIF --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Linear, IF, linear, leaky LIF, linear; the layer that runs last is not the one that is made last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.readout = LI(1.0)
        self.second = LIF(decay=0.8, threshold=0.5)
        self.first = IF(steps=4)
        self.hidden, self.middle, self.out = nn.Linear(32, 9), nn.Linear(9, 7), nn.Linear(7, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        spikes = self.first(2 * self.hidden(images.flatten(1))[None])
        return self.readout(self.out(self.second(3 * self.middle(spikes)))).mean(0)


def plain_forward(net: Net, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of `Net`, and the currents [T, N, 7] into its second layer, as a loop over steps."""
    current, v, w, sums, logits, currents = 2 * net.hidden(images.flatten(1)), 0.0, 0.0, 0.0, 0.0, []
    for _ in range(4):
        h = v + current
        s = Triangle.apply(h - 1)
        v = h * (1 - s)
        currents.append(3 * net.middle(s))
        h = 0.8 * w + currents[-1]
        s = Triangle.apply(h - 0.5)
        w = h * (1 - s)
        sums = sums + net.out(s)
        logits = logits + sums / 4
    return logits, torch.stack(currents)


def plain_loss(net: Net, clean: Tensor, disturbed: Tensor, rho: float, tau: float) -> Tensor:
    """The training loss of DLIF on `Net`, the recursion as a weighted sum over the steps before."""
    (logits, currents), (disturbed_logits, disturbed_currents) = plain_forward(net, clean), plain_forward(net, disturbed)
    difference = currents.detach() - disturbed_currents
    weights = torch.tensor([[tau ** (t - k) if k <= t else 0.0 for k in range(4)] for t in range(4)], dtype=torch.float64)
    error = torch.einsum("tk,knc->tnc", weights, difference).square().mean()
    return (F.cross_entropy(logits, Y) + F.cross_entropy(disturbed_logits, Y)) / 2 + rho * error


def assert_same_loss(defense, net: Net, want: Tensor, smoothing: float = 0.0) -> None:
    outcome = defense.step(net, X, Y, smoothing=smoothing)
    assert outcome.terms["membrane-error"] > 1e-4, "nothing is disturbed"
    names, values = zip(*net.named_parameters())
    torch.testing.assert_close(outcome.loss, want, rtol=1e-11, atol=0)
    for name, got, expected in zip(names, torch.autograd.grad(outcome.loss, values), torch.autograd.grad(want, values)):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")


def test_the_recursion_by_hand():
    """Differences 1, 2, -1 with tau 1/2: Y = 1, 5/2, 1/4."""
    clean, disturbed = torch.tensor([[3.0], [1.0], [0.0]]), torch.tensor([[2.0], [-1.0], [1.0]])
    assert perturbation_of(clean, disturbed, 0.5).item() == pytest.approx((1 + 6.25 + 0.0625) / 3)
    assert perturbation_of(clean, clean).item() == 0.0
    assert perturbation_of(clean.half(), disturbed.half(), 0.5).dtype == torch.float32


@pytest.mark.parametrize(("rho", "tau"), [(1.0, 0.99), (0.3, 0.0)])
def test_dlif_on_gaussian_images_against_a_plain_loop(rho, tau):
    net = Net().double()
    torch.manual_seed(5)
    disturbed = (X + 0.2 * torch.randn_like(X)).clamp(0, 1)
    want = plain_loss(net, X, disturbed, rho, tau)
    torch.manual_seed(5)
    assert_same_loss(DLIF(rho, "gaussian", eps=0.2, tau=tau), net, want)


def test_dlif_on_adversarial_images_against_a_plain_loop():
    net = Net().double()
    torch.manual_seed(5)
    near = (X + 0.02 * torch.randn_like(X)).clamp(0, 1).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(plain_forward(net, near)[0], Y), near)
    want = plain_loss(net, X, (near + 0.1 * grad.sign()).detach().clamp(0, 1), 1.0, 0.99)
    torch.manual_seed(5)
    assert_same_loss(DLIF(eps=0.1, noise=0.02), net, want)


def test_dlif_on_the_images_of_another_part():
    """AT's images stand for x~, in either order of the sum; statistics of a further part are theirs."""
    net = Net().double()
    found = PGD(0.2, steps=2, step_size=0.1, seed=3)(net, X, Y)
    parts = AT(eps=0.2, steps=2, step_size=0.1, seed=3), DLIF(perturbation="batch")
    for total in (parts[0] + parts[1], parts[1] + parts[0] + MPDSGR(eta=0.0) + REG()):
        assert_same_loss(total, net, plain_loss(net, X, found, 1.0, 0.99))
    with pytest.raises(ValueError, match="at and dlif each make adversarial images"):
        AT() + DLIF()
    with pytest.raises(ValueError, match="no other part changes the images"):
        parts[1].loss(net, X, Y)


def test_dlif_smooths_both_labels():
    net = Net().double()
    torch.manual_seed(5)
    disturbed = (X + 0.2 * torch.randn_like(X)).clamp(0, 1)
    want = sum(F.cross_entropy(net(images), Y, label_smoothing=0.2) for images in (X, disturbed)) / 2
    torch.manual_seed(5)
    assert DLIF(0.0, "gaussian", eps=0.2).step(net, X, Y, smoothing=0.2).loss.item() == pytest.approx(want.item(), rel=1e-12)


def test_dlif_where_the_only_layer_has_a_constant_current():
    """One step of current stands for all; so does what a merged layer is given."""
    torch.manual_seed(0)
    linear, out = nn.Linear(32, 5).double(), nn.Linear(5, CLASSES).double()

    class One(nn.Module):
        def __init__(self, merged: bool) -> None:
            super().__init__()
            self.linear, self.neuron, self.out, self.merged = linear, LIF(steps=3, merged=merged), out, merged

        def forward(self, images):
            x = self.linear(images.flatten(1))
            return self.out(self.neuron(x.repeat(3, 1)).unflatten(0, (3, -1)) if self.merged else self.neuron(x[None])).mean(0)

    torch.manual_seed(5)
    disturbed = (X + 0.2 * torch.randn_like(X)).clamp(0, 1)
    d = (linear(X.flatten(1)) - linear(disturbed.flatten(1))).detach()
    want = sum((scale * d).square().mean() for scale in (1, 1.5, 1.75)) / 3
    for merged in (False, True):
        torch.manual_seed(5)
        found = DLIF(perturbation="gaussian", eps=0.2, tau=0.5).step(One(merged), X, Y).terms
        torch.testing.assert_close(found["membrane-error"], want, rtol=1e-12, atol=0)


def test_dlif_in_networks_with_its_neurons():
    """Both forwards are the training's, the attack's is not; hooks and images are gone after the step, and after an error."""
    net = models.small_cnn(image=(2, 4, 4), classes=CLASSES, widths=(4, 6), norm="bn", neuron="dlif").double()
    defense, counts = DLIF(), []
    defense.prepare(net)

    def forward(images):
        counts.append(net.training)
        return net(images)

    defense.step(net, X, Y, forward=forward).loss.backward()
    assert counts == [True, True]
    assert {module.num_batches_tracked.item() for module in net.modules() if hasattr(module, "num_batches_tracked")} == {2}
    assert all(value.grad is not None for value in net.parameters())

    def broken(images):
        net(images)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        defense.step(net, X, Y, forward=broken)
    assert defense._current is None and defense._disturbed is None
    assert not any(layer._forward_pre_hooks for layer in net.modules())
    assert copy.deepcopy(defense).options() == defense.options()


def test_dlif_through_a_compiled_forward():
    """Two steps: what is seen in the second is not what was seen in the first."""
    net, losses = Net().double(), []
    compiled = torch.compile(net, backend="eager")
    for forward in (compiled, net):
        torch.manual_seed(5)
        defense = DLIF(perturbation="gaussian", eps=0.2)
        losses.append([defense.step(net, images, Y, forward=forward).loss for images in (X, X.flip(0))])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert losses[0][0] != losses[0][1]


def test_the_loss_of_dlif_keeps_the_perturbation_small():
    def trained(rho: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        net, defense = models.small_cnn(image=(2, 4, 4), classes=CLASSES, widths=(8, 16), neuron="dlif", norm="bn"), DLIF(rho, eps=0.1)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        errors = []
        for _ in range(40):
            outcome = defense.step(net, X.float(), Y)
            optimiser.zero_grad()
            outcome.loss.backward()
            optimiser.step()
            errors.append(outcome.terms["membrane-error"])
        return torch.stack(errors[-10:]).mean(), outcome.terms["task"]

    (free, _), (kept, task) = trained(0.0), trained(1.0)
    assert kept < 0.7 * free and task < 0.9, (free, kept, task)


# ---- both ----------------------------------------------------------------------------------------------------------------


BAD = {
    "periods": (lambda: HIRE(periods=0), "HIRE: periods is 0; wanted an int >= 1"),
    "periods half": (lambda: HIRE(periods=1.5), "HIRE: periods is 1.5"),
    "eps of hire": (lambda: HIRE(eps=8), "HIRE: .*Divide by 255"),
    "step": (lambda: HIRE(step_size="1/0"), "HIRE: "),
    "rho": (lambda: DLIF(rho=-1), "DLIF: rho is -1"),
    "tau": (lambda: DLIF(tau=1.5), "DLIF: tau is 1.5"),
    "perturbation": (lambda: DLIF(perturbation="gausian"), "Did you mean 'gaussian'"),
    "eps of dlif": (lambda: DLIF(eps=-0.1), "DLIF: "),
    "network": (lambda: DLIF().prepare(nn.Linear(2, 2)), "DLIF: the model has no spiking layer"),
    "integrator": (lambda: DLIF().prepare(LI()), "DLIF: the model has no spiking layer"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options(what):
    call, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["hire", "dlif"])
def test_recipes_train_and_stop_and_go_on(tmp_path, name):
    """From the CPU recipe on digits: a run that was stopped equals one that was not, and is loaded and attacked."""
    from fastsnn.recipes import load_recipe

    settings = {**load_recipe(f"cpu-{name}"), "epochs": 1, "train_limit": 200, "batch_size": 32}
    whole = train(Config(**settings, out=str(tmp_path / "whole")), progress=False)
    parts = str(tmp_path / "parts")
    train(Config(**settings, out=parts, max_steps=2), progress=False)
    train(Config(**settings, out=parts), resume=True, progress=False)
    tensors = [checkpoints.load(folder / checkpoints.LAST)[0] for folder in (whole, tmp_path / "parts")]
    for key, value in tensors[0].items():
        assert_same_bits(key, value, tensors[1][key])
    net = checkpoints.load_run(whole)[0].eval()
    x, y = torch.rand(4, *net.image), torch.arange(4)
    attack = FGSM(8 / 255, eot=default_eot(net))
    assert 0 < (attack(net, x, y) - x).abs().max() <= 8 / 255 + 1e-6
    make_defense(name).prepare(net)
