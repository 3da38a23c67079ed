"""Attacks: their exact forms, what every attack keeps to, and what it answers to bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_bits
from fastsnn import LIF, NoisyLIF, adjoint, surrogates
from fastsnn.attacks import ATTACKS, FGSM, LOSSES, PGD, Attack, Streams, make_attack, parse_eps
from fastsnn.attacks.base import NORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

EPS = 8 / 255
every_attack = pytest.mark.parametrize("name", ATTACKS)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


X, Y = draw(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 1, 0])


def cnn(seed: int = 0) -> nn.Module:
    """A model that has nothing to do with spikes, with everything whose mode matters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 4))


class Spiking(nn.Module):
    def __init__(self, neuron: nn.Module | None = None, steps: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.neuron, self.out, self.steps = nn.Conv2d(3, 8, 3), neuron or LIF(decay=0.9), nn.Linear(8 * 36, 4), steps

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images * 4)[None].expand(self.steps, *(-1,) * 4).contiguous()
        return self.out(self.neuron(x).flatten(2)).mean(0)


MODELS = {"cnn": cnn, "spiking": Spiking}
every_model = pytest.mark.parametrize("model", MODELS)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the cross-entropy in eval mode, by plain PyTorch."""
    modes = [module.training for module in model.modules()]
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model.eval()(x), y, reduction="sum")
    for module, mode in zip(model.modules(), modes):
        module.training = mode
    return torch.autograd.grad(loss, x)[0]


# ---- exact forms -------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm(model, targeted):
    model = MODELS[model]()
    sign = -1 if targeted else 1
    raw = X + EPS * sign * input_gradient(model, X, Y).sign()
    found = FGSM(EPS, targeted=targeted)(model, X, Y)
    clipped = (raw < 0) | (raw > 1) | ((raw.double() - X.double()).abs() > EPS)
    assert not clipped.all() and (found != X).any()
    assert_same_bits("where nothing is clipped", found[~clipped], raw[~clipped])
    # Elsewhere it is the end of the range, or what rounding led outside, back by less than a float of eps or of the pixel.
    float_of = torch.maximum(raw, torch.tensor(EPS)) * 2**-23
    assert ((found - raw.clamp(0, 1)).abs() <= float_of)[clipped].all()


@every_model
def test_pgd(model):
    model, attack = MODELS[model](), PGD(EPS, steps=3, step_size=0.02, seed=5)
    x = X + EPS * (2 * Streams(5, torch.arange(len(X))).uniform(3, 8, 8) - 1)
    for _ in range(4):
        x = (X + (x - X).clamp(-EPS, EPS)).clamp(0, 1)
        last, x = x, x + 0.02 * input_gradient(model, x, Y).sign()
    found = attack(model, X, Y)
    torch.testing.assert_close(found, last, rtol=0, atol=6e-8)  # an ulp: of the guarantee that nothing is outside
    assert (found != FGSM(EPS)(model, X, Y)).any()


def test_pgd_steps_and_start():
    assert PGD(EPS, steps=10).step_size == 2.5 * EPS / 10
    model = cnn()
    assert_same_bits("one step from the image", PGD(EPS, steps=1, step_size=EPS, random_start=False)(model, X, Y), FGSM(EPS)(model, X, Y))
    start = PGD(EPS, steps=1, step_size=0.0, seed=3)(model, X, Y) - X
    assert start.abs().max() > 0.9 * EPS and start.abs().mean() == pytest.approx(EPS / 2, rel=0.1)


def test_targets_are_approached_and_labels_left():
    model = cnn().eval()
    before = F.cross_entropy(model(X), Y)
    for targeted in (False, True):
        after = F.cross_entropy(model(PGD(0.1, targeted=targeted)(model, X, Y)), Y)
        assert (after < before) == targeted


def test_adjoints():
    model = Spiking()
    for choice in ("bptr", surrogates.Exponential(0.3, 1.0), ("spatial", surrogates.ATan(2.0)), lambda layer, mean, var: surrogates.Rectangle(4.0)):
        with adjoint(*choice) if isinstance(choice, tuple) else adjoint(choice):
            want = FGSM(EPS)(model, X, Y)
        assert_same_bits(repr(choice), FGSM(EPS, adjoint=choice)(model, X, Y), want)
    assert (FGSM(EPS, adjoint="bptr")(model, X, Y) != FGSM(EPS)(model, X, Y)).any()


def test_another_loss():
    def margin(logits: Tensor, labels: Tensor) -> Tensor:
        rest = logits.scatter(1, labels[:, None], -math.inf).amax(1)
        return rest - logits.gather(1, labels[:, None])[:, 0]

    model = cnn().eval()
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(margin(model(x), Y).sum(), x)
    result = FGSM(EPS, loss=margin).gradient(model, X, Y)
    assert_same_bits("gradient", result.gradient, gradient)
    assert_same_bits("loss", result.loss, margin(model(X), Y).detach())
    assert_same_bits("cross-entropy", LOSSES["ce"](model(X), Y), F.cross_entropy(model(X), Y, reduction="none"))


def test_expectation_over_transformation():
    model, attack = Spiking(NoisyLIF(0.4)), FGSM(EPS, eot=4)
    torch.manual_seed(0)
    found = attack.gradient(model, X, Y)
    torch.manual_seed(0)
    parts = [FGSM(EPS).gradient(model, X, Y) for _ in range(4)]
    assert (parts[0].gradient != parts[1].gradient).any(), "the model is not random"
    for name in ("gradient", "logits", "loss"):
        torch.testing.assert_close(getattr(found, name), sum(getattr(part, name) for part in parts) / 4)


# ---- what every attack keeps to ----------------------------------------------------------------------------------------


@every_attack
@every_model
def test_the_model_is_left_as_it_was(name, model):
    model = MODELS[model]().train()
    list(model.children())[-1].eval()
    next(model.parameters()).requires_grad_(False)
    seen = []
    model.register_forward_hook(lambda *_: seen.append([module.training for module in model.modules()]))
    modes = [module.training for module in model.modules()]
    asked = [value.requires_grad for value in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = make_attack(name, eps=EPS)(model, X, Y)
    assert seen and not any(map(any, seen)), "crafted outside of eval mode"
    assert [module.training for module in model.modules()] == modes and [value.requires_grad for value in model.parameters()] == asked
    assert all(value.grad is None for value in model.parameters())
    for key, value in model.state_dict().items():
        assert_same_bits(key, value, state[key])
    assert not found.requires_grad and found.grad_fn is None and (found != X).any()


@every_attack
def test_the_model_is_left_as_it_was_after_an_error(name):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            raise KeyError("broken")

    model = Broken().train()
    with pytest.raises(KeyError):
        make_attack(name, eps=EPS)(model, X, Y)
    assert all(module.training for module in model.modules()) and all(value.requires_grad for value in model.parameters())


def test_an_attack_that_calls_backward_leaves_no_gradient():
    class Backward(Attack):
        name = "backward"

        def run(self, model, images, labels, generator):
            with torch.enable_grad():
                x = images.clone().requires_grad_()
                F.cross_entropy(self.logits(model, x, labels), labels).backward()
            return images + self.eps * x.grad.sign()

    model = cnn()
    assert_same_bits("the same as FGSM", Backward(EPS)(model, X, Y), FGSM(EPS)(model, X, Y))
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


@every_attack
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around(name, mode):
    model, attack = cnn(), make_attack(name, eps=EPS, seed=0)
    want = attack(model, X, Y)
    with mode():
        assert_same_bits("adversarial", attack(model, X.clone(), Y.clone()), want)


@every_attack
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_layout(name, dtype):
    model, attack = cnn().to(dtype), make_attack(name, eps=EPS, seed=0)
    x = X.to(dtype)
    found = attack(model, x, Y)
    assert found.dtype == dtype and found.stride() == x.stride()
    last = x.contiguous(memory_format=torch.channels_last)
    found = attack(model, last, Y)
    assert found.dtype == dtype and found.stride() == last.stride() and found.data_ptr() != last.data_ptr()


@every_attack
def test_no_room_and_no_samples(name):
    model = cnn()
    assert_same_bits("eps = 0", make_attack(name, eps=0.0)(model, X, Y), X)
    assert make_attack(name, eps=EPS)(model, X[:0], Y[:0]).shape == (0, 3, 8, 8)


@every_attack
def test_zero_gradients_are_told(name):
    class Half(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :4] * (torch.arange(len(images)) % 2)[:, None]

    attack = make_attack(name, eps=EPS)
    found = attack(Half(), X, Y)
    assert attack.zero_gradient.tolist() == [True, False] * 3
    assert (found != X).flatten(1).any(1)[1::2].all()


class Garbage(Attack):
    """Asks for whatever it likes; the call has to keep it within bounds."""

    name, norms = "garbage", NORMS

    def run(self, model, images, labels, generator):
        wild = generator.normal(*images.shape[1:], dtype=images.dtype) * generator.uniform(*images.shape[1:], dtype=images.dtype) ** 9
        return images + wild * (3 if generator.integers(2).any() else self.eps)


PIXELS = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1 / 255, 254 / 255, 1e-40, 1e-8, 1 - 2**-24]), st.floats(0, 1, width=32))
SIZES = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-12, 1e-45, *(k / 255 for k in (1, 2, 4, 8, 16, 32))]), st.floats(0, 1))


@settings(max_examples=150)
@given(
    eps=SIZES,
    pixels=st.lists(PIXELS, min_size=8, max_size=8),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    norm=st.sampled_from(NORMS),
    seed=st.integers(0, 2**32),
)
def test_nothing_is_outside_of_the_ball_or_the_range(eps, pixels, dtype, norm, seed):
    x = torch.tensor(pixels, dtype=torch.float64).to(dtype).reshape(2, 2, 2, 1)
    found = Garbage(eps, norm=norm, seed=seed)(nn.Identity(), x, torch.zeros(2, dtype=torch.int64))
    moved = (found.double() - x.double()).flatten(1)
    assert found.min() >= 0 and found.max() <= 1
    if norm == "linf":
        assert moved.abs().max() <= eps and (found - x).abs().max() <= eps
    else:
        assert (moved.norm(dim=1) <= eps * (1 + 1e-14)).all()


@settings(max_examples=60)
@given(eps=SIZES, seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_the_ball_is_used_to_its_edge(eps, seed, dtype):
    """The guarantee costs a float, not more: pixels that want to be at the edge are there."""

    class Edge(Attack):
        name = "edge"

        def run(self, model, images, labels, generator):
            return images + self.eps * generator.signs(*images.shape[1:], dtype=images.dtype)

    x = 0.25 + draw(4, 8, seed=seed).to(dtype) / 2
    moved = (Edge(eps, seed=seed)(nn.Identity(), x, torch.zeros(4, dtype=torch.int64)).double() - x.double()).abs()
    room = torch.minimum(torch.minimum(x, 1 - x).double(), torch.tensor(eps, dtype=torch.float64))
    assert (moved <= eps).all() and (moved >= room - 1.2 * torch.finfo(dtype).eps).all()


def test_l2_projection():
    attack = Garbage(0.5, norm="l2")
    far = X + draw(*X.shape, seed=4)
    found = attack.project(far, X)
    assert ((found - X).flatten(1).norm(dim=1) <= 0.5 + 1e-6).all()
    near = X + 1e-3 * (0.5 - X)
    torch.testing.assert_close(attack.project(near, X), near)
    interior = 0.4 + X / 5
    pull = interior + 0.2 * draw(*X.shape, seed=5)
    moved = attack.project(pull, interior) - interior
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((6,), 0.5))
    torch.testing.assert_close(F.cosine_similarity(moved.flatten(1), (pull - interior).flatten(1)), torch.ones(6))


# ---- random numbers ----------------------------------------------------------------------------------------------------


@every_attack
def test_seeds(name):
    model, attack = Spiking(NoisyLIF(0.4)), make_attack(name, eps=EPS, seed=7)
    state = torch.get_rng_state()
    first = attack(model, X, Y)
    assert_same_bits("torch's generator", torch.get_rng_state(), state)
    assert_same_bits("a second call", attack(model, X, Y), first)
    assert (make_attack(name, eps=EPS, seed=8)(model, X, Y) != first).any()
    attack = make_attack(name, eps=EPS)
    torch.manual_seed(0)
    first, second = attack(model, X, Y), attack(model, X, Y)
    torch.manual_seed(0)
    assert_same_bits("torch's generator decides", attack(model, X, Y), first)
    assert (first != second).any()


class Pixels(nn.Module):
    """Logits without a sum over pixels: no rounding that depends on the batch."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1)[:, :4] - 0.5) * 3 * images.flatten(1)[:, 4:8]


