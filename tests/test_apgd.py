"""Auto-PGD and what is built on it: the losses, T-APGD, SA-PGD, AutoAttack; against torchattacks and against their formulas."""

import contextlib
import functools
import math
from unittest import mock

import pytest
import torch
import torchattacks
from cases import assert_same_bits
from fastsnn import NoisyLIF
from fastsnn.attacks import APGD, ATTACKS, LOSSES, SAPGD, TAPGD, Attack, AutoAttack, Streams, make_attack
from fastsnn.attacks.ascent import Ascent, Walk, checkpoints
from fastsnn.attacks.losses import TARGETED_LOSSES, chosen, dlr, dlr_of_target, margin, targeted_dlr
from torch import Tensor, nn
from trained import NETWORKS, digits, network

#: A size of perturbation that fools some samples and leaves others.
EPS = {"linf": 0.08, "l2": 0.4}
#: One that leaves few: attacks of other random numbers differ by few samples, and many take little time.
LARGE = {"linf": 0.15, "l2": 0.9}
THEIR_NORMS = {"linf": "Linf", "l2": "L2"}
every_network = pytest.mark.parametrize("name", NETWORKS)
every_norm = pytest.mark.parametrize("norm", EPS)


class Pixels(nn.Module):
    """Logits without a sum over pixels: no rounding that depends on the batch."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return (x[:, : self.classes] - 0.5) * 3 * x[:, self.classes : 2 * self.classes] + x[:, 2 * self.classes : 3 * self.classes]


X = torch.rand((64, 1, 4, 4), generator=torch.Generator().manual_seed(0))
Y = Pixels()(X).argmax(1)


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


class TorchStreams(Streams):
    """Streams that take their numbers from torch's generator, in the order in which torchattacks draws them."""

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(len(self), *shape)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(len(self), *shape)

    def __getitem__(self, samples) -> Streams:
        part = super().__getitem__(samples)
        part.__class__ = TorchStreams
        return part


def with_torch_numbers(attack: Attack, monkeypatch) -> None:
    monkeypatch.setattr(attack, "_randomness", lambda places, look: contextlib.nullcontext(TorchStreams(0, places)))


# ---- against torchattacks ----------------------------------------------------------------------------------------------


@every_network
@every_norm
@pytest.mark.parametrize(("loss", "steps", "restarts"), [("ce", 12, 1), ("ce", 4, 2), ("dlr", 8, 1)])
def test_equal_to_torchattacks_bit_for_bit(name, norm, loss, steps, restarts, monkeypatch):
    model, (x, y) = network(name), digits()
    known = right(model, x, y)  # torchattacks leaves the others alone
    x, y = x[known], y[known]
    peer = torchattacks.APGD(model, THEIR_NORMS[norm], EPS[norm], steps, restarts, seed=3, loss=loss)
    run, highest = peer.attack_single_run, []
    peer.attack_single_run = lambda *arguments: highest.append(run(*arguments)) or highest[-1]
    theirs = peer(x, y)

    attack = APGD(EPS[norm], steps, loss, restarts, early_stop=False, norm=norm)
    with_torch_numbers(attack, monkeypatch)
    torch.manual_seed(3)
    ours = attack(model, x, y)

    fooled = ~right(model, theirs, y)
    assert 0.1 < fooled.double().mean() < 0.9 and len(highest) == restarts
    assert_same_bits("fooled", right(model, ours, y), ~fooled)
    # The ball of an l2 norm is checked in float64 here, which moves some pixels by a float.
    assert_same_bits("images that fool", ours[fooled], attack._inside(theirs, x)[fooled])
    if restarts == 1:
        best, accurate, loss, _ = highest[0]
        assert_same_bits("images that do not", ours[~fooled], attack._inside(best, x)[accurate])
        assert attack.queries.tolist() == [steps + 1] * len(x)


