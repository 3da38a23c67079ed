"""Transfer attacks: the images of the source, whatever the model; keyed by sample, checked, described."""

import json

import pytest
import torch
from fastsnn import checkpoints, evaluation, models
from fastsnn.attacks import FGSM, PGD, Transfer
from torch import nn

from trained import FOLDER, digits, network

EPS = 0.1
X, Y = digits(64)
SNN, ANN = network("snn"), network("ann")
#: Every source that the papers use: another network, the ANN twin, and the network itself (then it is the white-box attack).
SOURCES = {"ann": ANN, "twin": models.twin(SNN).eval(), "itself": SNN}


class Never(nn.Module):
    """A model that must not be asked."""

    def forward(self, images):
        raise AssertionError("the model under attack was asked")


@pytest.mark.parametrize("attack", [FGSM(EPS), PGD(EPS, steps=3, seed=5)], ids=lambda attack: attack.name)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_images_are_those_of_the_source_bit_for_bit(source, attack):
    found = Transfer(source, attack)(Never(), X, Y)
    assert torch.equal(found, attack(source, X, Y)) and not torch.equal(found, X)


def test_random_numbers_are_keyed_by_sample():
    attack = Transfer(ANN, PGD(EPS, steps=2, seed=3))
    places = torch.arange(100, 164)
    whole = attack(SNN, X, Y, places)
    assert torch.equal(attack(SNN, X[40:], Y[40:], places[40:]), whole[40:])
    assert not torch.equal(attack(SNN, X[40:], Y[40:]), whole[40:])


def test_it_harms_the_other_network_and_less_than_the_white_box_attack():
    x, y = digits(300)
    attack = PGD(EPS, steps=5, seed=0)

    def left(images):
        return (SNN(images).argmax(1) == y).float().mean()

    with torch.no_grad():
        clean, black, white = left(x), left(Transfer(ANN, attack)(SNN, x, y)), left(attack(SNN, x, y))
    assert white < black < clean


def test_the_source_is_left_as_it_was_and_runs_in_eval_mode():
    source = network("ann").train()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    found = Transfer(source, FGSM(EPS))(SNN, X, Y)
    assert torch.equal(found, FGSM(EPS)(ANN, X, Y))
    assert all(module.training for module in source.modules()) and all(p.grad is None and p.requires_grad for p in source.parameters())
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


def test_what_a_call_leaves_is_about_the_source():
    class Flat(nn.Module):
        def forward(self, images):
            return images.flatten(1).round()[:, :10] + 0 * images.sum()

    attack = Transfer(Flat(), FGSM(EPS))
    attack(SNN, X, Y)
    assert attack.zero_gradient.all() and (attack.queries == 0).all()
    assert Transfer(ANN, FGSM(EPS)).single_step and not Transfer(ANN, PGD(EPS)).single_step


def test_a_source_of_another_dtype_keeps_to_the_ball_of_the_images():
    x = X.double() * 0.999
    found = Transfer(ANN, FGSM(EPS))(SNN, x, Y)
    assert found.dtype == torch.float64
    assert (found >= x - EPS).all() and (found <= x + EPS).all() and (found >= 0).all() and (found <= 1).all()
    assert ((found - x).abs() > 0.99 * EPS).float().mean() > 0.2


def test_targeted_and_l2_are_those_of_the_attack():
    attack = Transfer(ANN, FGSM(EPS, targeted=True))
    assert attack.targeted and torch.equal(attack(SNN, X, (Y + 1) % 10), FGSM(EPS, targeted=True)(ANN, X, (Y + 1) % 10))


def test_options_tell_the_attack_and_the_weights_of_the_source():
    attack = PGD(EPS, steps=3, seed=5)
    options = Transfer(ANN, attack, label="runs/ann").options()
    assert options | attack.options() == options and json.loads(json.dumps(options)) == options
    assert options["attack"] == "pgd" and options["source"] == "runs/ann"
    assert options["source_weights"] == checkpoints.fingerprint(FOLDER / "ann" / checkpoints.BEST)
    assert options["source_weights"] != Transfer(SNN, attack).options()["source_weights"]
    assert "parameter" not in repr(Transfer(ANN, attack)) and "small_cnn" in repr(Transfer(ANN, attack))


def test_an_evaluation_judges_on_the_target_and_resumes_with_the_same_source_only(tmp_path):
    path, attack = tmp_path / "state.part", FGSM(EPS)
    found = evaluation.evaluate(SNN, X, Y, {"transfer": Transfer(ANN, attack)}, batch_size=24, resume=path).results["transfer"]
    with torch.no_grad():
        assert list(found.correct) == (SNN(attack(ANN, X, Y)).argmax(1) == Y).tolist()
    assert found.attack["name"] == "transfer" and found.attack["attack"] == "fgsm" and 0.99 * EPS < found.largest <= EPS + 1e-7
    assert evaluation.evaluate(SNN, X, Y, {"transfer": Transfer(ANN, attack)}, resume=path).results["transfer"].correct == found.correct
    with pytest.raises(evaluation.ResumeError):
        evaluation.evaluate(SNN, X, Y, {"transfer": Transfer(SOURCES["twin"], attack, label=ANN.name)}, resume=path)


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (("runs/ann", FGSM(EPS)), "load_run"),
        ((ANN, FGSM), "an instance"),
        ((ANN, "fgsm"), "an instance"),
        ((ANN, Transfer(ANN, FGSM(EPS))), "the attack to run on source"),
    ],
)
def test_what_it_cannot_be_made_of_is_told(arguments, wanted):
    with pytest.raises(TypeError, match=wanted):
        Transfer(*arguments)


def test_a_source_for_other_images_or_classes_is_told():
    with pytest.raises(ValueError, match=r"wanted \[N, 3, 32, 32\]"):
        Transfer(models.small_cnn(), FGSM(EPS))(SNN, X, Y)
    with pytest.raises(ValueError, match="has 3 classes"):
        Transfer(models.small_cnn(image=(1, 8, 8), classes=3), FGSM(EPS))(SNN, X, Y)
