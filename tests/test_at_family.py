"""TGO with noisy neurons, MIX and adversarial training: losses, gradients and images against plain PyTorch, firing rates, draws."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_bits
from fastsnn import IF, LIF, NoisyLIF, checkpoints, models, record, surrogates
from fastsnn.training import Config, train
from fastsnn.attacks import ATTACKS, FGSM, PGD, RFGSM, default_eot, make_attack
from fastsnn.attacks.expectation import is_random
from fastsnn.defenses import AT, MIX, MPDSGR, REG, TGO, Vanilla, forward_with_statistics, make_defense
from torch import Tensor, nn

STEPS, CLASSES = 4, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(10, 2, 6, 6), torch.arange(10) % CLASSES


class Net(nn.Module):
    """Convolution, batch norm, spikes, linear, spikes, linear, in float64."""

    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.hidden, self.out = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 7), nn.Linear(7, CLASSES)
        self.first = IF() if first is None else first
        self.second = LIF(decay=0.8, threshold=0.6, reset="soft") if second is None else second
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        current = self.norm(self.conv(images)).expand(STEPS, -1, -1, -1, -1).contiguous()
        return self.out(self.second(self.hidden(self.first(current).flatten(2)) * 3)).mean(0)


class Spike(torch.autograd.Function):
    """Spikes that are given, or those of z >= 0; backward a slope that is a function of z."""

    @staticmethod
    def forward(ctx, z, slope, given):
        ctx.save_for_backward(z)
        ctx.slope = slope
        return (z >= 0).to(z.dtype) if given is None else given.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope(ctx.saved_tensors[0]), None, None


def triangle(z: Tensor) -> Tensor:
    return (1 - z.abs()).clamp(min=0)


def density(sigma: float):
    return lambda z: torch.exp(-((z / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))


def cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def loop(net: Net, images: Tensor, layers, given=(None, None), running: bool = False):
    """Logits and every z = h - threshold of `Net`, step by step, without fastsnn. layers: (decay, threshold, soft, slope) of each."""
    norm = net.norm
    mean, var = (norm.running_mean, norm.running_var) if running else (None, None)
    current = F.batch_norm(F.conv2d(images, net.conv.weight, net.conv.bias), mean, var, norm.weight, norm.bias, training=not running)
    states, zs, logits = [torch.zeros_like(current), torch.zeros(len(images), 7, dtype=images.dtype)], ([], []), 0.0
    for t in range(STEPS):
        x = current
        for place, (decay, threshold, soft, slope) in enumerate(layers):
            h = decay * states[place] + x
            zs[place].append(h - threshold)
            s = Spike.apply(h - threshold, slope, None if given[place] is None else given[place][t])
            states[place] = h - threshold * s if soft else h * (1 - s)
            x = 3 * F.linear(s.flatten(1), net.hidden.weight, net.hidden.bias) if place == 0 else s
        logits = logits + F.linear(x, net.out.weight, net.out.bias) / STEPS
    return logits, [torch.stack(steps) for steps in zs]


PLAIN = ((1.0, 1.0, False, triangle), (0.8, 0.6, True, triangle))


def assert_gradients(loss: Tensor, want: Tensor, net: Net) -> None:
    names, parameters = zip(*net.named_parameters())
    found, wanted = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss, want))
    for name, got, expected in zip(names, found, wanted):
        assert expected.abs().max() > 1e-6 or name == "conv.bias", "a test without a gradient tests nothing"
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


# ---- TGO ---------------------------------------------------------------------------------------------------------------


def constraint(zs: list[Tensor], delta: float, power: int) -> Tensor:
    return sum(((delta - z.abs()).clamp(min=0) ** power).mean() for z in zs)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("delta", [0.1, 0.5])
def test_tgo_and_its_gradient_against_a_plain_loop(power, delta):
    net, defense = Net(), TGO(weight=0.8, delta=delta, power=power)
    logits, zs = loop(net, X, PLAIN)
    want = constraint(zs, delta, power)
    for progress, strength in ((0.0, 0.0), (0.5, 0.4), (1.0, 0.8)):
        outcome = defense.step(net, X, Y, progress=progress)
        assert outcome.terms["tgo"].item() == pytest.approx(strength * want.item(), rel=1e-10, abs=1e-15)
        assert outcome.terms["guard"].item() == pytest.approx(want.item() / 2, rel=1e-10)
        assert_gradients(outcome.loss, F.cross_entropy(logits, Y) + strength * want, net)


def noisy_net(sigma: float, seed: int | None = 5, inference: str = "noisy") -> Net:
    net = Net(*(NoisyLIF(sigma, inference=inference) for _ in range(2)))
    net.first.seed, net.second.seed = seed, None if seed is None else seed + 1
    return net


@pytest.mark.parametrize("sigma", [0.4, 0.4**0.5])
def test_tgo_with_noisy_neurons_against_a_plain_loop(sigma):
    """The loop takes the spikes that were drawn: all else, and the gradient through the normal density, is computed anew."""
    net, spikes = noisy_net(sigma), []
    hooks = [layer.register_forward_hook(lambda layer, args, out: spikes.append(out.detach())) for layer in (net.first, net.second)]
    outcome = TGO(weight=0.6, schedule="constant").step(net, X, Y)
    for hook in hooks:
        hook.remove()
    layers = [(0.5, 1.0, False, density(sigma))] * 2
    logits, zs = loop(net, X, layers, spikes)
    torch.testing.assert_close(outcome.logits, logits.detach(), rtol=1e-10, atol=1e-12)
    assert 0.02 < spikes[0].mean() < 0.9, "neurons that never draw otherwise test nothing"
    assert_gradients(outcome.loss, F.cross_entropy(logits, Y) + 0.6 * constraint(zs, 0.25, 2), net)


def test_tgo_rises_by_a_cosine():
    defense = TGO(weight=0.6)
    values = [defense.strength(step / 300) for step in range(301)]
    assert values[0] == 0 and values[300] == pytest.approx(0.6) and values[150] == pytest.approx(0.3)
    assert values[75] == pytest.approx(0.3 * (1 - 0.5**0.5)) and all(a < b for a, b in zip(values, values[1:]))
    assert {TGO(weight=0.6, schedule="constant").strength(progress) for progress in (0.0, 0.3, 1.0)} == {0.6}


def test_tgo_moves_membranes_away_from_the_threshold():
    shares = {}
    for weight in (0.0, 1.0):
        net, defense = Net(), TGO(weight, delta=0.5, power=1, schedule="constant")
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(60):
            optimiser.zero_grad()
            defense.loss(net, X, Y).backward()
            optimiser.step()
        _, statistics = forward_with_statistics(net, X, ("guard",), (0.5, 0))
        shares[weight] = sum(entry.guard.mean().item() for entry in statistics) / 2
    assert shares[1.0] < 0.6 * shares[0.0], shares


def test_tgo_beside_other_defenses():
    total = TGO(weight=0.4, schedule="constant") + MPDSGR(eta=0.2) + MIX() + REG()
    outcome = total.step(Net(), X, Y)
    assert set(outcome.terms) == {"task", "tgo", "guard", "mpd-sgr", "omega"} and total.guard == (0.25, 2)
    assert outcome.loss.item() == pytest.approx(sum(outcome.terms[name].item() for name in ("task", "tgo", "mpd-sgr")))


# ---- noisy neurons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, sigma", [({}, 0.4), ({"sigma": 0.3}, 0.3), ({"variance": 0.4}, 0.4**0.5)], ids=["default", "sigma", "variance"])
def test_noisy_neurons_fire_at_the_normal_rate(options, sigma):
    """Of n neurons at the same z, Phi(z / sigma) * n fire, within 4.5 binomial deviations; in each of 8 columns of z."""
    layer, number = NoisyLIF(**options), 40_000
    layer.seed = 11
    z = torch.tensor([-1.2, -0.5, -0.2, 0.0, 0.1, 0.3, 0.7, 1.5], dtype=torch.float64)
    rates = layer((1 + z).expand(1, number, -1).contiguous())[0].mean(0)
    wanted = cdf(z / sigma)
    deviation = (wanted * (1 - wanted) / number).sqrt()
    assert ((rates - wanted).abs() < 4.5 * deviation).all(), ((rates - wanted) / deviation).tolist()


def test_noise_is_drawn_once_and_afresh_at_each_step():
    """The membrane itself has no noise; at every step spikes follow Phi of it, and steps do not follow each other."""
    layer, x = NoisyLIF(variance=0.4), 0.3 + 1.2 * draw(6, 200, 50)
    layer.seed = 3
    out = layer.simulate(x, keep=("membrane",))
    v, surprises = torch.zeros_like(x[0]), []
    for t, (h, s) in enumerate(zip(out.membrane, out.spikes)):
        torch.testing.assert_close(h, 0.5 * v + x[t], rtol=1e-12, atol=1e-12)
        p = cdf((h - 1) / 0.4**0.5)
        surprises.append((s - p) / (p * (1 - p)).sqrt())
        assert abs((s - p).sum() / (p * (1 - p)).sum().sqrt()) < 4.5, f"step {t}"
        v = h * (1 - s)
    for a, b in zip(surprises, surprises[1:]):
        assert abs((a * b).mean()) < 4.5 / a.numel() ** 0.5
    assert out.spikes.sum() > 0


def test_the_surrogate_of_noisy_neurons_is_the_density():
    z = torch.linspace(-2, 2, 41, dtype=torch.float64)
    for inference, training in (("noisy", True), ("plain", True), ("plain", False)):
        x = (1 + z)[None, None].clone().requires_grad_()
        layer = NoisyLIF(variance=0.4, inference=inference).train(training)
        (grad,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(grad[0, 0], density(0.4**0.5)(z), rtol=1e-12, atol=1e-14)


def test_noise_off_at_inference():
    """In eval mode the layer is a LIF with the density for a surrogate, also between calls in training mode, which draw."""
    layer, x = NoisyLIF(sigma=0.3, inference="plain"), 2 * draw(4, 20, 30)
    x[0, 0] = 1.0  # at the threshold
    x.requires_grad_()
    lif = LIF(decay=0.5, surrogate=surrogates.Gaussian(0.3))
    want = lif(x).detach()
    (gradient,) = torch.autograd.grad((lif(x) * draw(*x.shape, seed=1)).sum(), x)
    drawn = []
    for turn in range(3):
        drawn.append(layer.train()(x).detach())
        found = layer.eval()(x)
        assert_same_bits("spikes", found.detach(), want)
        assert_same_bits("gradient", torch.autograd.grad((found * draw(*x.shape, seed=1)).sum(), x)[0], gradient)
    assert all((drawn[a] != drawn[b]).any() for a, b in ((0, 1), (0, 2), (1, 2))) and all((spikes != want).any() for spikes in drawn)
    noisy = NoisyLIF(sigma=0.3).eval()
    assert (noisy(x) != noisy(x)).any(), "noisy is the default at inference too"


def test_what_is_random_at_inference():
    for training in (True, False):
        for inference, seed, want in (("noisy", None, True), ("plain", None, False), ("noisy", 3, False)):
            net = noisy_net(0.4, seed, inference).train(training)
            assert is_random(net) == want and default_eot(net) == (10 if want else 1)
    assert not is_random(Net())


@pytest.mark.parametrize("options", [{"variance": 0.4, "inference": "plain"}, {"sigma": 0.3}], ids=str)
def test_noisy_networks_are_built_again_from_their_spec(options):
    torch.manual_seed(0)
    net = models.small_cnn(image=(1, 8, 8), widths=(4, 8, 8), neuron="noisy", neuron_options=options).eval()
    assert net.spec["neuron_options"] == options
    again = models.build(**net.spec).eval()
    again.load_state_dict(net.state_dict())
    x = draw(4, 1, 8, 8).float()
    for network in (net, again):  # a random network repeats under a seed
        for number, (_, layer) in enumerate(network.spiking_layers()):
            layer.seed = number
    assert_same_bits("logits", again(x).detach(), net(x).detach())
    assert ("plain" in repr(net)) == ("inference" in options)


# ---- MIX ---------------------------------------------------------------------------------------------------------------


def pairs(eps: float) -> dict[tuple[str, str], object]:
    return {(attack.name, gradient): attack(eps, adjoint=gradient) for attack in (FGSM, RFGSM) for gradient in ("bptt", "bptr")}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.neuron, self.out = nn.Linear(72, 20).double(), IF(), nn.Linear(20, CLASSES).double()

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.neuron(self.hidden(images.flatten(1)).expand(STEPS, -1, -1).contiguous())).mean(0)


def test_mix_gives_the_images_of_the_pair_it_draws():
    net, defense, drawn = Small(), MIX(eps=0.1), set()
    for seed in range(12):
        torch.manual_seed(seed)
        found = defense.batch(net, X, Y, 0.0)
        torch.manual_seed(seed)
        torch.randint(4, (1,))  # the draw of the pair comes before the attack's own
        state = torch.get_rng_state()
        same = []
        for pair, attack in pairs(0.1).items():
            torch.set_rng_state(state)
            if torch.equal(attack(net, X, Y), found):
                same.append(pair)
        assert len(same) == 1, f"seed {seed}: the images are those of {same}"
        drawn.update(same)
    assert drawn == set(pairs(0.1))


def test_mix_draws_pairs_equally_often():
    defense, counts = MIX(), dict.fromkeys(range(4), 0)
    defense.members = tuple(lambda *call, place=place: place for place in range(4))
    torch.manual_seed(0)
    for _ in range(4000):
        counts[defense.batch(None, X, Y, 0.0)] += 1
    assert all(abs(count - 1000) < 4.5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values()), counts


def test_the_images_of_mix_by_hand():
    """FGSM through BPTT and through BPTR, computed step by step."""

    class Rate(torch.autograd.Function):
        """g_in[t] = g_out[t] where the neuron fires at all, and 0 elsewhere."""

        @staticmethod
        def forward(ctx, x, spikes):
            ctx.save_for_backward(spikes.mean(0) > 0)
            return spikes.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0], None

    net, x = Net(), X.clone().requires_grad_()
    logits, zs = loop(net, x, PLAIN, running=True)
    through_time = torch.autograd.grad(F.cross_entropy(logits, Y), x)[0]
    first, second = [(z >= 0).double().detach() for z in zs]
    current = F.batch_norm(net.conv(x), net.norm.running_mean, net.norm.running_var, net.norm.weight, net.norm.bias)
    hidden = 3 * net.hidden(Rate.apply(current.expand(STEPS, *current.shape), first).flatten(2))
    logits = net.out(Rate.apply(hidden, second)).mean(0)
    through_rates = torch.autograd.grad(F.cross_entropy(logits, Y), x)[0]
    assert (through_time.sign() != through_rates.sign()).any()
    for gradients, want in (("bptt", through_time), ("bptr", through_rates)):
        found = MIX("fgsm", gradients, eps=0.1).batch(net, X, Y, 0.0)
        torch.testing.assert_close(found, (X + 0.1 * want.sign()).clamp(0, 1), rtol=0, atol=1e-12)


def test_mix_trains_through_time_on_its_images_alone():
    net, defense = Net(), MIX(("fgsm",), ("bptr",), eps="8/255")
    found = FGSM(8 / 255, adjoint="bptr")(net, X, Y)
    assert_gradients(defense.loss(net, X, Y), Vanilla().loss(net, found, Y), net)


@pytest.mark.parametrize("given", ["bptr", ["bptr"], ("bptr",)], ids=str)
def test_the_older_script_has_one_gradient(given):
    defense = make_defense("mix+reg", {"mix": {"gradients": given}, "reg": {"beta": 0.004}}).parts[0]
    assert [(attack.name, attack.adjoint) for attack in defense.members] == [("fgsm", "bptr"), ("rfgsm", "bptr")]
    assert [(attack.name, attack.adjoint) for attack in MIX("fgsm, rfgsm", "bptt,bptr").members] == list(pairs(0.1))


def test_several_processes_take_the_draw_of_the_first(monkeypatch):
    from fastsnn.defenses import mix

    asked = []

    def broadcast(place: Tensor, src: int) -> None:
        asked.append(src)
        place.fill_(1)

    monkeypatch.setattr(mix, "ranks", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    want = FGSM(0.1, adjoint="bptr")(Net(), X, Y)
    for seed in range(4):
        torch.manual_seed(seed)
        assert_same_bits("images", MIX(eps=0.1).batch(Net(), X, Y, 0.0), want)
    assert asked == [0] * 4


# ---- adversarial training ----------------------------------------------------------------------------------------------


def test_at_is_what_it_was():
    defense = AT()
    assert defense.options() == {"attack": "pgd", "eps": 2 / 255, "steps": 2, "step_size": 1 / 255, "warmup": 0.0, "eot": 1}
    assert repr(AT(0.1, 3, 0.05, seed=4).attack) == repr(PGD(0.1, steps=3, step_size=0.05, seed=4))
    assert AT(0.1, 5, None).step_size == PGD(0.1, steps=5).step_size


#: Attacks of many forward passes, or that leave an image where it is within two steps: tests of attacks run them.
ELSEWHERE = ("autoattack", "cw", "ensemble", "fab", "mtpgd", "tapgd-ce", "tapgd-dlr")


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.access == "gradient"])
def test_at_with_every_attack_that_takes_a_gradient(name):
    defense = AT(eps=0.1, steps=2, step_size=0.05, seed=3, attack=name)
    again = make_defense("at", {"at": defense.options()})
    assert repr(again) == repr(defense) and again.attack.options() == defense.attack.options()
    if name in ELSEWHERE:
        assert defense.attack.name == name and defense.attack.eps == 0.1
        return
    net = Net()
    options = {key: value for key, value in {"steps": 2, "step_size": 0.05}.items() if hasattr(defense.attack, key)}
    found = make_attack(name, eps=0.1, seed=3, **options)(net, X, Y)
    assert (found - X).abs().max() > 0.001 and net.training
    assert_same_bits("images", defense.batch(net, X, Y, 0.7), found)
    assert_gradients(defense.loss(net, X, Y), Vanilla().loss(net, found, Y), net)


def test_eps_warms_up():
    net = Net()
    for name, make in (("pgd", lambda eps: PGD(eps, steps=2, step_size=eps / 2, seed=3)), ("fgsm", FGSM), ("rfgsm", lambda eps: RFGSM(eps, seed=3))):
        defense = AT(eps=0.2, steps=2, step_size=0.1, seed=3, attack=name, warmup=0.4)
        for progress, eps in ((0.1, 0.05), (0.3, 0.15), (0.4, 0.2), (0.9, 0.2)):
            found = defense.batch(net, X, Y, progress)
            assert (found - X).abs().max().item() == pytest.approx(eps, rel=0.02)
            torch.testing.assert_close(found, make(eps)(net, X, Y), rtol=0, atol=1e-12)
        assert_same_bits("clean images", defense.batch(net, X, Y, 0.0), X)
    assert (AT(eps=0.2, attack="fgsm").batch(net, X, Y, 0.0) != X).any(), "without a warm-up it is there at once"


@pytest.mark.parametrize("make", [lambda eot: AT(eot=eot), lambda eot: MIX(eot=eot)], ids=["at", "mix"])
def test_random_networks_in_training(make):
    """As many gradients as eot says, and no warning about single ones: that is for evaluations."""
    net = noisy_net(0.4, seed=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for eot in (1, 3):
            defense = make(eot)
            defense.batch(net, X, Y, 0.5)
            asked = [attack.queries for attack in getattr(defense, "members", (getattr(defense, "attack", None),)) if attack.queries is not None]
            assert [queries.tolist() for queries in asked] == [[eot * (2 if defense.name == "at" else 1)] * len(X)]
    with pytest.warns(UserWarning, match="random at inference"):
        PGD(0.1, steps=1)(net, X, Y)


# ---- from settings to a run --------------------------------------------------------------------------------------------


RUNS = {
    "tgo": dict(defense="tgo", defense_options={"tgo.weight": 0.6, "tgo.delta": 0.5}, neuron="noisy", neuron_options={"variance": 0.4, "inference": "plain"}),
    "tgo-snn-rat": dict(defense="tgo+mix+reg", defense_options={"tgo.power": 1, "mix.gradients": "bptr"}, neuron="noisy", neuron_options={"sigma": 0.4}),
    "fgsm-at": dict(defense="at", at_eps="8/255", defense_options={"at.attack": "fgsm", "at.warmup": 0.5}),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, tmp_path):
    common = dict(model="small_cnn", model_options={"widths": [4, 8, 8]}, steps=2, data="digits", train_limit=200, epochs=1, validation=0.1, out=str(tmp_path))
    folder = train(Config(**common, **RUNS[name]), progress=False)
    model, run = checkpoints.load_run(folder)
    assert run["finished"] and run["model"]["neuron_options"] == RUNS[name].get("neuron_options")
    assert is_random(model.eval()) == (name == "tgo-snn-rat")
    if name.startswith("tgo"):
        assert '"guard"' in (folder / "log.jsonl").read_text()
        with record(model, "guard", guard=(0.25, 0)) as statistics:
            model(draw(3, 1, 8, 8).float())
        assert all(0 <= entry.guard.mean() <= 1 for entries in statistics.values() for entry in entries)


# ---- bad input ---------------------------------------------------------------------------------------------------------


BAD = {
    "weight": (lambda: TGO(weight=-1), "weight is -1"),
    "delta": (lambda: TGO(delta=0), "delta is 0"),
    "power": (lambda: TGO(power=0), "Power 0 counts"),
    "schedule": (lambda: TGO(schedule="cosin"), "Did you mean 'cosine'"),
    "tgo without spikes": (lambda: TGO().loss(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double(), X, Y), "no spiking layer"),
    "two guards": (lambda: TGO() + type("Other", (TGO,), {"name": "other"})(delta=0.5), "different values of guard"),
    "sigma and variance": (lambda: NoisyLIF(0.4, variance=0.4), "sigma is 0.4 and variance is 0.4"),
    "variance": (lambda: NoisyLIF(variance=0.0), "variance is 0.0"),
    "inference": (lambda: NoisyLIF(inference="quiet"), "wanted one of noisy, plain"),
    "attack": (lambda: AT(attack="pdg"), "Did you mean 'pgd'"),
    "attack without a gradient": (lambda: AT(attack="square"), "asks the model for scores"),
    "warmup": (lambda: AT(warmup=2), "warmup is 2"),
    "eot": (lambda: AT(eot=0), "eot is 0"),
    "attack of mix": (lambda: MIX("fgms"), "MIX: attack 'fgms' is unknown.*Did you mean 'fgsm'"),
    "gradient of mix": (lambda: MIX(gradients="bptx"), "bptx"),
    "none": (lambda: MIX(()), r"attacks is \(\)"),
    "twice": (lambda: MIX(gradients="bptt,bptt"), "different names"),
    "two that craft": (lambda: MIX() + AT(), "each make adversarial images"),
    "setting": (lambda: Config(defense="mix", defense_options={"mix.gradient": "bptr"}), "Did you mean 'gradients'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        call()
