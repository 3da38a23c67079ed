"""Evaluation: intervals, accuracy clean and under attack, what is refused, and going on after an interruption."""

import json
import math

import pytest
import torch
from fastsnn import IF, LIF, NoisyLIF
from fastsnn.attacks import FGSM, PGD, Attack
from fastsnn.defenses import omega
from fastsnn.encodings import Direct, Latency, Poisson, RSC
from fastsnn.evaluation import SUITES, Evaluation, Result, ResumeError, accuracy, default_eot, diagnose, evaluate, make_suite, wilson
from torch import Tensor, nn


def data(count: int = 90) -> tuple[Tensor, Tensor]:
    """Two overlapping classes of images, float64 in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 2
    x = 0.5 + 0.1 * torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64) + 0.05 * (2 * y - 1)[:, None, None, None]
    return x.clamp(0, 1), y


def trained(model: nn.Module, lr: float, steps: int = 60) -> nn.Module:
    x, y = data()
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model


def logistic() -> nn.Module:
    """A logistic model of `data`, trained."""
    torch.manual_seed(0)
    return trained(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double(), lr=0.3)


X, Y = data()


class Spiking(nn.Module):
    def __init__(self, neuron: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.hidden = nn.Conv2d(1, 3, 3), IF(steps=5), nn.Linear(12, 6)
        self.second, self.out = neuron or LIF(decay=0.8, threshold=0.3), nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        spikes = self.first(self.conv(images * 3)[None])
        return self.out(self.second(self.hidden(spikes.flatten(2)))).mean(0)


# ---- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (29, 29, 0.8830, 1.0)],
)
def test_wilson_against_published_values(correct, total, low, high):
    """Newcombe 1998, table I, method 3; the last by symmetry of its 0 of 29, 0.0000 to 0.1170."""
    found = wilson(correct, total)
    assert found == pytest.approx((low, high), abs=6e-5)
    assert wilson(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_wilson_solves_its_equation():
    for correct, total, level in ((3, 10, 0.95), (500, 1000, 0.99), (9, 10, 0.5)):
        z = 2**0.5 * torch.erfinv(torch.tensor(level, dtype=torch.float64)).item()
        for bound in wilson(correct, total, level):
            assert abs(correct / total - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / total), rel=1e-9)
    for bad in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="correct of"):
            wilson(*bad)
    with pytest.raises(ValueError, match="level is 95"):
        wilson(1, 2, 95)


# ---- accuracy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 90, 1000])
def test_accuracy(batch_size):
    model = logistic().train()
    want = (model(X).argmax(1) == Y).double().mean().item()
    assert 0.6 < want < 1 and accuracy(model, X, Y, batch_size) == pytest.approx(want)
    assert model.training and torch.is_grad_enabled()


def test_bytes_are_pixels():
    model = logistic()
    pixels = (X * 255).round().byte()
    assert accuracy(model, pixels, Y) == accuracy(model, pixels.double() / 255, Y)
    attacks = make_suite("quick", ["8/255"])
    assert evaluate(model, pixels, Y, attacks).results["fgsm-8/255"].correct == evaluate(model, pixels.double() / 255, Y, attacks).results["fgsm-8/255"].correct


def test_eval_mode_and_modes_come_back():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Dropout(0.9)).double()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    assert accuracy(model, X, Y) == accuracy(model, X, Y)
    diagnosed = Spiking().double().train()
    diagnose(diagnosed, X)
    evaluate(model, X, Y, {"fgsm": FGSM(0.1)})
    assert [module.training for module in model.modules()] == modes and all(module.training for module in diagnosed.modules())
    assert all(value.grad is None for value in model.parameters())


# ---- under attack ------------------------------------------------------------------------------------------------------


def test_a_logistic_model():
    """The gradient's sign is the same everywhere, so one step finds the worst image, and so do enough small ones."""
    model = logistic()
    sizes = [1 / 255, 4 / 255, 8 / 255, 16 / 255, 1.0]
    found = evaluate(model, X, Y, make_suite("quick", sizes))
    clean = torch.tensor(found.results["clean"].correct)
    before = clean
    weight = model[1].weight.detach()
    for eps, name in zip(sizes, ("1/255", "4/255", "8/255", "16/255", "1")):
        name = "255/255" if eps == 1 else name
        fgsm, pgd = torch.tensor(found.results[f"fgsm-{name}"].correct), torch.tensor(found.results[f"pgd7-{name}"].correct)
        assert (fgsm == pgd).all() and not (fgsm & ~before).any(), "a larger eps must fool whom a smaller one fooled"
        # The worst image in closed form.
        away = (weight[1 - Y] - weight[Y]).reshape(-1, 1, 4, 4)
        assert (fgsm == (model((X + eps * away.sign()).clamp(0, 1)).argmax(1) == Y)).all()
        before = fgsm
    assert clean.double().mean() > 0.7 and before.sum() == 0
    assert found.worst().correct == tuple(before.tolist()) and not found.warnings
    assert found.results["fgsm-8/255"].largest == pytest.approx(8 / 255)


