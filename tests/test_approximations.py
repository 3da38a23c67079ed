"""Gradient approximations against their formulas in plain PyTorch, and the attack through all of them."""

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, assert_same_bits
from fastsnn import IF, LIF, NoisyLIF, ParametricLIF, models, surrogates
from fastsnn.attacks import APPROXIMATIONS, ASSG, ENSEMBLE, EXTENDED, FGSM, PDSG, PGD, Attack, Ensemble, make_attack
from fastsnn.attacks.adaptive import Pass
from fastsnn.attacks.approximations import HART_WIDTHS, Approximation, members_of, resolve
from torch import Tensor, nn
from trained import digits, network

EPS, STEPS, DECAY = 0.1, 4, 0.7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(5, 1, 6, 6), torch.tensor([0, 1, 2, 1, 0])


class Small(nn.Module):
    """Convolution, neurons, linear layer, neurons, linear layer, mean over steps: small enough to write out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.middle, self.out = nn.Conv2d(1, 3, 3), nn.Linear(48, 24), nn.Linear(24, 3)
        self.first, self.second = LIF(DECAY), LIF(DECAY)
        self.double()

    def forward(self, images: Tensor, first=None, second=None) -> Tensor:
        first, second = first or self.first, second or self.second
        x = (0.4 + 2 * self.conv(images - 0.5))[None] * torch.linspace(0.7, 1.3, STEPS, dtype=torch.float64).reshape(-1, 1, 1, 1, 1)
        return self.out(second(self.middle(6 * first(x).flatten(2)))).mean(0)


# ---- the formulas --------------------------------------------------------------------------------------------------------


def passed(value: Tensor, like: Tensor) -> Tensor:
    """`value`, with the gradient of `like`."""
    return value.detach() + (like - like.detach())


def membranes(x: Tensor, slope=None) -> tuple[Tensor, Tensor]:
    """(z, s) of the neurons, by autograd through every step; slope(z, t): what stands for ds/dz, None: nothing passes."""
    v, zs, spikes = torch.zeros_like(x[0]), [], []
    for t, current in enumerate(x):
        h = DECAY * v + current
        z = h - 1
        s = (z >= 0).to(x.dtype)
        if slope is not None:
            s = passed(s, z * slope(z.detach(), t))
        v = h * (1 - s)
        zs.append(z)
        spikes.append(s)
    return torch.stack(zs), torch.stack(spikes)


def bptt(slope):
    return lambda x: membranes(x, lambda z, t: slope(z))[1]


def bptr(x: Tensor) -> Tensor:
    spikes = membranes(x)[1]
    return passed(spikes, x * (spikes.mean(0) > 0))


def rga(x: Tensor) -> Tensor:
    gamma, mean = 0.2, x.detach().mean(0)
    low, high = ((mean >= 0) & (mean <= 1 - DECAY)).to(x.dtype), ((mean > 1 - DECAY) & (mean <= 2)).to(x.dtype)
    return passed(membranes(x)[1], x * (gamma * low + (1 - gamma + gamma * DECAY) / (1 + DECAY) * high))


def hart(width: float):
    def layer(x: Tensor) -> Tensor:
        z, spikes = membranes(x.detach())
        return passed(spikes, x.mean(0) * (width - z.abs()).clamp(min=0) / width**2)

    return layer


def normal(z: Tensor, sigma: Tensor | float) -> Tensor:
    return torch.exp(-((z - sigma / 2) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)


def pdsg(x: Tensor) -> Tensor:
    z = membranes(x)[0].detach()
    sigma = z.transpose(1, 2).flatten(2).std((0, 2), correction=1)  # of each channel
    sigma = torch.where(sigma == 0, torch.ones_like(sigma), sigma).reshape(-1, *[1] * (z.dim() - 3))
    return membranes(x, lambda z, t: normal(z, sigma))[1]


def pdsg_so_far(x: Tensor) -> Tensor:
    z = membranes(x)[0].detach()
    dims = (0, 1, 3, 4) if x.dim() == 5 else (0, 1, 2)
    sigmas = [z[: t + 1].std(dims, keepdim=True)[0] for t in range(STEPS)]
    return membranes(x, lambda z, t: normal(z, sigmas[t]))[1]


class Sharp:
    """ASSG's running means of one layer, over its calls."""

    def __init__(self, share: float = 0.425) -> None:
        self.omega, self.mean, self.deviation = 2 * math.tan(math.pi * share) / math.pi, 1.0, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        size = membranes(x)[0].detach().abs()
        self.mean = 0.9 * self.mean + 0.1 * size
        self.deviation = 0.9 * self.deviation + 0.1 * (size - self.mean).abs()
        a = self.omega / (self.mean + 1.5 * self.deviation + 1e-4)
        return membranes(x, lambda z, t: a[t] / 2 / (1 + (math.pi / 2 * a[t] * z) ** 2))[1]


