"""FGSM, RFGSM, PGD, BIM, MI-FGSM, MT-PGD and noise: their exact forms, written out again in plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from attack_cases import EPS, MODELS, Pixels, Returns, Spiking, X, Y, cnn, draw, input_gradient, margin
from cases import assert_same_bits
from fastsnn import NoisyLIF, adjoint, surrogates
from fastsnn.attacks import BIM, FGSM, LOSSES, MIFGSM, MTPGD, PGD, RFGSM, GaussianNoise, Streams, UniformNoise
from torch import Tensor, nn

every_model = pytest.mark.parametrize("model", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:.*random at inference")


def ball(x: Tensor, clean: Tensor = X, eps: float = EPS) -> Tensor:
    return (clean + (x - clean).clamp(-eps, eps)).clamp(0, 1)


def unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]


@every_model
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm(model, targeted):
    model = MODELS[model]()
    sign = -1 if targeted else 1
    labels = (model.eval()(X).argmax(1) + 1) % 4
    want = (X + EPS * sign * input_gradient(model, X, labels).sign()).clamp(0, 1)
    assert_same_bits("adversarial", FGSM(EPS, targeted=targeted)(model, X, labels), want)


@every_model
def test_rfgsm(model):
    model = MODELS[model]()
    for alpha in (EPS / 2, EPS / 4, 0.0):
        x = (X + alpha * Streams(5, torch.arange(len(X))).signs(3, 8, 8)).clamp(0, 1)
        x = (x + (EPS - alpha) * input_gradient(model, x, Y).sign()).clamp(0, 1)
        found = RFGSM(EPS, alpha=alpha, seed=5)(model, X, Y)
        torch.testing.assert_close(found, x, rtol=0, atol=6e-8)  # an ulp: of the guarantee that nothing is outside
    assert RFGSM(EPS).alpha == EPS / 2


@every_model
def test_pgd(model):
    model, attack = MODELS[model](), PGD(EPS, steps=3, step_size=0.02, seed=5)
    x = ball(X + EPS * (2 * Streams(5, torch.arange(len(X))).uniform(3, 8, 8) - 1))
    for _ in range(3):
        x = ball(x + 0.02 * input_gradient(model, x, Y).sign())
    assert_same_bits("adversarial", attack(model, X, Y), x)
    assert (x != FGSM(EPS)(model, X, Y)).any()


def test_pgd_steps_and_start():
    assert PGD(EPS, steps=10).step_size == BIM(EPS, steps=10).step_size == 2.5 * EPS / 10 and MIFGSM(EPS, steps=10).step_size == EPS / 10
    model = cnn()
    for norm in ("linf", "l2"):
        want = PGD(EPS, steps=1, step_size=EPS, random_start=False, norm=norm)(model, X, Y)
        assert_same_bits("one step from the image", BIM(EPS, steps=1, step_size=EPS, norm=norm)(model, X, Y), want)
        torch.testing.assert_close(FGSM(EPS, norm=norm)(model, X, Y), want, rtol=0, atol=1e-7)
    start = PGD(EPS, steps=1, step_size=0.0, seed=3)(model, X, Y) - X
    assert start.abs().max() > 0.9 * EPS and start.abs().mean() == pytest.approx(EPS / 2, rel=0.1)


@every_model
def test_bim(model):
    model, x = MODELS[model](), X
    for _ in range(4):
        x = ball(x + 0.01 * input_gradient(model, x, Y).sign())
    assert_same_bits("adversarial", BIM(EPS, steps=4, step_size=0.01)(model, X, Y), x)


@every_model
def test_mifgsm(model):
    model, x, velocity = MODELS[model](), X, torch.zeros_like(X)
    for _ in range(4):
        gradient = input_gradient(model, x, Y)
        velocity = 0.7 * velocity + gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        x = ball(x + 0.01 * velocity.sign())
    assert_same_bits("adversarial", MIFGSM(EPS, steps=4, step_size=0.01, decay=0.7)(model, X, Y), x)
    assert_same_bits("without momentum", MIFGSM(EPS, decay=0.0)(model, X, Y), BIM(EPS, steps=10, step_size=EPS / 10)(model, X, Y))


def test_momentum_where_there_is_no_gradient():
    """Zero stays zero, in any norm, and a gradient whose squares vanish still counts."""
    for norm in ("linf", "l2"):
        for attack in (MIFGSM(0.1, norm=norm), FGSM(0.1, norm=norm), PGD(0.1, norm=norm, random_start=False)):
            assert_same_bits("zero gradient", attack(Returns(lambda z: 0 * z), X, Y), X)
            faint = attack(Returns(lambda z: z * 1e-30), X, Y)
            moved = (faint - X).flatten(1)
            assert (moved[:, 4:] == 0).all() and (moved[:, :4].norm(dim=1) > 0.05).all()


@pytest.mark.parametrize("attack", [FGSM, PGD, BIM, MIFGSM, MTPGD])
def test_l2(attack):
    """Inside of the range, the loss rises along steps of the l2 norm that is asked for."""
    model, middle = cnn().eval(), 0.4 + X / 5
    found = attack(0.3, norm="l2", seed=0)(model, middle, Y)
    moved = (found - middle).flatten(1).norm(dim=1)
    assert (LOSSES["ce"](model(found), Y) > LOSSES["ce"](model(middle), Y)).all() and (moved <= 0.3 + 1e-6).all()
    if attack is FGSM:
        torch.testing.assert_close(found, middle + 0.3 * unit(input_gradient(model, middle, Y)))
    else:
        one = attack(0.3, norm="l2", steps=1, step_size=0.1, **({"random_start": False} if attack is PGD else {}))
        if attack in (PGD, BIM, MIFGSM):
            torch.testing.assert_close(one(model, middle, Y), middle + 0.1 * unit(input_gradient(model, middle, Y)))


# ---- restarts and targets ----------------------------------------------------------------------------------------------


class Hills(nn.Module):
    """A loss with hills everywhere, so that starts differ in what they reach. No sum over pixels, so no rounding by the batch."""

    def __init__(self, ahead: float = 3.8) -> None:
        super().__init__()
        self.ahead = ahead  # of class 0: above 4 no image reaches another class

    def forward(self, images: Tensor) -> Tensor:
        return 2 * (images.flatten(1)[:, :4] * 300).sin() + self.ahead * torch.eye(4)[0]


ZERO = torch.zeros_like(Y)


def restarts_by_hand(model: nn.Module, sample: int, count: int, step: float) -> tuple[Tensor, int]:
    """The image of a sample after up to `count` attempts, and how many were made: one sample at a time, one after the other."""
    x, y, streams = X[sample : sample + 1], ZERO[:1], Streams(7, torch.tensor([sample]))
    best, highest = None, -math.inf
    for attempt in range(1, count + 1):
        found = ball(x + EPS * (2 * streams.uniform(3, 8, 8) - 1), x)
        for _ in range(2):
            found = ball(found + step * input_gradient(model, found, y).sign(), x)
        loss = F.cross_entropy(model(found), y).item()
        if model(found).argmax(1) != y:
            return found, attempt
        if loss > highest:
            best, highest = found, loss
    return best, count


def test_restarts():
    model, count, step = Hills(), 4, 0.002
    attack = PGD(EPS, steps=2, step_size=step, restarts=count, seed=7)
    found = attack(model, X, ZERO)
    tries = []
    for sample in range(len(X)):
        want, made = restarts_by_hand(model, sample, count, step)
        assert_same_bits(f"sample {sample}", found[sample : sample + 1], want)
        tries.append(made)
    assert len(set(tries)) > 1, "no start differed from another"
    assert attack.queries.tolist() == [3 * made for made in tries]  # two steps, and a pass that judges
    once = PGD(EPS, steps=2, step_size=step, seed=7)
    first = once(model, X, ZERO)
    assert once.queries.tolist() == [2] * 6
    for sample in range(len(X)):
        if tries[sample] == 1:
            assert_same_bits("the first start", found[sample], first[sample])


def test_restarts_never_do_less():
    """Of the samples that stand, the image of the highest loss is kept, of the lowest where targeted."""
    model = Hills(ahead=5.0)
    for targeted, wanted in ((False, ZERO), (True, ZERO + 1)):
        logits = [model(PGD(EPS, steps=2, step_size=0.002, restarts=count, targeted=targeted, seed=1)(model, X, wanted)) for count in (2, 5)]
        few, many = (F.cross_entropy(z, wanted, reduction="none") * (-1 if targeted else 1) for z in logits)
        assert (many >= few).all() and (many > few).any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mtpgd(momentum):
    """One sample, one class, one attempt after the other."""
    model, steps, step = Hills(), 2, 0.002
    attack = MTPGD(EPS, steps=steps, step_size=step, momentum=momentum, restarts=2, seed=7)
    found, made = attack(model, X, ZERO), []
    for sample in range(len(X)):
        x, y, streams = X[sample : sample + 1], ZERO[:1], Streams(7, torch.tensor([sample]))
        classes = [int(t) for t in model(x)[0].argsort(descending=True) if t != y]
        best, highest = None, -math.inf
        for attempt, t in enumerate([t for t in classes for _ in range(2)], 1):
            moved, velocity = ball(x + EPS * (2 * streams.uniform(3, 8, 8) - 1), x), 0
            for _ in range(steps):
                gradient = input_gradient(model, moved, y, lambda z, y: z[:, t] - z[0, y])
                velocity = momentum * velocity + gradient / gradient.abs().mean()
                moved = ball(moved + step * velocity.sign(), x)
            if margin(model(moved), y) > highest:
                best, highest = moved, margin(model(moved), y)
            if highest > 0:
                break
        assert_same_bits(f"sample {sample}", found[sample : sample + 1], best)
        made.append(attempt)
    assert attack.queries.tolist() == [1 + 3 * attempts for attempts in made]
    assert 1 < max(made) <= 6 and min(made) < max(made), "all samples fell at once, or none"


def test_mtpgd_takes_other_losses():
    model = cnn().eval()
    for loss in ("ce", "dlr", lambda logits, labels, targets: logits.gather(1, targets[:, None])[:, 0]):
        found = MTPGD(EPS, loss=loss, seed=0)(model, X, Y)
        assert (margin(model(found), Y) > margin(model(X), Y)).all()
    with pytest.raises(ValueError, match="4 or more"):
        MTPGD(EPS, loss="dlr")(Returns(lambda z: z[:, :3]), X, Y % 3)
    two = MTPGD(EPS, targets=9, seed=0)
    two(Returns(lambda z: z[:, :2]), X, Y % 2)
    assert int(two.queries.max()) <= 1 + 11  # two classes: one to go to


# ---- the objective -----------------------------------------------------------------------------------------------------


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
    model = cnn().eval()
    result = FGSM(EPS, loss=margin).gradient(model, X, Y)
    assert_same_bits("gradient", result.gradient, input_gradient(model, X, Y, margin))
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
    attack(model, X, Y)
    assert attack.queries.tolist() == [4] * 6


def test_only_some_samples():
    """Queries and zero gradients belong to samples, also where few of them are asked about."""

    class Some(FGSM):
        def run(self, model, images, labels, generator):
            odd = torch.arange(len(images)) % 2 == 1
            with self.only(odd):
                self.gradient(model, images[odd], labels[odd])
                with self.only(torch.tensor([2, 0])):
                    self.logits(model, images[[5, 1]], labels[[5, 1]])
            self.logits(model, images, labels)
            return images

    attack = Some(EPS)
    attack(Returns(lambda z: z * torch.tensor([0.0, 1, 1])[:, None] if len(z) == 3 else z), X, Y)
    assert attack.queries.tolist() == [1, 3, 1, 2, 1, 3]
    assert attack.zero_gradient.tolist() == [False, True, False, False, False, False]

    class Careless(FGSM):
        def run(self, model, images, labels, generator):
            self.logits(model, images[:2], labels[:2])
            return images

    attack = Careless(EPS)
    attack(Pixels(), X, Y)
    assert attack.queries is None


# ---- noise -------------------------------------------------------------------------------------------------------------


def test_gaussian_noise():
    middle = torch.full((200, 3, 8, 8), 0.5)
    moved = GaussianNoise(0.1, seed=1)(nn.Identity(), middle, torch.zeros(200, dtype=torch.int64)) - 0.5
    want = 0.1 * Streams(1, torch.arange(200)).normal(3, 8, 8)
    torch.testing.assert_close(moved, want.clamp(-0.5, 0.5), rtol=0, atol=6e-8)
    assert moved.abs().max() > 0.3, "eps is a deviation, not a bound"
    assert GaussianNoise(0.1).radius == math.inf and UniformNoise(0.1).radius == 0.1


def test_uniform_noise():
    attack = UniformNoise(EPS, seed=1)
    want = X + EPS * (2 * Streams(1, torch.arange(6)).uniform(3, 8, 8) - 1)
    torch.testing.assert_close(attack(nn.Identity(), X, Y), want.clamp(0, 1), rtol=0, atol=6e-8)
    # Of the ball in d dimensions, a share r^d lies within the radius r: r^d is uniform.
    middle = torch.full((2000, 5), 0.5, dtype=torch.float64)
    moved = UniformNoise(0.4, norm="l2", seed=2)(nn.Identity(), middle, torch.zeros(2000, dtype=torch.int64)) - 0.5
    share = (moved.norm(dim=1) / 0.4) ** 5
    assert share.max() <= 1 + 1e-9 and abs(share.mean() - 0.5) < 5 * 12**-0.5 / 2000**0.5
    assert (moved.mean(0).abs() < 5 * moved.std() / 2000**0.5).all()
    start = PGD(0.4, steps=1, step_size=0.0, norm="l2", seed=2)(Returns(lambda z: z), 0.25 + draw(50, 5) / 2, torch.zeros(50, dtype=torch.int64))
    assert ((start - 0.25 - draw(50, 5) / 2).norm(dim=1) <= 0.4 + 1e-6).all()