class OneStep(TAPGD):
    """T-APGD as torchattacks has it in l2: with the step size of the first sample for all of them."""

    def move(self, walk: Walk, number: int) -> Tensor:
        own = walk.step
        if self.norm == "l2":
            walk.step = own[:1].expand(own.shape)
        found = super().move(walk, number)
        walk.step = own
        return found


@every_network
@every_norm
def test_targeted_equal_to_torchattacks_bit_for_bit(name, norm, monkeypatch):
    model, (x, y) = network(name), digits(200)
    known = right(model, x, y)
    x, y = x[known], y[known]
    theirs = torchattacks.APGDT(model, THEIR_NORMS[norm], EPS[norm], 5, seed=3, n_classes=5)(x, y)
    attack = OneStep(EPS[norm], 5, target_classes=4, early_stop=False, norm=norm)
    with_torch_numbers(attack, monkeypatch)
    torch.manual_seed(3)
    ours = attack(model, x, y)
    fooled = ~right(model, theirs, y)
    assert 0.1 < fooled.double().mean() < 0.9
    assert_same_bits("fooled", right(model, ours, y), ~fooled)
    assert_same_bits("images that fool", ours[fooled], attack._inside(theirs, x)[fooled])


@functools.cache
def left_by_peer(name: str, norm: str, steps: int) -> float:
    model, (x, y) = network(name), digits()
    return right(model, torchattacks.APGDT(model, THEIR_NORMS[norm], LARGE[norm], steps)(x, y), y).double().mean().item()


@every_network
@every_norm
@pytest.mark.parametrize("attack", ["tapgd-dlr", "tapgd-ce"])
def test_targeted_as_strong_as_torchattacks(name, norm, attack):
    model, (x, y) = network(name), digits()
    ours = make_attack(attack, eps=LARGE[norm], norm=norm, steps=3, seed=0)(model, x, y)
    assert right(model, ours, y).double().mean() <= left_by_peer(name, norm, 3) + 0.01


# ---- Auto-PGD ----------------------------------------------------------------------------------------------------------


def test_checkpoints():
    # Section 3.2: p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), w_j = ceil(p_j*N)
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    assert list(checkpoints(100)) == [math.ceil(round(100 * share, 9)) for share in p[1:-1]]
    for steps in range(1, 60):
        found = checkpoints(steps)
        assert list(found) == torch.tensor(list(found.values())).cumsum(0).tolist() and max(found) <= steps
        assert all(later <= before for before, later in zip(list(found.values()), list(found.values())[1:]))


def test_the_step_is_halved_where_the_loss_stalls():
    attack, count = APGD(0.1, steps=100), 4
    x, zero = torch.zeros(count, 1), torch.zeros(count)
    walk = Walk(clean=x, labels=zero.long(), targets=zero.long(), x=x, gradient=x, best=x - 1, best_gradient=x - 2, best_loss=zero, step=x + 0.2)
    attack.begin(walk)
    # Grows at each step · grows at 16 of 22 (at most 0.75) · at 17 of 22 · at all of the first 22, then never.
    for number in range(1, 42):
        loss = torch.tensor([number, number if number <= 16 else 0, number if number <= 17 else 0, min(number, 22)], dtype=torch.float32)
        walk.best_loss = torch.maximum(walk.best_loss, loss)
        attack.review(walk, number, loss)
        if number == 22:
            assert walk.step[:, 0].tolist() == pytest.approx([0.2, 0.1, 0.2, 0.2])
            assert walk.x[:, 0].tolist() == [0, -1, 0, 0] and walk.gradient[:, 0].tolist() == [0, -2, 0, 0]
    assert walk.step[:, 0].tolist() == pytest.approx([0.2, 0.05, 0.1, 0.1])


def test_at_most_rho_of_the_steps():
    attack, x, zero = APGD(0.1, steps=100, rho=0.5), torch.zeros(2, 1), torch.zeros(2)
    walk = Walk(clean=x, labels=zero.long(), targets=zero.long(), x=x, gradient=x, best=x, best_gradient=x, best_loss=zero, step=x + 0.2)
    attack.begin(walk)
    for number in range(1, 23):
        attack.review(walk, number, torch.tensor([min(number, 11), min(number, 12)], dtype=torch.float32))
    assert walk.step[:, 0].tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("norm", EPS)
