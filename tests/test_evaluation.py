"""Evaluation: intervals, accuracy clean and under attack, what is refused, and going on after an interruption."""

import json
import math
import warnings

import pytest
import torch
from fastsnn import IF, LIF, NoisyLIF
from fastsnn.attacks import ATTACKS, FGSM, PGD, Attack, GaussianNoise
from fastsnn.defenses import omega
from fastsnn.encodings import Direct, Latency, Poisson, RSC
from fastsnn.evaluation import SUITES, Evaluation, Result, ResumeError, Suite, accuracy, default_eot, diagnose, evaluate, make_suite, wilson
from fastsnn.evaluation.progress import Progress, work
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
        assert 0 <= result.zero_gradient < 0.5 and 0 < result.largest <= 0.1 + 2**-53 and result.seconds > 0
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
    # With labels that are wrong, what helps the model has far to go.
    found = evaluate(logistic(), X, 1 - Y, {"fgsm": FGSM(0.05), "small": Weak(0.05), "large": Weak(0.1)})
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


class Counts(Attack):
    """FGSM, and which samples it was asked for."""

    name = "counts"

    def __init__(self, eps: float, **options) -> None:
        super().__init__(eps, **options)
        self._asked: list[int] = []

    def run(self, model, images, labels, generator):
        self._asked.append(len(images))
        return images + self.eps * self.gradient(model, images, labels).gradient.sign()