def test_a_spiking_model_and_its_gradients():
    model = trained(Spiking().double(), lr=0.02)
    found = evaluate(model, X, Y, {"bptt": PGD(0.1, seed=0), "bptr": PGD(0.1, seed=0, adjoint="bptr")})
    for name in ("bptt", "bptr"):
        result = found.results[name]
        assert 0 <= result.zero_gradient < 0.5 and 0 < result.largest <= 0.1 and result.seconds > 0
    assert found.results["bptt"].accuracy < found.results["clean"].accuracy
    assert found.results["clean"].zero_gradient is None and found.results["clean"].attack is None
    assert found.results["bptr"].attack["adjoint"] == "bptr"


@pytest.mark.parametrize("model", [logistic, lambda: Spiking().double()], ids=["logistic", "spiking"])
def test_batches_do_not_matter(model):
    model = model()
    attacks = {"pgd": PGD(0.05, steps=3, seed=4), "start": PGD(0.05, steps=1, step_size=0.0, seed=4)}
    found = [evaluate(model, X, Y, attacks, batch_size=size) for size in (90, 7)]
    for other in found[1:]:
        for name, result in found[0].results.items():
            assert other.results[name].correct == result.correct
            assert other.results[name].largest == pytest.approx(result.largest, rel=1e-12)
            assert other.results[name].zero_gradient == result.zero_gradient


def test_zero_gradients_and_random_outputs_are_told():
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :2] * 0 + torch.tensor([1.0, 0.0])

    found = evaluate(Flat(), X, Y, {"fgsm": FGSM(0.1)})
    assert found.results["fgsm"].zero_gradient == 1 and found.results["fgsm"].accuracy == 0.5
    assert any("zero for 100.0%" in text for text in found.warnings)
    assert not evaluate(logistic(), X, Y, {"fgsm": FGSM(0.1)}).warnings
    noisy = Spiking(NoisyLIF(0.4)).double()
    for eot, ending in ((1, "between runs. fgsm-0.1, pgd7-0.1: wanted eot > 1."), (2, "between runs.")):
        (found,) = [text for text in evaluate(noisy, X[:20], Y[:20], make_suite("quick", [0.1], eot=eot)).warnings if "random" in text]
        assert found.endswith(ending)


class Weak(Attack):
    """Helps the model: moves against the gradient."""

    name = "pgd"

    def run(self, model, images, labels, generator):
        return images - self.eps * self.gradient(model, images, labels).gradient.sign()


def test_attacks_that_are_weaker_than_they_should_be_are_told():
    found = evaluate(logistic(), X, Y, {"fgsm": FGSM(0.05), "small": Weak(0.05), "large": Weak(0.1)})
    text = "\n".join(found.warnings)
    assert "small finds less than fgsm" in text and "small is less harmful than no attack" in text and "large finds less than small" in text