def test_the_start_lies_on_the_ball(norm):
    attack = APGD(0.25, norm=norm)
    middle = torch.full((50, 3, 4, 4), 0.5)
    moved = (attack.start(middle, Streams(0, torch.arange(50))) - middle).flatten(1)
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    torch.testing.assert_close(size, torch.full((50,), 0.25))
    assert len(moved.unique(dim=0)) == 50 and abs(moved.mean()) < 5 * moved.std() / moved.numel() ** 0.5


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "tapgd-ce", "tapgd-dlr", "sa-pgd"])
def test_samples_leave_once_they_are_fooled(name):
    model, options = Pixels(), {"eps": 0.05, "steps": 12, "seed": 1, "restarts": 2}
    patient = make_attack(name, **options, early_stop=False)
    hasty = make_attack(name, **options)
    stands = right(model, patient(model, X, Y), Y)
    found = hasty(model, X, Y)
    assert 5 < stands.sum() < 60
    assert_same_bits("who stands", right(model, found, Y), stands)
    assert_same_bits("images of those who stand", found[stands], patient(model, X, Y)[stands])
    assert_same_bits("their queries", hasty.queries[stands], patient.queries[stands])
    assert (hasty.queries[~stands] <= patient.queries[~stands]).all() and hasty.queries.sum() < patient.queries.sum()
    assert (found[stands] != X[stands]).flatten(1).any(1).all()


def test_restarts_are_for_those_who_stand():
    model = Pixels()
    one, three = (APGD(0.05, steps=4, restarts=count, seed=2) for count in (1, 3))
    first = one(model, X, Y)
    stands = right(model, first, Y)
    found = three(model, X, Y)
    assert_same_bits("fooled at once", found[~stands], first[~stands])
    assert (three.queries[~stands] <= 5).all() and (three.queries[stands] > 5).all()
    loss = LOSSES["ce"]
    assert (loss(model(found), Y) >= loss(model(first), Y))[stands].all()


@pytest.mark.parametrize("name", ["apgd-ce", "tapgd-dlr", "sa-pgd"])
def test_batches_do_not_matter_to_restarts(name):
    attack, places = make_attack(name, eps=0.05, steps=4, restarts=3, seed=7), torch.arange(len(X))
    whole = attack(Pixels(), X, Y, places)
    parts = [attack(Pixels(), X[rows], Y[rows], places[rows]) for rows in places.split([1, 20, 43])]
    assert_same_bits("adversarial", torch.cat(parts), whole)


def test_each_walk_starts_anew():
    for attack, walks in ((APGD(0.01, 2, restarts=3), 3), (TAPGD(0.01, 2, restarts=2, target_classes=3), 6)):
        with mock.patch.object(attack, "anew", wraps=attack.anew) as anew:
            attack(Pixels(), X, Y)
        assert anew.call_count == walks


def test_targeted():
    model, targets = Pixels(), (Y + 1) % 5
    for loss in LOSSES:
        before, after = (chosen(loss, True)(model(images), targets) for images in (X, APGD(0.2, 20, loss, targeted=True, seed=0)(model, X, targets)))
        assert (after < before).double().mean() > 0.95, loss
        assert right(model, APGD(0.2, 20, loss, targeted=True, seed=0)(model, X, targets), targets).sum() > 20


# ---- losses ------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[5.0, 1.0, 4.0, 2.0, -3.0]])