def test_samples_that_are_fooled_are_skipped_where_the_worst_case_counts():
    whole = evaluate(logistic(), X, Y, {"a": PGD(0.02, seed=1), "b": Counts(0.05), "c": Counts(0.01), "d": Counts(0.1, norm="linf"), "noise": GaussianNoise(0.5, seed=0)}, 20)
    attacks = {"a": PGD(0.02, seed=1), "noise": GaussianNoise(0.5, seed=0), "b": Counts(0.05), "c": Counts(0.01), "d": Counts(0.1)}
    found = evaluate(logistic(), X, Y, Suite(attacks, skips=["b"]), 20, skips=["c", "d"])
    right = {name: torch.tensor(row.correct) for name, row in whole.results.items()}
    left = right["clean"] & right["a"]  # noise keeps to no ball: what it finds does not count
    assert found.results["b"].tried == left.sum() and attacks["b"]._asked == [20] * (left.sum() // 20) + [left.sum() % 20]
    assert found.results["c"].tried == right["clean"].sum(), "only smaller sizes count"
    assert found.results["d"].tried == (left & right["b"]).sum()
    assert found.results["b"].correct == tuple((left & right["b"]).tolist()) and found.results["a"].tried == 90
    assert found.worst_cases()["linf 0.1"].correct == whole.worst_cases()["linf 0.1"].correct
    saved = found.to_dict()
    assert "skips" in saved["skipped"] and saved["results"]["b"]["skips"] and not saved["results"]["a"]["skips"]
    assert "skipped" not in whole.to_dict()


def test_worst_cases_by_norm_and_size():
    flags = {"clean": (1, 1, 1, 1), "small": (0, 1, 1, 1), "large": (1, 0, 1, 1), "l2": (1, 1, 0, 1), "free": (1, 1, 1, 0)}
    about = {"clean": None, "small": {"eps": 0.1}, "large": {"eps": 0.2}, "l2": {"eps": 0.5, "norm": "l2"}, "free": {"eps": 0.1, "bounded": False}}
    found = Evaluation({name: Result(tuple(map(bool, row)), about[name]) for name, row in flags.items()})
    assert {name: [*map(int, row.correct)] for name, row in found.worst_cases().items()} == {"linf 0.1": [0, 1, 1, 1], "linf 51/255": [0, 0, 1, 1], "l2 0.5": [1, 1, 0, 1]}
    assert found.worst().correct == (False, False, False, True)


def test_members_of_an_ensemble():
    model = trained(Spiking().double(), lr=0.02)
    members = ["triangle-1", "bptr", "ste"]
    attacks = {"one": ATTACKS["ensemble"](0.05, members=members), "many": ATTACKS["ensemble"](0.05, base="bim", steps=3, members=members)}
    found = evaluate(model, X, Y, attacks, batch_size=40).to_dict()["results"]
    single = {name: evaluate(model, X, Y, {name: FGSM(0.05, adjoint=name)}).results[name] for name in members}
    right = torch.ones(90, dtype=torch.bool)
    for name, row in found["one"]["members"].items():
        right &= torch.tensor(single[name].correct)
        assert row == {"tried": 90, "fooled": 90 - sum(single[name].correct), "accuracy": int(right.sum()) / 90, "alone": single[name].accuracy}
    rows = list(found["many"]["members"].values())
    assert [row["tried"] for row in rows] == [90, 90 - rows[0]["fooled"], 90 - rows[0]["fooled"] - rows[1]["fooled"]]
    assert rows[0]["alone"] == rows[0]["accuracy"] and rows[1]["alone"] is None and rows[2]["accuracy"] == found["many"]["accuracy"]


def test_curves():
    found = evaluate(logistic(), X, Y, make_suite("quick", [0.02, 0.05], curve_steps=[1, 3]))
    curves = json.loads(json.dumps(found.to_dict()))["curves"]
    points = {"fgsm": "fgsm-{}", "pgd7": "pgd7-{}"}
    for label, name in points.items():
        clean, *rest = curves["eps"][label]
        assert clean == [0.0, found.results["clean"].accuracy, *found.results["clean"].interval]
        assert rest == [[eps, found.results[name.format(eps)].accuracy, *found.results[name.format(eps)].interval] for eps in (0.02, 0.05)]
    assert [point[1] for point in curves["eps"]["worst"]] == [found.results["clean"].accuracy, *(worst.accuracy for worst in found.worst_cases().values())]
    assert [point[0] for point in curves["steps"]["pgd-0.05"]] == [1, 3]
    assert curves["steps"]["pgd-0.05"][1][1] == evaluate(logistic(), X, Y, {"pgd": PGD(0.05, steps=3, seed=0)}).results["pgd"].accuracy


class Shaky(nn.Module):
    """The logistic model, with noise on its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = logistic()

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return logits + torch.randn_like(logits)


def test_predictions_are_means_of_passes():
    model = Shaky()

    def unsteady(passes: int) -> int:
        rows = torch.tensor([evaluate(model, X, Y, {}, 90, predictions=passes, seed=seed).results["clean"].correct for seed in range(4)])
        return int((rows.any(0) & ~rows.all(0)).sum())

    assert 0 < 2 * unsteady(64) < unsteady(1), "samples on which seeds disagree"
    assert timeless(evaluate(model, X, Y, {}, 20, seed=3)) == timeless(evaluate(model, X, Y, {}, 20, seed=3))


def test_progress_tells_the_time_left(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("fastsnn.evaluation.progress.time.monotonic", lambda: clock[0])
    progress = Progress("lines")
    progress.plan(100.0)
    assert progress.left() is None
    progress.begin("a", planned=60.0, wanted=50.0, done=20.0)  # 20 lay in a file
    clock[0] = 10.0
    progress.advance(20.0)
    assert progress.left() == pytest.approx(10 * (90 - 40) / 20)
    progress.end("a", 0.25)
    assert "a: 25.00%; 56% of the work is done, about 13 s left" in capsys.readouterr().err
    assert work(None) == 1 and work(FGSM(0.1)) == 4 and work(PGD(0.1, steps=7, eot=2)) == 43 and work(GaussianNoise(0.1)) == 2
    assert work(ATTACKS["ensemble"](0.1, base="pgd", steps=2)) == 1 + 6 * 19
    evaluate(logistic(), X, Y, {"fgsm": FGSM(0.1)}, progress="lines")
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["clean", "fgsm"]


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


def timeless(found: Evaluation) -> dict:
    saved = found.to_dict()
    for row in (*saved["results"].values(), saved["worst"]):
        del row["seconds"]
    return saved


def random_suite(model: nn.Module, path=None) -> dict:
    """All kinds of rows, with checks, on a random model."""
    members = {"members": ["triangle-1", "bptr"], "seed": 0, "eot": 2}
    attacks = {"pgd": PGD(0.03, steps=2, seed=0, eot=2), "ensemble": ATTACKS["ensemble"](0.03, base="bim", steps=2, **members)}
    return timeless(evaluate(model, X[:60], Y[:60], attacks, 20, resume=path, skips=["ensemble"], check_images=8, predictions=2, seed=5))


@pytest.fixture(scope="module")
def noisy() -> tuple[nn.Module, dict]:
    model = trained(Spiking(NoisyLIF(0.4)).double(), lr=0.02)
    return model, random_suite(Stops(model))  # whose layers have the same names as when it is stopped


@pytest.mark.parametrize("left", [20, 60, 120])
def test_a_suite_with_skips_and_checks_on_a_random_model_goes_on(tmp_path, noisy, left):
    """Where it was stopped does not show: not in batches of samples that still stand, in members, in checks, nor in random numbers."""
    model, path = Stops(noisy[0]), tmp_path / "attacks.part"
    model.left = left
    with pytest.raises(KeyboardInterrupt):
        random_suite(model, path)
    model.left = math.inf
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert random_suite(model, path) == noisy[1]
    assert torch.equal(torch.get_rng_state(), before), "torch's generator is left as it was"


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
    attacks = make_suite(name, ["0.1", "2/255", 0.1], seed=3, eot=2, steps=3, classes=2)
    assert all(isinstance(attack, Attack) and (attack.seed, attack.eot) == (3, 2) for attack in attacks.values())
    assert all(attack.eot == 1 for attack in make_suite(name).values())
    assert {attack.eps for attack in attacks.values()} - {math.inf} == {2 / 255, 0.1} and attacks.skips <= set(attacks)
    for attack in attacks.values():  # what costs most
        vars(attack).update({"budget": 20} if hasattr(attack, "budget") else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an ensemble on a model without spikes
        found = evaluate(logistic(), X[:30], Y[:30], attacks, batch_size=30)
    assert list(found.results) == ["clean", *attacks]
    sizes = list(found.worst_cases().values())
    assert len(sizes) == 2 and sizes[0].accuracy >= sizes[1].accuracy == found.worst().accuracy


def test_suites_hold_every_attack():
    names = {attack.name for suite in ("paper", "everything") for attack in make_suite(suite, "8/255").values()}
    assert names == set(ATTACKS) - {"autoattack"}  # whose members are rows of their own
    (steady,) = [attack for attack in make_suite("everything", "8/255").values() if attack.name == "sa-pgd"]
    assert steady.options()["adjoint"] == "assg", "as in its paper"
    assert [attack.name for attack in make_suite("autoattack", "8/255").values()] == list(ATTACKS["autoattack"]("8/255").members)
    assert [attack.name for attack in make_suite("autoattack", "8/255", eot=20).values()] == list(ATTACKS["autoattack"]("8/255", version="rand").members)


def test_suites_change_with_norm_steps_and_classes():
    for name in SUITES:
        attacks = make_suite(name, 0.5, norm="l2", steps=4, restarts=3)
        assert attacks and all(attack.norm == "l2" and getattr(attack, "steps", 4) in (4, 10) for attack in attacks.values())
        assert all(getattr(attack, "restarts", 3) in (3, 1) for attack in attacks.values())
    two, four = (list(make_suite("everything", "8/255", classes=classes)) for classes in (2, 4))
    assert [name for name in four if name not in two] == ["apgd-dlr100-8/255", "tapgd-dlr100-8/255"]
    curve = make_suite("quick", ["4/255", "8/255"], curve_steps=[1, 5, 1]).curve
    assert [(attack.steps, attack.eps) for attack in curve.values()] == [(1, 8 / 255), (5, 8 / 255)]


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
    "steps": (lambda: make_suite("quick", steps=0), ValueError, "steps is 0"),
    "norm": (lambda: make_suite("quick", norm="l3"), ValueError, "none of its attacks keeps to norm 'l3'"),
    "skips": (lambda: evaluate(logistic(), X, Y, {"a": FGSM(0.1)}, skips=["b"]), ValueError, "skips names 'b'"),
    "predictions": (lambda: evaluate(logistic(), X, Y, {}, predictions=0), ValueError, "predictions is 0"),
    "check_images": (lambda: evaluate(logistic(), X, Y, {}, check_images=-1), ValueError, "check_images is -1"),
    "progress": (lambda: evaluate(logistic(), X, Y, {}, progress="bars"), ValueError, "progress is 'bars'"),
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