def written_out(name: str):
    """Makes the two layers of `name` in plain PyTorch."""
    kind, *numbers = name.split("-")
    numbers = [float(number) for number in numbers]
    match kind:
        case "triangle":
            layer = bptt(lambda z: (numbers[0] - z.abs()).clamp(min=0) / numbers[0] ** 2)
        case "exponential":
            layer = bptt(lambda z: numbers[0] * torch.exp(-numbers[1] * z.abs()))
        case "rectangle":
            layer = bptt(lambda z: (z.abs() < numbers[0] / 2).to(z.dtype) / numbers[0])
        case "ste":
            layer = bptt(torch.ones_like)
        case "hart":
            layer = hart(*numbers or (1.0,))  # without a width: the layers' own surrogate, of width 1
        case "assg":
            return Sharp(), Sharp()
        case _:
            layer = {"bptr": bptr, "rga": rga, "cba": torch.relu, "pdsg": pdsg}[kind]
    return layer, layer


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def plain_gradient(model: nn.Module, x: Tensor, y: Tensor, layers) -> Tensor:
    x = x.clone().requires_grad_()
    return gradient_of(F.cross_entropy(model(x, *layers), y, reduction="sum"), x)


@pytest.mark.parametrize("name", [*APPROXIMATIONS, "hart-0.35", "hart-2.45"])
def test_formulas(name):
    model = Small()
    want = plain_gradient(model, X, Y, written_out(name))
    found = FGSM(EPS, adjoint=name).gradient(model, X, Y)
    assert want.flatten(1).any(1).sum() >= 3, "the network is too quiet for this test"
    assert_close("gradient", found.gradient, want, 1e-12)
    # Whatever the gradient went through: the logits are those of the model.
    assert_same_bits("logits", found.logits, model(X).detach())
    assert_same_bits("loss", found.loss, F.cross_entropy(model(X), Y, reduction="none").detach())


def test_the_ensemble_of_19_in_its_order():
    triangles = [f"triangle-{width}" for width in ("1", "2", "3", "0.5", "0.25")]
    exponentials = [f"exponential-{height}-{slope}" for height in ("0.3", "1") for slope in ("0.5", "1", "2")]
    rectangles = [f"rectangle-{width}" for width in ("0.25", "0.5", "1", "2", "4")]
    assert list(ENSEMBLE) == [*triangles, *exponentials, *rectangles, "ste", "bptr", "cba"] and len(ENSEMBLE) == 19
    assert EXTENDED == (*ENSEMBLE, "rga", "hart", "pdsg", "assg")


def test_hart_searches_its_widths():
    assert len(HART_WIDTHS) == 48 and HART_WIDTHS[0] == 0.1 and HART_WIDTHS[-1] == 2.45
    assert {round(b - a, 10) for a, b in zip(HART_WIDTHS, HART_WIDTHS[1:])} == {0.05}
    assert [way.choice for way in APPROXIMATIONS["hart"].attempts] == [("hart", surrogates.Triangle(width)) for width in HART_WIDTHS]


def test_pdsg_as_published():
    model = Small()
    found = FGSM(EPS, adjoint=PDSG(so_far=True)).gradient(model, X, Y).gradient
    # The first step of a single sample has one value for each neuron, and no deviation: not defined in the public code either.
    assert_close("gradient", found, plain_gradient(model, X, Y, (pdsg_so_far, pdsg_so_far)), 1e-12)


def test_pdsg_where_nothing_varies():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = IF()

        def forward(self, images: Tensor) -> Tensor:
            return self.neuron(images[None].expand(1, -1, -1) + 0.5).mean(0)

    x = torch.full((3, 2), 0.25, dtype=torch.float64)
    found = FGSM(EPS, adjoint="pdsg", loss=lambda logits, labels: logits.sum(1)).gradient(Constant(), x, Y[:3]).gradient
    assert_close("sigma is 1", found, normal(torch.full_like(x, -0.25), 1.0), 1e-12)