def test_values_of_losses():
    def of(function, *classes):
        return function(LOGITS, *(torch.tensor([number]) for number in classes)).item()

    assert of(margin, 0) == -1 and of(margin, 2) == 1 and of(margin, 4) == 8
    assert of(dlr, 0) == pytest.approx(-1 / 3) and of(dlr, 2) == pytest.approx(1 / 3) and of(dlr, 4) == pytest.approx(8 / 3)
    assert of(targeted_dlr, 0, 2) == pytest.approx(-1 / 3.5) and of(targeted_dlr, 3, 0) == pytest.approx(3 / 3.5)
    assert of(dlr_of_target, 2) == pytest.approx(1 / 3.5) and of(dlr_of_target, 0) == pytest.approx(-1 / 3.5)
    assert of(TARGETED_LOSSES["margin"], 0, 2) == -1 and of(TARGETED_LOSSES["ce"], 0, 2) == pytest.approx(LOGITS.log_softmax(1)[0, 2].item())


@pytest.mark.parametrize("name", [*LOSSES, *(f"targeted-{name}" for name in TARGETED_LOSSES)])
def test_losses(name):
    logits = 3 * torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(6, (2, 200), generator=torch.Generator().manual_seed(1))
    labels, targets = classes[0], (classes[0] + 1 + classes[1] % 5) % 6
    if name.startswith("targeted-"):
        chosen = TARGETED_LOSSES[name.removeprefix("targeted-")]
        losses = chosen(logits, labels, targets)
        other = chosen(2 * logits + 7, labels, targets)
        assert chosen(logits.bfloat16(), labels, targets).dtype == torch.float32 and chosen(logits.double(), labels, targets).dtype == torch.float64
    else:
        chosen = LOSSES[name]
        losses = chosen(logits, labels)
        other = chosen(2 * logits + 7, labels)
        wrong = logits.argmax(1) != labels
        if name != "ce":
            assert_same_bits("above 0 where another class wins", losses > 0, wrong)
        assert chosen(logits.bfloat16(), labels).dtype == torch.float32 and chosen(logits.double(), labels).dtype == torch.float64
        assert chosen(torch.zeros(2, 6), labels[:2]).isfinite().all()
    assert losses.shape == (200,)
    if "dlr" in name:
        torch.testing.assert_close(other, losses)
    elif "margin" in name:
        torch.testing.assert_close(other, 2 * losses)
    else:
        assert (other != losses).any()


@pytest.mark.parametrize(
    ("attack", "classes", "words"),
    [
        (APGD(0.1, 2, "dlr"), 2, "dlr: the model has 2 classes; wanted 3 or more"),
        (TAPGD(0.1, 2, "dlr"), 3, "targeted dlr: the model has 3 classes; wanted 4 or more"),
        (AutoAttack(0.1, "rand", 2), 2, "AutoAttack: the model has 2 classes; wanted 3 or more"),
        (AutoAttack(0.1, "standard", 2), 3, "AutoAttack: the model has 3 classes; wanted 4 or more"),
    ],
    ids=["dlr", "targeted dlr", "rand", "standard"],
)
def test_too_few_classes(attack, classes, words):
    with pytest.raises(ValueError, match=words):
        attack(Pixels(classes), X, Y.clamp(max=classes - 1))


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_two_classes_are_enough_for_other_losses(loss):
    model = Pixels(2)
    labels = model(X).argmax(1)
    for attack in (APGD(0.3, 10, loss, seed=0), TAPGD(0.3, 10, loss, seed=0)):
        assert right(model, attack(model, X, labels), labels).double().mean() < 0.7


# ---- targets -----------------------------------------------------------------------------------------------------------


def test_targets_come_by_their_logits():
    attack, model = TAPGD(0.1, target_classes=3), Pixels()
    aims = torch.stack(list(attack.aims(model, X, Y)), 1)
    order = model(X).argsort(dim=1, descending=True)
    assert_same_bits("the label is the first", order[:, 0], Y)
    assert_same_bits("targets", aims, order[:, 1:4])
    assert len(TAPGD(0.1).aims(model, X, Y)) == 4
    others = (Y + 1) % 5
    assert (torch.stack(list(TAPGD(0.1).aims(model, X, others)), 1) != others[:, None]).all()


