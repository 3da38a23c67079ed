"""Attacks: what every attack keeps to, and what it answers to bad input."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from attack_cases import EPS, MODELS, Pixels, Returns, Spiking, X, Y, asks, cnn, draw, small, targetable
from cases import assert_same_bits
from fastsnn import NoisyLIF, surrogates
from fastsnn.attacks import ATTACKS, FGSM, MIFGSM, MTPGD, PGD, RFGSM, Attack, Streams, make_attack, parse_eps
from fastsnn.attacks.base import NORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

every_attack = pytest.mark.parametrize("name", ATTACKS)
every_model = pytest.mark.parametrize("model", MODELS)
#: Of all attacks but noise.
who_asks = pytest.mark.parametrize("name", asks("gradient", "scores", "decisions"))
follows_gradients = pytest.mark.parametrize("name", asks("gradient"))
# Models here are tiny, random, or without a spiking layer on purpose.
pytestmark = [pytest.mark.filterwarnings("ignore:.*random at inference"), pytest.mark.filterwarnings("ignore:.*holds no spiking layer")]


# ---- what every attack keeps to ----------------------------------------------------------------------------------------


@every_attack
@every_model
def test_the_model_is_left_as_it_was(name, model):
    model = MODELS[model]()
    answers = model.eval()(X).argmax(1)  # attacks that look for the nearest image leave one that is wrong already
    model.train()
    list(model.children())[-1].eval()
    next(model.parameters()).requires_grad_(False)
    seen = []
    model.register_forward_hook(lambda *_: seen.append([module.training for module in model.modules()]))
    modes = [module.training for module in model.modules()]
    asked = [value.requires_grad for value in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = small(name)(model, X, answers)
    assert bool(seen) == (ATTACKS[name].access != "nothing") and not any(map(any, seen)), "crafted outside of eval mode"
    assert [module.training for module in model.modules()] == modes and [value.requires_grad for value in model.parameters()] == asked
    assert all(value.grad is None for value in model.parameters())
    for key, value in model.state_dict().items():
        assert_same_bits(key, value, state[key])
    assert not found.requires_grad and found.grad_fn is None and (found != X).any()


@who_asks
def test_the_model_is_left_as_it_was_after_an_error(name):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            raise KeyError("broken")

    model = Broken().train()
    with pytest.raises(KeyError):
        small(name)(model, X, Y)
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
    model, attack = cnn(), small(name, seed=0)
    want = attack(model, X, Y)
    with mode():
        assert_same_bits("adversarial", attack(model, X.clone(), Y.clone()), want)


@every_attack
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_layout(name, dtype):
    model, attack = cnn().to(dtype), small(name, seed=0)
    x = X.to(dtype)
    found = attack(model, x, Y)
    assert found.dtype == dtype and found.stride() == x.stride()
    last = x.contiguous(memory_format=torch.channels_last)
    found = attack(model, last, Y)
    assert found.dtype == dtype and found.stride() == last.stride() and found.data_ptr() != last.data_ptr()


@every_attack
def test_no_room_and_no_samples(name):
    model = cnn()
    assert_same_bits("eps = 0", small(name, eps=0.0)(model, X, Y), X)
    assert small(name)(model, X[:0], Y[:0]).shape == (0, 3, 8, 8)


@follows_gradients
def test_zero_gradients_are_told(name):
    model = Returns(lambda z: z * (torch.arange(len(z)) % 2)[:, None])
    attack = small(name)
    found = attack(model, X, model(X).argmax(1))
    assert attack.zero_gradient.tolist() == [True, False] * 3
    assert (found != X).flatten(1).any(1)[1::2].all()


@pytest.mark.parametrize("name", asks("scores", "decisions", "nothing"))
def test_what_takes_no_gradient(name):
    attack = small(name)
    attack(Returns(lambda z: z.detach()), X, Y)
    assert attack.zero_gradient is None


@every_attack
def test_queries_are_counted(name):
    """Each sample's forward passes: as many in all as the model was given images, and none where nothing is asked."""
    model, attack, given = Pixels(), small(name, seed=0), []
    model.register_forward_hook(lambda module, inputs, output: given.append(len(inputs[0])))
    for labels in (Y, model(X).argmax(1)):
        given.clear()
        attack(model, X, labels)
        assert attack.queries.shape == Y.shape and attack.queries.dtype == torch.int64
        assert int(attack.queries.sum()) == sum(given) and (int(attack.queries.max()) > 0) == (attack.access != "nothing")
    assert not {"queries", "zero_gradient", "fooled"} & set(attack.options())