class Three(Attack):
    """Three gradients at one image after another, the second of some samples only."""

    name = "three"
    left = torch.tensor([0, 2, 3])

    def run(self, model, images, labels, generator):
        self.found = [self.gradient(model, images, labels).gradient]
        with self.only(self.left):
            self.found.append(self.gradient(model, 0.9 * images[self.left], labels[self.left]).gradient)
        self.found.append(self.gradient(model, 0.8 * images, labels).gradient)
        self.anew()
        self.found.append(self.gradient(model, images, labels).gradient)
        return images


@pytest.mark.parametrize("eot", [1, 3])
def test_assg_follows_each_sample(eot):
    """Its means belong to the sample: they go on where it is asked about, once for each mean over random passes."""
    model, attack = Small(), Three(EPS, adjoint=ASSG(share=0.4), eot=eot)
    want = [torch.zeros_like(X), torch.zeros(3, 1, 6, 6, dtype=X.dtype), torch.zeros_like(X)]
    for i in range(len(X)):
        layers, one = (Sharp(0.4), Sharp(0.4)), slice(i, i + 1)
        want[0][i] = plain_gradient(model, X[one], Y[one], layers)[0]
        if i in attack.left:
            want[1][attack.left.tolist().index(i)] = plain_gradient(model, 0.9 * X[one], Y[one], layers)[0]
        want[2][i] = plain_gradient(model, 0.8 * X[one], Y[one], layers)[0]
    for _ in range(2):  # a second call starts again
        attack(model, X, Y)
        for place, expected in enumerate((*want, want[0])):
            assert_close(f"gradient {place}", attack.found[place], expected, 1e-12)


# ---- networks and layers -------------------------------------------------------------------------------------------------


def test_cba_of_a_network_is_its_twin():
    model, (x, y) = network("snn").double(), digits(8, torch.float64)
    found = FGSM(EPS, adjoint="cba").gradient(model, x, y)
    twin = models.twin(model).eval()
    x = x.requires_grad_()
    assert_same_bits("gradient", found.gradient, gradient_of(F.cross_entropy(twin(x), y, reduction="sum"), x))
    assert_same_bits("logits", found.logits, model(x).detach())
    # The same network inside of somebody else's module: ReLU at each step.
    other = FGSM(EPS, adjoint="cba").gradient(nn.Sequential(model), x.detach(), y).gradient
    assert_close("within a module", other, found.gradient, 1e-12)


def f64(*shape: int, seed: int) -> Tensor:
    return 0.4 + 0.5 * draw(*shape, seed=seed)


#: Layers and inputs [N, C, *S] that they are called with; a step is the input times 0.8, 1.0, ...
LAYERS = {
    "lif": (lambda: LIF(0.8), (2, 3, 3)),
    "soft": (lambda: LIF(0.8, reset="soft", detach_reset=True), (2, 3, 3)),
    "channel-wise": (lambda: LIF(f64(2, seed=1), threshold=1.3 * f64(2, seed=2)), (2, 3, 3)),
    "neuron-wise": (lambda: LIF(f64(STEPS, 2, 3, 3, seed=1), threshold=f64(1, 2, 3, 3, seed=2)), (2, 3, 3)),
    "a step's": (lambda: LIF(f64(STEPS, 1, 1, 1, seed=1), threshold=f64(1, 1, 1, 1, seed=2)), (2, 3, 3)),
    "learned": (lambda: LIF(0.8, learn=("decay", "threshold")).double(), (2, 3, 3)),
    "parametric": (lambda: ParametricLIF(2.5).double(), (4,)),
    "tau": (lambda: LIF(tau=3.0, charge="leak_state", threshold=0.4), (4,)),
    "no channels": (lambda: LIF(0.8, threshold=0.5), ()),
    "noisy": (lambda: NoisyLIF(0.3), (2, 3, 3)),
}


@pytest.mark.parametrize("rule", [PDSG(), ASSG()], ids=repr)
@pytest.mark.parametrize("what", LAYERS)
def test_spikes_are_the_same_bits_and_the_layer_is_left_as_it_was(what, rule):
    make, shape = LAYERS[what]
    layer = make()
    x = 1.5 * draw(5, *shape, seed=4) * torch.linspace(0.8, 1.4, STEPS, dtype=torch.float64).reshape(-1, *[1] * (1 + len(shape)))
    v = 0.3 * draw(5, *shape, seed=5)
    if what == "noisy":
        layer.seed = 11
    own, surrogate, keys = layer(x, v), layer.surrogate, set(vars(layer))
    with rule.forward(layer, Pass(samples=5)) as running:
        spikes, state = running(x, v)
        merged = running(x)
    assert own[0].any() and not own[0].all()
    assert_same_bits("spikes", spikes, own[0])
    assert_same_bits("state", state, own[1])
    assert merged.shape == x.shape
    assert layer.surrogate is surrogate and set(vars(layer)) == keys
    with pytest.raises(KeyError), rule.forward(layer, Pass(samples=5)):
        raise KeyError
    assert set(vars(layer)) == keys