@every_attack
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_do_not_matter(name, batch):
    attack, places = make_attack(name, eps=EPS, seed=7), torch.arange(len(X))
    whole = attack(Pixels(), X, Y, places)
    parts = [attack(Pixels(), X[i : i + batch], Y[i : i + batch], places[i : i + batch]) for i in range(0, len(X), batch)]
    assert_same_bits("adversarial", torch.cat(parts), whole)
    turned = attack(Pixels(), X.flip(0), Y.flip(0), places.flip(0))
    assert_same_bits("in another order", turned.flip(0), whole)


def split_mix(seed: int, index: int, count: int) -> list[int]:
    """The numbers of a stream in Python's integers."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = mix(mix(seed & mask) + (index + 1) * golden & mask)
    return [mix(key + k * golden & mask) for k in range(1, count + 1)]


def test_streams_are_splitmix64():
    # The published sequence from the state 1234567: the output function and the constant of the step.
    from fastsnn.attacks.streams import GOLDEN, _mix

    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [value % 2**64 for value in _mix(1234567 + torch.arange(1, 6) * GOLDEN).tolist()] == known
    for seed in (0, 7, -1, 2**63 - 1):
        streams = Streams(seed, torch.tensor([0, 3, 10**9]))
        found = torch.cat([streams.bits(2).flatten(1), streams.bits(3, 1).flatten(1)], 1)
        for row, index in zip(found.tolist(), (0, 3, 10**9)):
            assert [value % 2**64 for value in row] == split_mix(seed, index, 5)
    assert_same_bits("a tensor as seed", Streams(torch.tensor([7]), torch.arange(3)).bits(4), Streams(7, torch.arange(3)).bits(4))


def test_streams_of_some_samples_go_on():
    streams = Streams(1, torch.arange(5))
    streams.uniform(3)
    part = streams[torch.tensor([True, False, True, False, True])]
    assert len(part) == 3
    assert_same_bits("numbers", part.bits(2), streams.bits(2)[::2])


def test_distributions():
    streams = Streams(3, torch.arange(200))
    for dtype in (torch.float32, torch.float64):
        uniform, normal, signs = streams.uniform(500, dtype=dtype), streams.normal(500, dtype=dtype), streams.signs(500, dtype=dtype)
        assert uniform.dtype == normal.dtype == signs.dtype == dtype
        assert uniform.min() >= 0 and uniform.max() < 1
        # 1e5 numbers: five standard errors of the mean, of the variance
        assert abs(uniform.mean() - 0.5) < 5 * 12**-0.5 / 316 and abs(uniform.var() - 1 / 12) < 5 * 180**-0.5 / 316
        assert abs(normal.mean()) < 5 / 316 and abs(normal.var() - 1) < 5 * 2**0.5 / 316
        assert abs(signs.mean()) < 5 / 316 and set(signs.unique().tolist()) == {-1, 1}
    counts = streams.integers(7, 500).flatten().bincount(minlength=7)
    assert len(counts) == 7 and ((counts - 1e5 / 7).abs() < 5 * (1e5 / 7) ** 0.5).all()
    neighbours = torch.corrcoef(Streams(3, torch.arange(50)).normal(2000))
    assert (neighbours - torch.eye(50)).abs().max() < 5 / 2000**0.5


# ---- bad input ---------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "pixels above 1": (X * 255, Y, ValueError, r"images holds values from .* wanted \[0, 1\]"),
    "pixels below 0": (X - 0.5, Y, ValueError, "Pass unnormalised pixels"),
    "NaN": (X.masked_fill(X > 0.99, math.nan), Y, ValueError, "NaN"),
    "bytes": ((X * 255).byte(), Y, TypeError, r"images.float\(\) / 255"),
    "no batch": (X[0, 0, 0], Y, ValueError, r"images\[None\]"),
    "not a tensor": (X.tolist(), Y, TypeError, "images is list"),
    "labels as float": (X, Y.float(), TypeError, r"labels.long\(\)"),
    "labels as int32": (X, Y.int(), TypeError, r"labels is torch.int32"),
    "labels as one-hot": (X, F.one_hot(Y, 4), ValueError, r"labels has shape \[6, 4\]; wanted \[6\]"),
    "too few labels": (X, Y[:3], ValueError, r"wanted \[6\]"),
    "a label too high": (X, Y + 3, ValueError, "labels holds 6, but the model has 4 classes"),
    "a label below 0": (X, Y - 1, ValueError, "labels holds -1"),
}


@every_attack
@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input(name, what):
    x, y, error, words = BAD_INPUT[what]
    with pytest.raises(error, match=words):
        make_attack(name, eps=EPS)(cnn(), x, y)


class Returns(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor):
        return self.function(images.flatten(1)[:, :4])


BAD_MODELS = {
    "probabilities": (Returns(lambda z: z.softmax(1)), ValueError, "Take the softmax out"),
    "one number": (Returns(lambda z: z[:, 0]), ValueError, r"returned torch.float32 \[6\] for 6 images"),
    "one class": (Returns(lambda z: z[:, :1]), ValueError, "two classes or more"),
    "steps": (Returns(lambda z: z[None]), ValueError, r"\[1, 6, 4\]"),
    "half of the batch": (Returns(lambda z: z[:3]), ValueError, r"wanted float logits \[6, classes\]"),
    "a tuple": (Returns(lambda z: (z, z)), ValueError, "returned tuple"),
    "classes": (Returns(lambda z: z.argmax(1)), ValueError, "int64"),
    "detached": (Returns(lambda z: z.detach()), ValueError, "do not depend on its images"),
    "NaN": (Returns(lambda z: z * math.nan), FloatingPointError, "gradient holds NaN"),
    "a function": (lambda x: x.flatten(1)[:, :4], TypeError, "wanted a torch.nn.Module"),
}


@every_attack
@pytest.mark.parametrize("what", BAD_MODELS)
def test_bad_models(name, what):
    model, error, words = BAD_MODELS[what]
    with pytest.raises(error, match=words):
        make_attack(name, eps=EPS)(model, X, Y)


def test_log_probabilities_are_logits():
    model = Returns(lambda z: z.log_softmax(1))
    assert (FGSM(EPS)(model, X, Y) != X).any()


BAD_OPTIONS = {
    "eps below 0": (lambda: FGSM(-0.1), ValueError, "eps is -0.1"),
    "eps in bytes": (lambda: FGSM(8), ValueError, "Divide by 255"),
    "eps NaN": (lambda: FGSM(math.nan), ValueError, "eps is"),
    "eps infinite": (lambda: PGD(math.inf), ValueError, "eps is inf"),
    "eps as a word": (lambda: PGD("eight"), ValueError, "PGD: eps is 'eight'"),
    "norm": (lambda: FGSM(EPS, norm="l_inf"), ValueError, "Did you mean 'linf'"),
    "norm that it does not keep": (lambda: FGSM(EPS, norm="l2"), ValueError, "this attack keeps to linf"),
    "adjoint": (lambda: FGSM(EPS, adjoint="bptx"), ValueError, "Did you mean"),
    "adjoint by class": (lambda: FGSM(EPS, adjoint=surrogates.Triangle), TypeError, "an instance"),
    "seed": (lambda: FGSM(EPS, seed=1.5), TypeError, "seed is 1.5"),
    "loss": (lambda: FGSM(EPS, loss="cee"), ValueError, "Did you mean 'ce'"),
    "eot": (lambda: FGSM(EPS, eot=0), ValueError, "eot is 0"),
    "steps": (lambda: PGD(EPS, steps=0), ValueError, "steps is 0"),
    "step_size": (lambda: PGD(EPS, step_size=-1), ValueError, "-1"),
    "name": (lambda: make_attack("pgdd", eps=EPS), ValueError, "Did you mean 'pgd'"),
    "option": (lambda: make_attack("pgd", eps=EPS, step=3), ValueError, "Did you mean 'steps'"),
    "no eps": (lambda: make_attack("pgd"), ValueError, "eps is missing"),
    "indices": (lambda: FGSM(EPS)(cnn(), X, Y, torch.arange(3)), TypeError, r"wanted int64 \[6\]"),
    "loss of a batch": (lambda: FGSM(EPS, loss=F.cross_entropy)(cnn(), X, Y), ValueError, "one number for each sample"),
    "indices of streams": (lambda: Streams(0, torch.arange(3.0)), TypeError, "indices is"),
    "seed of streams": (lambda: Streams(2**64, torch.arange(3)), TypeError, "64 bits"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_bad_options(what):
    call, error, words = BAD_OPTIONS[what]
    with pytest.raises(error, match=words):
        call()


def test_parse_eps():
    assert parse_eps("8/255") == 8 / 255 and parse_eps(0.03) == parse_eps("0.03") == 0.03 and parse_eps(1) == 1.0
    for bad in ("", "8/0", "-8/255", "a/b", "nan", "1/2/3"):
        with pytest.raises(ValueError, match="eps is"):
            parse_eps(bad)


@every_attack
def test_options_say_how_to_make_it_again(name):
    attack = make_attack(name, eps="8/255", seed=3, adjoint="bptr")
    again = make_attack(name, **attack.options())
    assert again.options() == attack.options() and repr(again) == repr(attack)
    assert_same_bits("adversarial", again(Spiking(), X, Y), attack(Spiking(), X, Y))