def test_each_target_is_tried():
    attack = TAPGD(0.02, 3, seed=0)
    stands = right(Pixels(), attack(Pixels(), X, Y), Y)
    assert 10 < stands.sum() and (attack.queries[stands] == 1 + 4 * 4).all()


# ---- SA-PGD ------------------------------------------------------------------------------------------------------------


def test_sa_pgd_against_its_formula():
    model, eps, steps, clean = Pixels(), 0.05, 12, X.double()
    attack = SAPGD(eps, steps, early_stop=False, seed=4)
    x = attack.start(clean, Streams(4, torch.arange(len(X))))
    m, v, eta = torch.zeros_like(x), torch.zeros_like(x), eps
    highest, last = torch.full((len(X),), -math.inf, dtype=torch.float64), x.clone()
    best = x.clone()
    for number in range(steps + 1):
        x = x.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), Y, reduction="none")
        (g,) = torch.autograd.grad(loss.sum(), x)
        with torch.no_grad():
            fooled = model(x).argmax(1) != Y
            last[fooled] = x[fooled]
            best[loss > highest] = x[loss > highest]
            highest = torch.maximum(highest, loss)
            m = 0.5 * m + g / g.abs().mean((1, 2, 3), keepdim=True)
            v = 0.8 * v + g**2 / (g**2).mean((1, 2, 3), keepdim=True)
            x = x + torch.where(v > 0, (eta * m / v.sqrt()).clamp(-eta, eta), 0)
            x = torch.minimum(torch.maximum(x, clean - eps), clean + eps).clamp(0, 1)
            if number + 1 in checkpoints(steps):
                eta /= 2
    found = attack(model, clean, Y)
    stands = right(model, found, Y)
    assert 5 < stands.sum() < 60
    torch.testing.assert_close(found, torch.where(stands[:, None, None, None], best, last), rtol=0, atol=1e-10)


@every_network
def test_sa_pgd_as_strong_as_pgd(name):
    model, (x, y), eps = network(name), digits(250), EPS["linf"]
    left = right(model, SAPGD(eps, 30, seed=0)(model, x, y), y).double().mean()
    assert left <= right(model, torchattacks.PGD(model, eps, 2.5 * eps / 30, 30)(x, y), y).double().mean() + 0.01


@pytest.mark.parametrize("adjoint", ["assg", "bptr"])
def test_sa_pgd_through_other_adjoints(adjoint):
    model, (x, y) = network("snn"), digits(100)
    assert right(model, SAPGD(0.1, 10, adjoint=adjoint, seed=0)(model, x, y), y).double().mean() < right(model, x, y).double().mean() - 0.3


# ---- AutoAttack --------------------------------------------------------------------------------------------------------


@every_network
def test_autoattack(name):
    model, (x, y) = network(name), digits()
    attack = AutoAttack(LARGE["linf"], steps=3, budget=20, seed=0)
    assert attack.members == ("apgd-ce", "tapgd-dlr", "fab", "square")
    found = attack(model, x, y)
    fooled, stands = attack.fooled, right(model, found, y)
    assert fooled.shape == (4, len(x)) and fooled.dtype == torch.int8
    assert_same_bits("who stands", stands, (fooled == 0).all(0))
    assert_same_bits("who leaves is not tried again", fooled == -1, ((fooled == 1).cumsum(0) - (fooled == 1).long()) > 0)
    assert (fooled[0] >= 0).all() and (fooled[1] == 1).any()
    assert (attack.queries > 0).all() and attack.queries[stands].min() > 4 + 9 * 4 + 20

    peer = torchattacks.AutoAttack(model, "Linf", LARGE["linf"], seed=0)
    for member in peer._autoattack.attacks[:3]:
        member.steps = 3
    peer._autoattack.attacks[3].n_queries = 20
    assert stands.double().mean() <= right(model, peer(x, y), y).double().mean() + 0.01