@pytest.mark.parametrize("what", LAYERS)
def test_assg_gradient_of_a_sample_is_its_own(what):
    make, shape = LAYERS[what]
    layer = make()
    layer.requires_grad_(False)
    if what == "noisy":
        layer.fire, layer.noise = "ge", 0.0  # its random numbers are keyed by the place in the batch
    x = (1.5 * draw(5, *shape, seed=4) * torch.linspace(0.8, 1.4, STEPS, dtype=torch.float64).reshape(-1, *[1] * (1 + len(shape)))).requires_grad_()

    def gradient(samples: slice) -> Tensor:
        with ASSG().forward(layer, Pass(samples=len(x[0, samples]))) as running:
            out = running(x[:, samples])
        return gradient_of((out * torch.linspace(1, 2, STEPS).double().reshape(-1, *[1] * (out.dim() - 1))).sum(), x)[:, samples]

    together = gradient(slice(None))
    assert together.any()
    for i in range(5):
        assert_close(f"sample {i}", together[:, i : i + 1], gradient(slice(i, i + 1)), 1e-13)


def test_random_layers_look_at_the_membrane_of_their_own_pass():
    """Without a seed, the surrogate's membrane and the spikes come from the same random numbers."""
    layer, seen = NoisyLIF(0.4), []

    class Watching(PDSG):
        def surrogate(self, z, state, run):
            seen.append(z)
            return super().surrogate(z, state, run)

    x = 1.2 * draw(STEPS, 5, 2, 3, seed=1)
    with Watching().forward(layer, Pass(samples=5)) as running:
        spikes = running(x)
    v = torch.zeros_like(x[0])
    for t in range(STEPS):
        assert_close(f"z of step {t}", seen[0][t], 0.5 * v + x[t] - 1, 1e-12)
        v = (seen[0][t] + 1) * (1 - spikes[t])
    assert layer.seed is None and spikes.any()


def test_a_constant_current_and_merged_layers():
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = LIF(0.8, threshold=0.6, steps=STEPS), LIF(0.8, steps=STEPS, merged=True)

        def forward(self, images: Tensor) -> Tensor:
            return 3 * self.second(1.5 * self.first(images[None]).flatten(0, 1)).unflatten(0, (STEPS, -1)).mean(0)

    x, model = draw(5, 3, seed=2), Merged()
    for name in ("pdsg", "assg", "cba"):
        found = FGSM(EPS, adjoint=name).gradient(model, x, Y)
        assert found.gradient.any() and found.gradient.shape == x.shape
        assert_same_bits(name, found.logits, model(x))


# ---- the ensemble --------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the images that pass with a gradient to come, and without."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.counts = model, {True: [], False: []}

    def forward(self, images: Tensor) -> Tensor:
        self.counts[images.requires_grad].append(len(images))
        return self.model(images)