@pytest.mark.parametrize("name, norm", [(name, norm) for name, attack in ATTACKS.items() for norm in attack.norms])
def test_norms(name, norm):
    """Every attack moves its images in each norm that it names, and stays within the ball and the range."""
    attack = small(name, eps=0.05 if norm == "linf" else 0.4, norm=norm, seed=1)
    model = cnn().eval()
    found = attack(model, X, model(X).argmax(1))
    assert found.min() >= 0 and found.max() <= 1 and (found != X).any()
    if attack.radius < math.inf:
        moved = (found.double() - X.double()).flatten(1)
        size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
        assert (size <= attack.radius + 1e-7).all() and (attack.unbounded or size.max() > attack.radius / 3)


class Garbage(Attack):
    """Asks for whatever it likes; the call has to keep it within bounds."""

    name, norms = "garbage", NORMS

    def run(self, model, images, labels, generator):
        wild = generator.normal(*images.shape[1:], dtype=images.dtype) * generator.uniform(*images.shape[1:], dtype=images.dtype) ** 9
        return images + wild * (3 if generator.integers(2).any() else self.eps)


PIXELS = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1 / 255, 254 / 255, 1e-40, 1e-8, 1 - 2**-24]), st.floats(0, 1, width=32))
SIZES = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-12, 1e-45, *(k / 255 for k in (1, 2, 4, 8, 16, 32))]), st.floats(0, 1))


@settings(max_examples=100)
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
    if norm == "linf":  # as they come out in the images' arithmetic, which is off by a rounding
        assert (found >= x - eps).all() and (found <= x + eps).all()
        assert moved.abs().max() <= eps + torch.finfo(dtype).eps
    else:
        assert (moved.norm(dim=1) <= eps * (1 + 1e-14)).all()


