"""The checks of an evaluation: each says ok where all is well, suspicious where it is not, and what is missing where it cannot tell."""

import functools

import pytest
import torch
import trained
from fastsnn.attacks import BIM, FGSM, PGD, Attack, Square, UniformNoise
from fastsnn.attacks.adaptive import spiking
from fastsnn.evaluation import CHECKS, evaluate, make_suite
from fastsnn.neurons import NoisyLIF
from fastsnn.surrogates import Rectangle
from torch import Tensor, nn

COUNT = 60


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return trained.digits(COUNT, dtype)


def masked(width: float = 1e-3) -> nn.Module:
    """The trained spiking network, its surrogate so narrow that next to no gradient passes."""
    model = trained.network("snn")
    for layer in spiking(model):
        layer.surrogate = Rectangle(width)
    return model


@functools.cache
def suite_on(name: str, suite: str, eps: tuple[str, ...], check_images: int = 30):
    model = masked() if name == "masked" else trained.network(name)
    return evaluate(model, *data(), make_suite(suite, eps, classes=10, steps=3 if suite == "ensemble" else None), check_images=check_images)


def verdict(evaluation, name: str) -> str:
    (found,) = [check for check in evaluation.checks if check.name == name]
    assert found.text and (found.figures or found.verdict != "suspicious" or name == "logits")
    return found.verdict


class Helps(Attack):
    """Moves against the gradient, by eps."""

    name = "helps"

    def run(self, model, images, labels, generator):
        return images - self.eps * self.gradient(model, images, labels).gradient.sign()


class Lucky(Attack):
    """FGSM for the samples whose random number is low, else nothing; `steps` as an iterative attack has them."""

    name = "lucky"

    def __init__(self, eps, chance: float, steps: int = 1, **options) -> None:
        super().__init__(eps, **options)
        self.chance, self.steps = chance, steps

    def run(self, model, images, labels, generator):
        moved = images + self.eps * self.gradient(model, images, labels).gradient.sign()
        return torch.where((generator.uniform(1) < self.chance * self.steps).reshape(-1, 1, 1, 1), moved, images)


class Outside(Lucky):
    """The same by an attack that is told nothing of the gradient."""

    name, access = "outside", "transfer"