def test_a_perturbation_outside_of_the_ball_is_refused():
    attack = FGSM(0.1)

    class Liar(Attack):
        name = "liar"

        def run(self, model, images, labels, generator):
            return attack(model, images, labels)

    liar = Liar(0.1)
    evaluate(logistic(), X, Y, {"liar": liar})

    class Late(nn.Module):
        """Lowers the promise when the attack is over."""

        def forward(self, images):
            return images.flatten(1)[:, :2]

    model = Late()
    model.register_forward_hook(lambda *_: setattr(liar, "eps", 0.1 if torch.is_grad_enabled() else 0.05))
    with pytest.raises(RuntimeError, match="it promised 0.05"):
        evaluate(model, X, Y, {"liar": liar})


# ---- results as files --------------------------------------------------------------------------------------------------


def test_results_are_json():
    found = evaluate(logistic(), X, Y, make_suite("quick", [0.05]))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    row = read["results"]["pgd7-0.05"]
    assert row["correct"].count("1") / 90 == row["accuracy"] and row["total"] == 90 and row["attack"]["name"] == "pgd"
    assert row["interval"] == list(wilson(row["correct"].count("1"), 90)) and read["worst"]["accuracy"] <= row["accuracy"]
    worst = Evaluation({"a": Result((True, True, False)), "b": Result((False, True, True))}).worst()
    assert worst.correct == (False, True, False)


