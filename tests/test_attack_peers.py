"""Attacks against torchattacks, foolbox and ART themselves, on a trained spiking network and on an ANN.

FGSM, BIM and RFGSM, MI-FGSM and PGD under shared random numbers are the same bits; of the others no more accuracy is left than
the same attack of a library leaves, plus 1 %. A missing package fails the collection of this file:
`pip install --no-deps -r requirements-peers.txt`.
"""

from __future__ import annotations

import functools
import os
import warnings

import pytest
import torch
from cases import assert_same_bits
from fastsnn.attacks import BIM, FGSM, MIFGSM, MTPGD, PGD, RFGSM, Attack, GaussianNoise, Streams, UniformNoise
from torch import Tensor, nn
from trained import NETWORKS, digits, network

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which wants a git
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import foolbox
    import torchattacks
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

EPS = 8 / 255
on_each = pytest.mark.parametrize("name", NETWORKS)
with_targets = pytest.mark.parametrize("targeted", [False, True])
of_sizes = pytest.mark.parametrize("eps, targeted", [(2 / 255, False), (8 / 255, False), (8 / 255, True)])


@functools.cache
def task(name: str, targeted: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, 500 images, and their classes, or the next classes as targets."""
    model = network(name).requires_grad_(False)
    x, y = digits(500)
    return model, x, (y + 1) % 10 if targeted else y


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def of_torchattacks(attack, x: Tensor, labels: Tensor, targeted: bool = False) -> Tensor:
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    return attack(x, labels)


def of_foolbox(attack, model: nn.Module, x: Tensor, labels: Tensor, eps: float, targeted: bool = False) -> Tensor:
    criterion = foolbox.criteria.TargetedMisclassification(labels) if targeted else foolbox.criteria.Misclassification(labels)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, criterion, epsilons=eps)[1]


def of_art(attack, model: nn.Module, x: Tensor, labels: Tensor, **options) -> Tensor:
    loss = nn.CrossEntropyLoss()
    classifier = PyTorchClassifier(model, loss=loss, input_shape=tuple(x.shape[1:]), nb_classes=10, clip_values=(0, 1), device_type="cpu")
    return torch.from_numpy(attack(classifier, batch_size=len(x), **options).generate(x.numpy(), labels.numpy()))


# ---- the same bits -----------------------------------------------------------------------------------------------------


@on_each
@of_sizes
def test_fgsm(name, eps, targeted):
    model, x, y = task(name, targeted)
    found = FGSM(eps, targeted=targeted)(model, x, y)
    assert (found != x).any()
    assert_same_bits("torchattacks", found, of_torchattacks(torchattacks.FGSM(model, eps=eps), x, y, targeted))
    if not targeted:  # foolbox's takes no targets
        assert_same_bits("foolbox", found, of_foolbox(foolbox.attacks.LinfFastGradientAttack(), model, x, y, eps))
    assert_same_bits("art", found, of_art(evasion.FastGradientMethod, model, x, y, eps=eps, targeted=targeted))


@on_each
@with_targets
def test_bim(name, targeted):
    model, x, y = task(name, targeted)
    steps, step = 6, EPS / 4
    found = BIM(EPS, steps=steps, step_size=step, targeted=targeted)(model, x, y)
    assert (found != FGSM(EPS, targeted=targeted)(model, x, y)).any()
    assert_same_bits("torchattacks", found, of_torchattacks(torchattacks.BIM(model, eps=EPS, alpha=step, steps=steps), x, y, targeted))
    theirs = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=step, steps=steps, random_start=False)
    assert_same_bits("foolbox", found, of_foolbox(theirs, model, x, y, EPS, targeted))
    options = dict(eps=EPS, eps_step=step, max_iter=steps, targeted=targeted, verbose=False)
    assert_same_bits("art", found, of_art(evasion.BasicIterativeMethod, model, x, y, **options))


@on_each
def test_pgd_from_a_shared_start(name, monkeypatch):
    model, x, y = task(name)
    steps, step = 6, 0.01
    torch.manual_seed(3)
    start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    monkeypatch.setattr(PGD, "start", lambda self, images, generator: start)
    found = PGD(EPS, steps=steps, step_size=step)(model, x, y)
    assert (found != BIM(EPS, steps=steps, step_size=step)(model, x, y)).any()
    torch.manual_seed(3)
    assert_same_bits("torchattacks", found, torchattacks.PGD(model, eps=EPS, alpha=step, steps=steps)(x, y))
    theirs = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=step, steps=steps)
    monkeypatch.setattr(theirs, "get_random_start", lambda x0, epsilon: type(x0)(start))
    assert_same_bits("foolbox", found, of_foolbox(theirs, model, x, y, EPS))


@on_each
def test_rfgsm_with_shared_signs(name, monkeypatch):
    """Theirs has one size for both moves; at eps/2 that is the published form."""
    model, x, y = task(name)
    torch.manual_seed(3)
    signs = torch.randn_like(x).sign()
    monkeypatch.setattr(Streams, "signs", lambda self, *shape, dtype: signs)
    found = RFGSM(EPS)(model, x, y)
    torch.manual_seed(3)
    assert_same_bits("torchattacks", found, torchattacks.RFGSM(model, eps=EPS, alpha=EPS / 2, steps=1)(x, y))


@on_each
def test_mifgsm(name):
    model, x, y = task(name)
    found = MIFGSM(EPS, steps=6, step_size=0.01)(model, x, y)
    assert_same_bits("torchattacks", found, torchattacks.MIFGSM(model, eps=EPS, alpha=0.01, steps=6)(x, y))


# ---- no more accuracy left ---------------------------------------------------------------------------------------------

#: Ours, theirs for (model, x, y): the same attack with the same budget.
LEFT = {
    "fgsm l2": (FGSM(0.5, norm="l2"), lambda model, x, y: of_foolbox(foolbox.attacks.L2FastGradientAttack(), model, x, y, 0.5)),
    "pgd": (PGD(EPS, steps=10, step_size=0.01, seed=0), lambda model, x, y: torchattacks.PGD(model, eps=EPS, alpha=0.01, steps=10)(x, y)),
    "pgd l2": (
        PGD(0.5, steps=10, step_size=0.1, norm="l2", seed=0),
        lambda model, x, y: torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=10)(x, y),
    ),
    "bim l2": (
        BIM(0.5, steps=10, step_size=0.1, norm="l2"),
        lambda model, x, y: torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=10, random_start=False)(x, y),
    ),
    "mtpgd": (
        MTPGD(EPS, steps=6, step_size=0.01, targets=3, seed=0),
        lambda model, x, y: torchattacks.PGD(model, eps=EPS, alpha=0.01, steps=6)(x, y),
    ),
    "gaussian": (GaussianNoise(0.1, seed=0), lambda model, x, y: torchattacks.GN(model, std=0.1)(x, y)),
    "uniform": (UniformNoise(EPS, seed=0), lambda model, x, y: of_foolbox(foolbox.attacks.LinfAdditiveUniformNoiseAttack(), model, x, y, EPS)),
    "uniform l2": (
        UniformNoise(0.5, norm="l2", seed=0),
        lambda model, x, y: of_foolbox(foolbox.attacks.L2AdditiveUniformNoiseAttack(), model, x, y, 0.5),
    ),
}


@on_each
@pytest.mark.parametrize("what", LEFT)
def test_no_more_accuracy_is_left(name, what):
    ours, theirs = LEFT[what]
    assert isinstance(ours, Attack)
    model, x, y = task(name)
    torch.manual_seed(0)
    left, rival = accuracy(model, ours(model, x, y), y), accuracy(model, theirs(model, x, y), y)
    print(f"{what} on {name}: {left:.3f} here, {rival:.3f} there")
    assert left <= rival + 0.01