class Brittle(nn.Module):
    """Right only where the sum of the pixels, in steps of 1e-3, is even as it was: any noise turns it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.known = {round(float(image.double().sum() * 1000)): int(label) for image, label in zip(x, y)}

    def forward(self, images: Tensor) -> Tensor:
        sums = (images.double().sum((1, 2, 3)) * 1000).round().long().tolist()
        answer = torch.tensor([self.known.get(value, 0) for value in sums])
        return nn.functional.one_hot(answer, 10).float() * 3 - 1 + 1e-3 * images.flatten(1)[:, :10]


def run(attacks: dict, model: nn.Module | None = None, labels: Tensor | None = None, check_images: int = 0):
    x, y = data()
    return evaluate(model or trained.network("ann"), x, y if labels is None else labels, attacks, check_images=check_images)


def wrong_labels() -> Tensor:
    return (data()[1] + 1) % 10


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.noise = trained.network("ann"), NoisyLIF(0.4)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images) + 0.01 * torch.randn(len(images), 10)


WELL = ("ann", "quick", ("8/255", "16/255"))
VERDICTS = ("ok", "suspicious", "not tested")
#: For each check: an evaluation that passes it, one that does not, and one that cannot tell; None where that cannot be.
CASES = {
    "harmful": (lambda: suite_on(*WELL), lambda: run({"helps": Helps(0.3)}, labels=wrong_labels()), lambda: run({})),
    "iterative": (
        lambda: suite_on(*WELL),
        lambda: run({"fgsm": FGSM("32/255"), "pgd": PGD("32/255", steps=1, step_size=1e-3, random_start=False, seed=0)}),
        lambda: run({"fgsm": FGSM("32/255")}),
    ),
    "white-box": (
        lambda: run({"bim": BIM("16/255"), "outside": Outside("16/255", 0.5, seed=0)}),
        lambda: run({"lucky": Lucky("32/255", 0.1, seed=0), "outside": Outside("32/255", 1.0, seed=0)}),
        lambda: suite_on(*WELL),
    ),
    "larger-eps": (
        lambda: suite_on(*WELL),
        lambda: run({"small": Helps(0.1), "large": Helps(0.3)}, labels=wrong_labels()),
        lambda: run({"bim": BIM("16/255")}),
    ),
    "unbounded": (lambda: suite_on(*WELL), lambda: suite_on("masked", "quick", ("32/255",)), lambda: run({"bim": BIM("16/255")})),
    "noise": (
        lambda: suite_on(*WELL),
        lambda: run({"bim": BIM("16/255")}, Brittle(*data()), check_images=40),
        lambda: run({"bim": BIM("16/255")}),
    ),
    "more-steps": (
        lambda: suite_on(*WELL),
        lambda: run({"lucky": Lucky("64/255", 0.3, seed=0)}, check_images=60),
        lambda: run({"bim": BIM("16/255")}),
    ),
    "more-restarts": (
        lambda: suite_on(*WELL),
        lambda: run({"lucky": Lucky("64/255", 0.5, seed=0)}, check_images=60),
        lambda: run({"pgd": PGD("16/255", random_start=False, seed=0)}, check_images=10),
    ),
    "repeatable": (lambda: suite_on(*WELL), lambda: run({}, Noisy()), None),
    "logits": (lambda: suite_on(*WELL), lambda: run({}, nn.Sequential(trained.network("ann"), nn.Softmax(1))), None),
    "gradient-free": (
        lambda: suite_on(*WELL),
        lambda: run({"bim": BIM("32/255"), "square": Square("32/255", budget=50, seed=0)}, masked()),
        lambda: run({"fgsm": FGSM("32/255")}),
    ),
    "inside-ball": (lambda: suite_on(*WELL), None, lambda: run({})),
    "zero-gradient": (lambda: suite_on(*WELL), lambda: suite_on("masked", "quick", ("32/255",)), lambda: run({"uniform": UniformNoise(0.1, seed=0)})),
    "plain-gradient": (
        lambda: run({"bim": BIM("16/255"), "mim": BIM("16/255", steps=10, step_size=0.01), "ensemble": make_suite("ensemble", "16/255")["ensemble-fgsm-16/255"]}),
        lambda: suite_on("masked", "ensemble", ("32/255",)),
        lambda: suite_on(*WELL),
    ),
}


def test_every_check_has_its_cases():
    assert set(CASES) == set(CHECKS)


@pytest.mark.parametrize("name, which, call", [(name, which, call) for name, calls in CASES.items() for which, call in zip(VERDICTS, calls) if call is not None])
@pytest.mark.filterwarnings("ignore:Ensemble")
def test_verdicts(name, which, call):
    evaluation = call()
    assert [check.name for check in evaluation.checks] == list(CHECKS)
    assert verdict(evaluation, name) == which, [check for check in evaluation.checks if check.name == name]


def test_masked_gradients_are_caught_and_the_ensemble_sees_through_them():
    plain = suite_on("masked", "quick", ("32/255",))
    assert plain.results["pgd7-32/255"].accuracy > 0.9 * plain.results["clean"].accuracy
    assert {"unbounded", "gradient-free", "zero-gradient"} <= {check.name for check in plain.checks if check.verdict == "suspicious"}
    seen = suite_on("masked", "ensemble", ("32/255",))
    twin = suite_on("snn", "ensemble", ("32/255",), 0)
    assert abs(seen.worst().accuracy - twin.worst().accuracy) <= 0.05 and seen.worst().accuracy < 0.3
    assert {"zero-gradient", "plain-gradient"} <= {check.name for check in seen.checks if check.verdict == "suspicious"}
    assert verdict(seen, "unbounded") == verdict(seen, "gradient-free") == "ok"  # of the worst case, which is what counts


def test_probes_do_not_count_among_the_results():
    """What an attack without a bound fools is a check, not accuracy; the samples are the same each time and spread over all."""
    found = suite_on(*WELL)
    assert list(found.results) == ["clean", *make_suite("quick", WELL[2])]
    unprobed = evaluate(trained.network("ann"), *data(), make_suite("quick", WELL[2]))
    assert {name: result.correct for name, result in unprobed.results.items()} == {name: result.correct for name, result in found.results.items()}
    (check,) = [check for check in found.checks if check.name == "unbounded"]
    assert check.figures == {"left": 0, "images": 30, "interval": check.figures["interval"]}