@settings(max_examples=40)
@given(eps=SIZES, seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_the_ball_is_used_to_its_edge(eps, seed, dtype):
    """Pixels that want to be at the edge of the ball, or of the range, are there: the guarantee costs nothing."""

    class Edge(Attack):
        name = "edge"

        def run(self, model, images, labels, generator):
            return images + self.eps * generator.signs(*images.shape[1:], dtype=images.dtype)

    x, signs = draw(4, 8, seed=seed).to(dtype), Streams(seed, torch.arange(4)).signs(8, dtype=dtype)
    found = Edge(eps, seed=seed)(nn.Identity(), x, torch.zeros(4, dtype=torch.int64))
    assert_same_bits("at the edge", found, (x + eps * signs).clamp(0, 1))


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
    model, attack = Spiking(NoisyLIF(0.4)), small(name, seed=7)
    state = torch.get_rng_state()
    first = attack(model, X, Y)
    assert_same_bits("torch's generator", torch.get_rng_state(), state)
    assert_same_bits("a second call", attack(model, X, Y), first)
    assert (small(name, seed=8)(model, X, Y) != first).any()
    attack = small(name)
    torch.manual_seed(0)
    first, second = attack(model, X, Y), attack(model, X, Y)
    torch.manual_seed(0)
    assert_same_bits("torch's generator decides", attack(model, X, Y), first)
    assert (first != second).any()


@every_attack
def test_batches_do_not_matter(name):
    attack, places = small(name, seed=7), torch.arange(len(X))
    whole = attack(Pixels(), X, Y, places)
    for batch in (1, 4):
        parts = [attack(Pixels(), X[i : i + batch], Y[i : i + batch], places[i : i + batch]) for i in range(0, len(X), batch)]
        assert_same_bits(f"batches of {batch}", torch.cat(parts), whole)
    turned = attack(Pixels(), X.flip(0), Y.flip(0), places.flip(0))
    assert_same_bits("in another order", turned.flip(0), whole)


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


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input(what):
    x, y, error, words = BAD_INPUT[what]
    for name in asks("gradient", "scores", "decisions") if what == "a label too high" else ATTACKS:
        with pytest.raises(error, match=words):
            small(name)(cnn(), x, y)


BAD_MODELS = {
    "probabilities": (Returns(lambda z: z.softmax(1)), ValueError, "Take the softmax out"),
    "one number": (Returns(lambda z: z[:, 0]), ValueError, r"returned torch.float32 \[6\] for 6 images"),
    "one class": (Returns(lambda z: z[:, :1]), ValueError, "two classes or more"),
    "steps": (Returns(lambda z: z[None]), ValueError, r"\[1, 6, 4\]"),
    "half of the batch": (Returns(lambda z: z[:3]), ValueError, r"wanted float logits \[6, classes\]"),
    "a tuple": (Returns(lambda z: (z, z)), ValueError, "returned tuple"),
    "classes": (Returns(lambda z: z.argmax(1)), ValueError, "int64"),
    "detached": (Returns(lambda z: z.detach()), ValueError, "do not depend on its images"),
    "NaN": (Returns(lambda z: z * math.nan), FloatingPointError, "gradient hold NaN"),
    "a function": (lambda x: x.flatten(1)[:, :4], TypeError, "wanted a torch.nn.Module"),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_bad_models(what):
    model, error, words = BAD_MODELS[what]
    names = asks("gradient") if what == "detached" else ATTACKS if what == "a function" else asks("gradient", "scores", "decisions")
    for name in names:
        with pytest.raises(error, match=words):
            small(name)(model, X, Y)


def test_log_probabilities_are_logits():
    model = Returns(lambda z: z.log_softmax(1))
    assert (FGSM(EPS)(model, X, Y) != X).any()


BAD_OPTIONS = {
    "eps below 0": (lambda: FGSM(-0.1), ValueError, "eps is -0.1"),
    "eps in bytes": (lambda: FGSM(8), ValueError, "Divide by 255"),
    "eps NaN": (lambda: FGSM(math.nan), ValueError, "eps is"),
    "eps infinite": (lambda: PGD(math.inf), ValueError, "eps is inf"),
    "the model as eps": (lambda: PGD(cnn(), eps=EPS), TypeError, "eps"),
    "the model in place of eps": (lambda: PGD(cnn()), TypeError, "Give the model to the call"),
    "eps as a word": (lambda: PGD("eight"), ValueError, "PGD: eps is 'eight'"),
    "norm": (lambda: FGSM(EPS, norm="l_inf"), ValueError, "Did you mean 'linf'"),
    "norm that it does not keep": (lambda: RFGSM(EPS, norm="l2"), ValueError, "this attack keeps to linf"),
    "adjoint": (lambda: FGSM(EPS, adjoint="bptx"), ValueError, "Did you mean"),
    "adjoint by class": (lambda: FGSM(EPS, adjoint=surrogates.Triangle), TypeError, "an instance"),
    "seed": (lambda: FGSM(EPS, seed=1.5), TypeError, "seed is 1.5"),
    "loss": (lambda: FGSM(EPS, loss="cee"), ValueError, "Did you mean 'ce'"),
    "eot": (lambda: FGSM(EPS, eot=0), ValueError, "eot is 0"),
    "steps": (lambda: PGD(EPS, steps=0), ValueError, "steps is 0"),
    "step_size": (lambda: PGD(EPS, step_size=-1), ValueError, "-1"),
    "alpha": (lambda: RFGSM(EPS, alpha="9/255"), ValueError, "larger than eps"),
    "restarts": (lambda: PGD(EPS, restarts=0), ValueError, "restarts is 0"),
    "restarts of the same": (lambda: PGD(EPS, random_start=False, restarts=2), ValueError, "all would be the same"),
    "decay": (lambda: MIFGSM(EPS, decay=-1), ValueError, "decay is -1"),
    "momentum": (lambda: MTPGD(EPS, momentum=math.nan), ValueError, "momentum is nan"),
    "targets": (lambda: MTPGD(EPS, targets=0), ValueError, "targets is 0"),
    "targeted by itself": (lambda: MTPGD(EPS, targeted=True), ValueError, "PGD\\(targeted=True\\)"),
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
    attack = small(name, eps="8/255", seed=3, adjoint="bptr")
    again = make_attack(name, **attack.options())
    assert again.options() == attack.options() and repr(again) == repr(attack)
    assert_same_bits("adversarial", again(Spiking(), X, Y), attack(Spiking(), X, Y))


# ---- what evaluations go wrong by ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", targetable())
def test_a_targeted_attack_without_targets(name):
    """Nothing as labels, or what the model answers already: the true classes, mostly."""
    model, attack = Returns(lambda z: z), small(name, eps="1/255", targeted=True)
    answers = model(X).argmax(1)
    with pytest.raises(ValueError, match=r"without targets; wanted the classes to reach as labels, int64 \[6\]"):
        attack(model, X)
    with pytest.raises(ValueError, match=r"6 of 6 labels are what the model answers already.*\(y \+ 1\) % classes"):
        attack(model, X, answers)
    others = (answers + 1) % 4
    with pytest.warns(UserWarning, match="4 of 6 labels are what the model answers already"):
        attack(model, X, torch.where(torch.arange(6) < 4, answers, others))
    with pytest.warns(UserWarning, match="1 of 1 labels"):  # one image may happen to be there: no error
        attack(model, X[:1], answers[:1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*answers already")
        attack(model, X, others)


@follows_gradients
@pytest.mark.filterwarnings("default:.*random at inference")
def test_a_random_model_without_eot(name):
    model, attack = Spiking(NoisyLIF(0.4)), small(name, eot=1)
    with pytest.warns(UserWarning, match=r"random at inference.*\(eot=1\).*eot=10, or eot=fastsnn.attacks.default_eot\(model\)"):
        attack(model, X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attack(model, X, Y)  # once for each attack
        small(name, eot=2)(model, X, Y)
        small(name, eot=1)(Spiking(), X, Y)