def test_autoattack_in_l2():
    model, (x, y) = network("ann"), digits(50)
    attack = AutoAttack(EPS["l2"], norm="l2", steps=5, budget=20, seed=0)
    found = attack(model, x, y)
    assert (found.double() - x.double()).flatten(1).norm(dim=1).max() <= EPS["l2"]
    assert right(model, found, y).sum() <= right(model, APGD(EPS["l2"], 5, norm="l2", seed=0)(model, x, y), y).sum()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.neuron, self.out = NoisyLIF(0.4), nn.Linear(16, 5)
        torch.manual_seed(0)
        nn.init.normal_(self.out.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.neuron(2 * images.flatten(1).expand(4, -1, -1).contiguous())).mean(0)


@pytest.mark.filterwarnings("error")
def test_autoattack_for_random_models():
    model = Noisy()
    labels = sum(model(X) for _ in range(50)).argmax(1)
    attack = AutoAttack(0.1, "rand", steps=4, eot=5, seed=0)
    assert attack.members == ("apgd-ce", "apgd-dlr") and AutoAttack(0.1, "rand").eot == 20 and AutoAttack(0.1).eot == 1
    found = attack(model, X, labels)
    stands = (attack.fooled == 0).all(0)
    # A verdict and each of the five gradients of a member are means of five passes; the first pass looks at the model.
    assert attack.queries[stands].unique().tolist() == [1 + 2 * (5 * 5 + 5)] and 0 < stands.sum() < len(X)
    assert_same_bits("seeded", attack(model, X, labels), found)


def test_autoattack_members_do_not_share_random_numbers(monkeypatch):
    starts = []
    start = Ascent.start
    monkeypatch.setattr(Ascent, "start", lambda *arguments: starts.append(start(*arguments)) or starts[-1])
    AutoAttack(0.0001, "rand", steps=1, eot=1, seed=0)(Pixels(), X, Y)
    assert len(starts) == 2 and ((starts[0] == starts[1]).double().mean((1, 2, 3)) < 0.5).all()
    streams = Streams(5, torch.arange(3))
    first, second = streams.fork(), streams.fork()
    numbers = torch.cat([first.bits(50), second.bits(50), streams.bits(50)], 1)
    assert numbers.unique().numel() == numbers.numel()
    alone = Streams(5, torch.tensor([2]))
    alone.fork()
    assert_same_bits("keyed by the sample", alone.fork().bits(50), numbers[2:, 50:100])


# ---- bad options -------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "rho": (lambda: APGD(0.1, rho=1.5), "rho is 1.5; wanted a share"),
    "restarts": (lambda: APGD(0.1, restarts=0), "APGD: restarts is 0"),
    "steps": (lambda: SAPGD(0.1, steps=0), "SAPGD: steps is 0"),
    "norm": (lambda: SAPGD(0.1, norm="l2"), "keeps to linf"),
    "loss": (lambda: APGD(0.1, loss="drl"), "Did you mean 'dlr'"),
    "loss of targets": (lambda: TAPGD(0.1, loss="cee"), "TAPGD: loss 'cee' is unknown; wanted one of ce, dlr, margin. Did you mean 'ce'"),
    "targets": (lambda: TAPGD(0.1, targeted=True), "the attack chooses its targets itself"),
    "count of targets": (lambda: TAPGD(0.1, target_classes=0), "target_classes is 0"),
    "version": (lambda: AutoAttack(0.1, "random"), "version 'random' is unknown; wanted one of standard, rand. Did you mean 'rand'"),
    "targets of AutoAttack": (lambda: AutoAttack(0.1, targeted=True), "its members choose their targets"),
    "loss of AutoAttack": (lambda: AutoAttack(0.1, loss="dlr"), "losses of their own"),
    "budget": (lambda: AutoAttack(0.1, budget=0), "budget is 0"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_bad_options(what):
    call, words = BAD_OPTIONS[what]
    with pytest.raises(ValueError, match=words):
        call()