def chosen(attempts: list[Tensor], model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(images, fooled [members, N]) of an ensemble, from what each member found alone."""
    with torch.no_grad():
        logits = [model(images) for images in attempts]
    fooled = torch.stack([(value.argmax(1) != y) for value in logits])
    losses = torch.stack([F.cross_entropy(value, y, reduction="none").double() for value in logits])
    rank = torch.where(fooled.any(0), fooled.long().argmax(0), losses.argmax(0))
    return torch.stack(attempts)[rank, torch.arange(len(x))], fooled


@functools.cache
def single_steps(base: str) -> tuple[Tensor, ...]:
    model, (x, y) = network("snn"), digits(150)
    return tuple(make_attack(base, eps=EPS, seed=1, adjoint=name)(model, x, y) for name in EXTENDED if name != "hart")


@pytest.mark.parametrize("base", ["fgsm", "rfgsm"])
def test_single_steps_share_one_pass_bit_for_bit(base):
    model, (x, y) = network("snn"), digits(150)
    members = [name for name in EXTENDED if name != "hart"]
    for given in ("ensemble", members):
        attack, seen = Ensemble(EPS, base=base, members=given, seed=1), []
        handle = model.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append((inputs[0].requires_grad, len(inputs[0]))))
        found = attack(model, x, y)
        handle.remove()
        want, fooled = chosen(list(single_steps(base)[: len(attack.members)]), model, x, y)
        assert_same_bits("images", found, want)
        assert_same_bits("fooled", attack.fooled, fooled.to(torch.int8))
        assert 0 < fooled.any(0).sum() < len(x)
        # One pass for all spikes, and those of cba, of pdsg and of assg; one to judge each member.
        assert [size for grad, size in seen if grad] == [150] * (2 if given == "ensemble" else 4)
        assert [size for grad, size in seen if not grad] == [150] * len(attack.members)
        assert attack.zero_gradient.shape == y.shape


def test_samples_that_are_fooled_leave():
    model, (x, y) = network("snn"), digits(200)
    options = dict(steps=3, seed=1)
    attack = Ensemble(EPS, base="pgd", **options)
    counting = Counting(model)
    found = attack(counting, x, y)
    standing, want, best = torch.ones(len(x), dtype=torch.bool), x.clone(), torch.full((len(x),), -math.inf)
    for place, name in enumerate(ENSEMBLE):
        rows = standing.nonzero()[:, 0]
        tried = attack.fooled[place] >= 0
        assert_same_bits(f"{name} is tried on those that stand", tried, standing)
        alone = PGD(EPS, adjoint=name, **options)(model, x[rows], y[rows], rows)
        with torch.no_grad():
            logits = model(alone)
        hit, loss = logits.argmax(1) != y[rows], F.cross_entropy(logits, y[rows], reduction="none")
        assert_same_bits(f"fooled by {name}", attack.fooled[place][rows] == 1, hit)
        better = hit | (loss > best[rows])
        want[rows[better]], best[rows[better]] = alone[better], loss[better]
        standing[rows[hit]] = False
    assert 0 < standing.sum() < len(x)
    assert_same_bits("images", found, want)
    # Three steps of the first member, two of each other, and one first step for all of them.
    left = (attack.fooled >= 0).sum(1).tolist()
    with_gradient = [200] * 3 + [left[1]] + [size for size in left[1:-1] for _ in range(2)] + [left[-1]] * 3
    assert sorted(counting.counts[True]) == sorted(with_gradient)
    assert attack.queries.sum() == sum(map(sum, counting.counts.values()))


@pytest.mark.parametrize("base", ["bim", "mifgsm", "apgd-ce"])
def test_other_bases(base):
    model, (x, y) = network("snn"), digits(100)
    attack = Ensemble(EPS, base=base, members="triangle-1,exponential-0.3-1,cba,assg,hart-0.5", steps=4, seed=1)
    found = attack(model, x, y)
    with torch.no_grad():
        right = model(found).argmax(1) == y
    assert_same_bits("what it says", (attack.fooled == 1).any(0), ~right)
    alone = make_attack(base, eps=EPS, steps=4, seed=1, adjoint="triangle-1")
    with torch.no_grad():
        single = model(alone(model, x, y)).argmax(1) == y
    assert right.sum() < single.sum()
    assert (found - x).abs().max() <= EPS + 1e-7


def test_a_search_is_one_member():
    model, (x, y) = network("snn"), digits(60)
    attack = Ensemble(EPS, members=["hart"])
    found = attack(model, x, y)
    widths = [FGSM(EPS, adjoint=f"hart-{width:g}")(model, x, y) for width in HART_WIDTHS]
    want, fooled = chosen(widths, model, x, y)
    assert_same_bits("images", found, want)
    assert attack.members == ("hart",) and attack.fooled.tolist() == [fooled.any(0).long().tolist()]


def test_targeted_ensembles():
    model, (x, y) = network("snn"), digits(60)
    targets = (y + 1) % 10
    attack = Ensemble(0.3, base="pgd", members=["triangle-1", "exponential-0.3-1"], targeted=True, steps=5, seed=0)
    with torch.no_grad():
        reached = model(attack(model, x, targets)).argmax(1) == targets
    assert_same_bits("reached", (attack.fooled == 1).any(0), reached)
    assert reached.sum() > 10


def test_random_models_are_judged_by_the_mean():
    class Random(Small):
        def __init__(self) -> None:
            super().__init__()
            self.first = NoisyLIF(0.4)

    model = Random()
    passes = Counting(model)
    attack = Ensemble(EPS, members=["triangle-1", "bptr"], eot=3, seed=2)
    assert_same_bits("repeats", attack(model, X, Y), attack(model, X, Y))
    attack(passes, X, Y)
    assert passes.counts == {True: [5] * 3, False: [5] * 6}


def test_a_model_without_spiking_layers():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    attack = Ensemble(EPS)
    with pytest.warns(UserWarning, match="no spiking layer of fastsnn"):
        found = attack(model, X, Y)
    assert_same_bits("images", found, FGSM(EPS)(model, X, Y))
    assert attack.fooled.shape == (19, 5) and (attack.fooled[0] >= 0).all() and (attack.fooled[1:] == -1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ensemble(EPS, members=["ste"])(model, X, Y)


def test_what_it_is_made_of():
    attack = make_attack("ensemble", eps="8/255", base="pgd", members="bptr, cba", steps=20, step_size="2/255", seed=4)
    assert attack.members == ("bptr", "cba") and attack.options()["steps"] == 20
    again = make_attack("ensemble", **attack.options())
    assert again.options() == attack.options() and again.members == attack.members
    custom = Ensemble(EPS, members=[surrogates.ATan(2.0), ("spatial", surrogates.Triangle(2.0)), lambda layer, mean, var: surrogates.Rectangle(1.0)])
    assert len(custom.members) == 3 and (custom(Small(), X, Y) != X).any()
    assert Ensemble(EPS, adjoint="rga").members == ("rga",)
    assert Ensemble(EPS, members="extended").members == EXTENDED
    assert isinstance(resolve(APPROXIMATIONS["ste"]), Approximation)


BAD = {
    "member": (lambda: Ensemble(EPS, members=["triangle-1", "exponental-1-1"]), ValueError, "Did you mean 'exponential-1-1'"),
    "members": (lambda: Ensemble(EPS, members=[]), ValueError, "holds nothing"),
    "twice": (lambda: Ensemble(EPS, members="ste,ste"), ValueError, "'ste' twice"),
    "members' type": (lambda: members_of(3), TypeError, "names of APPROXIMATIONS"),
    "both": (lambda: Ensemble(EPS, members=["ste"], adjoint="cba"), ValueError, "one of them"),
    "base": (lambda: Ensemble(EPS, base="pdg"), ValueError, "Did you mean 'pgd'"),
    "base by instance": (lambda: Ensemble(EPS, base=FGSM(EPS)), TypeError, "a name of ATTACKS or a class"),
    "base of itself": (lambda: Ensemble(EPS, base="ensemble"), ValueError, "takes no gradient"),
    "base without gradients": (lambda: Ensemble(EPS, base="gaussian"), ValueError, "takes no gradient"),
    "option": (lambda: make_attack("ensemble", eps=EPS, base="pgd", step=3), ValueError, "Did you mean 'steps'"),
    "adjoint": (lambda: FGSM(EPS, adjoint="triangle-4"), ValueError, "Did you mean 'triangle"),
    "share": (lambda: ASSG(share=0.5), ValueError, "between 0 and 0.5"),
    "beta": (lambda: ASSG(beta=1.0), ValueError, "beta in"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, kind, words = BAD[what]
    with pytest.raises(kind, match=words):
        call()


# ---- masked gradients ----------------------------------------------------------------------------------------------------


def test_planted_masked_gradients_are_seen_through():
    """A surrogate so narrow that no membrane lies in it hides the gradient of training, and nothing else."""
    (x, y), eps = digits(200), 0.12
    undefended, masked = network("snn"), network("snn")
    for _, layer in masked.spiking_layers():
        layer.surrogate = surrogates.Rectangle(1e-3)

    def accuracy(model: nn.Module, attack: Attack | None) -> float:
        with torch.no_grad():
            return float((model(x if attack is None else attack(model, x, y)).argmax(1) == y).double().mean())

    plain, ensemble = PGD(eps, steps=7, seed=0), Ensemble(eps, base="pgd", steps=7, seed=0)
    clean, worst = accuracy(masked, None), accuracy(masked, ensemble)
    assert accuracy(masked, plain) > 0.9 * clean and plain.zero_gradient.double().mean() > 0.5
    assert accuracy(undefended, plain) < 0.6 * clean
    assert worst < 0.5 * clean and abs(worst - accuracy(undefended, ensemble)) < 0.05