class Stops(nn.Module):
    """A model that fails after so many forward passes, as a killed process would."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes, self.left = model, 0, math.inf

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.model(images)


@pytest.mark.parametrize("left", [0, 3, 12, 40])
def test_going_on_after_an_interruption(tmp_path, left):
    model, path, attacks = Stops(logistic()), tmp_path / "attacks.json", make_suite("quick", [0.05])
    want = evaluate(model, X, Y, attacks, batch_size=10)
    all_passes, model.left, model.passes = model.passes, left, 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, X, Y, attacks, batch_size=10, resume=path)
    model.left, model.passes = math.inf, 0
    found = evaluate(model, X, Y, attacks, batch_size=10, resume=path)
    assert {name: row.correct for name, row in found.results.items()} == {name: row.correct for name, row in want.results.items()}
    assert {name: row.zero_gradient for name, row in found.results.items()} == {name: row.zero_gradient for name, row in want.results.items()}
    assert all_passes - left <= model.passes <= all_passes - left + 9, "done again what was done"
    model.passes = 0
    again = evaluate(model, X, Y, attacks, batch_size=4, resume=path)
    assert model.passes == 2 and again.to_dict() == found.to_dict() and [file.name for file in tmp_path.iterdir()] == ["attacks.json"]


def test_a_file_of_something_else_is_refused(tmp_path):
    model, path, attacks = logistic(), tmp_path / "attacks.json", {"fgsm": FGSM(0.05)}
    evaluate(model, X, Y, attacks, resume=path)
    before = path.read_bytes()
    other = logistic()
    other[1].bias.data.add_(1e-9)
    for call in (
        lambda: evaluate(other, X, Y, attacks, resume=path),
        lambda: evaluate(model, X[:50], Y[:50], attacks, resume=path),
        lambda: evaluate(model, X, 1 - Y, attacks, resume=path),
        lambda: evaluate(model, X, Y, {"fgsm": FGSM(0.06)}, resume=path),
    ):
        with pytest.raises(ResumeError, match="another model, other images or other attacks"):
            call()
    assert path.read_bytes() == before
    path.write_text('{"rows"')
    with pytest.raises(ResumeError, match="Delete it to begin anew"):
        evaluate(model, X, Y, attacks, resume=path)


# ---- membranes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [90, 13, 1])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_diagnose(batch_size, gamma):
    model = Spiking().double()
    found = diagnose(model, X, gamma, batch_size)
    assert [layer.name for layer in found] == ["first", "second"]
    first = model.first.simulate(model.conv(X * 3)[None], keep=("membrane",))
    second = model.second.simulate(model.hidden(first.spikes.flatten(2)), keep=("membrane",))
    for layer, out, threshold in zip(found, (first, second), (1.0, 0.3)):
        z = (out.membrane - threshold).detach().flatten(3) if out.membrane.dim() > 3 else (out.membrane - threshold).detach()[..., None]
        mean, var = z.mean((1, 3)), z.var((1, 3), unbiased=False)
        assert layer.mean == pytest.approx(mean.mean().item(), rel=1e-10)
        assert layer.deviation == pytest.approx(var.sqrt().mean().item(), rel=1e-10)
        assert layer.omega == pytest.approx(omega(mean, var, gamma).mean().item(), rel=1e-10)
        assert layer.rate == pytest.approx(out.spikes.mean().item(), rel=1e-10) and 0 < layer.rate < 1
    assert set(found[0].to_dict()) == {"name", "omega", "mean", "deviation", "rate"}


def test_diagnose_without_spikes():
    with pytest.raises(ValueError, match="no spiking layer"):
        diagnose(logistic(), X)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] / 0


# ---- suites and bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_suites(name):
    attacks = make_suite(name, ["2/255", 0.1, "0.1"], seed=3, eot=2)
    assert len(attacks) == len(set(attacks)) and all(isinstance(attack, Attack) and (attack.seed, attack.eot) == (3, 2) for attack in attacks.values())
    assert all(attack.eot == 1 for attack in make_suite(name).values())
    assert {attack.eps for attack in attacks.values()} == {2 / 255, 0.1}
    found = evaluate(logistic(), X, Y, attacks)
    assert list(found.results) == ["clean", *attacks]


def test_the_quick_suite():
    attacks = make_suite("quick", "8/255")
    assert list(attacks) == ["fgsm-8/255", "pgd7-8/255"]
    assert attacks["pgd7-8/255"].steps == 7 and attacks["pgd7-8/255"].step_size == pytest.approx(2.5 * 8 / 255 / 7)


class Seeded(NoisyLIF):
    """Fires by chance, with the same numbers at each call."""

    def __init__(self) -> None:
        super().__init__(0.4)
        self.seed = 1


@pytest.mark.parametrize(
    "part, wanted",
    [(LIF(0.5), 1), (NoisyLIF(0.4), 10), (Seeded(), 1), (Direct(2), 1), (Latency(2), 1), (Poisson(2), 10), (Poisson(2, signed=True), 10), (RSC(2), 10), (nn.Dropout(), 1)],
    ids=lambda value: type(value).__name__,
)
def test_gradients_that_a_network_needs(part, wanted):
    assert default_eot(nn.Sequential(nn.Flatten(), nn.Sequential(part))) == wanted


BAD = {
    "eot": (lambda: make_suite("quick", eot=0), ValueError, "eot is 0"),
    "suite": (lambda: make_suite("quik"), ValueError, "Did you mean 'quick'"),
    "no eps": (lambda: make_suite("quick", []), ValueError, "eps is empty"),
    "eps in bytes": (lambda: make_suite("quick", [8]), ValueError, "Divide by 255"),
    "x": (lambda: accuracy(logistic(), X.long(), Y), TypeError, "x is torch.int64"),
    "no x": (lambda: accuracy(logistic(), X[:0], Y[:0]), ValueError, "one image or more"),
    "y": (lambda: accuracy(logistic(), X, Y.float()), TypeError, "y is torch.float32"),
    "few y": (lambda: accuracy(logistic(), X, Y[:4]), TypeError, r"wanted int64 \[90\]"),
    "batch_size": (lambda: evaluate(logistic(), X, Y, {}, batch_size=0), ValueError, "batch_size is 0"),
    "targeted": (lambda: evaluate(logistic(), X, Y, {"a": FGSM(0.1, targeted=True)}), ValueError, "targeted"),
    "no attack": (lambda: evaluate(logistic(), X, Y, {"a": FGSM}), TypeError, "wanted an instance"),
    "clean": (lambda: evaluate(logistic(), X, Y, {"clean": FGSM(0.1)}), ValueError, "another name"),
    "pixels": (lambda: evaluate(logistic(), X * 255, Y, {"a": FGSM(0.1)}), ValueError, "unnormalised"),
    "logits": (lambda: accuracy(nn.Flatten(0), X, Y), ValueError, "wanted logits"),
    "NaN": (lambda: accuracy(nn.Sequential(nn.Flatten(), Broken()), X, Y), FloatingPointError, "NaN"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    call, error, words = BAD[what]
    with pytest.raises(error, match=words):
        call()
