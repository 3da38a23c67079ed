"""Spike counts, rates and distances against the spikes themselves; singular values against what makes them."""

import json
import math

import fastsnn
import pytest
import torch
from fastsnn import activity, evaluation, models
from fastsnn.attacks import FGSM
from fastsnn.evaluation.spikes import activity_of
from torch import nn

from trained import digits, network

SNN = network("snn")
X, Y = digits(60)
MOVED = FGSM(0.1)(SNN, X, Y)


class Counted(nn.Module):
    """Two layers whose spikes are written down: the images are currents, repeated over T steps."""

    def __init__(self, steps=3):
        super().__init__()
        self.steps = steps
        self.first = fastsnn.IF(threshold=1.0)
        self.second = fastsnn.IF(threshold=1.0)

    def forward(self, images):
        spikes = self.first(images.flatten(1).expand(self.steps, *images.flatten(1).shape))
        return self.second(0.5 * spikes).sum(0)


#: Per step 1 fires at each of three, 0.5 at the second, 0.25 never. Half of it: every other spike arrives.
IMAGES = torch.tensor([[1.0, 0.5, 0.25, 0.0], [1.0, 0.25, 0.25, 0.0]])[:, None, None]


def test_counts_are_those_on_paper():
    first, second = activity.activity(Counted(), IMAGES)
    assert (first.name, first.neurons, first.steps) == ("first", 4, 3)
    assert first.spikes == (3 + 1 + 3) / 2 and first.rate == 7 / (2 * 4 * 3) and first.per_neuron == 3.5 / 4
    assert first.active == 3 / 8 and first.silent == 2 / 4
    assert second.spikes == 1 and second.active == 2 / 8 and second.silent == 3 / 4
    both = activity.totals([first, second])
    assert both == {"neurons": 8, "spikes": 4.5, "per_neuron": 4.5 / 8, "rate": 9 / 48, "active": 5 / 16, "silent": 5 / 8}


def test_distance_is_that_on_paper():
    first, second = activity.spike_distance(Counted(), IMAGES, IMAGES.flip(0))
    assert first.distance == 1.0 and first.changed == 1 / 12  # the one spike of 0.5
    assert first.relative == pytest.approx((1 / math.sqrt(4) + 1 / math.sqrt(3)) / 2)
    assert (second.distance, second.relative, second.changed) == (0.0, 0.0, 0.0)


def test_relative_distance_leaves_out_silent_images():
    (first, _) = activity.spike_distance(Counted(), IMAGES[:, ..., 2:], torch.ones(2, 1, 1, 2))
    assert first.distance == math.sqrt(6) and first.relative == 0.0


def rates(images):
    with torch.no_grad():
        return SNN(images, statistics=("rate",))[1]


@pytest.mark.parametrize("images", [X, MOVED], ids=["clean", "adversarial"])
def test_rates_are_those_of_the_layers_statistics(images):
    found = activity.activity(SNN, images)
    assert [layer.name for layer in found] == [name for name, _ in SNN.spiking_layers()]
    for layer, entry in zip(found, rates(images), strict=True):
        assert layer.rate == pytest.approx(entry.rate.double().mean().item(), rel=1e-6)
        assert 0 < layer.rate <= layer.active <= 1 - layer.silent <= 1
    assert sum(layer.neurons for layer in found) == models.count_neurons(SNN)


def test_batches_change_nothing():
    assert activity.activity(SNN, X, batch_size=60) == activity.activity(SNN, X, batch_size=7)
    whole, parts = (activity.spike_distance(SNN, X, MOVED, batch_size=size) for size in (60, 7))
    for one, other in zip(whole, parts, strict=True):
        assert one.name == other.name and one.changed == other.changed
        assert (one.distance, one.relative) == pytest.approx((other.distance, other.relative), rel=1e-12)


def test_bytes_are_pixels():
    assert activity.activity(SNN, (X * 255).round().byte()) == activity.activity(SNN, X)


def test_what_wraps_a_network_is_left_out():
    class Compiled(nn.Module):  # as torch.compile makes it: hooks on layers need not run in its graph
        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, images):
            raise AssertionError("the wrapper ran")

    wrapped = Compiled(SNN)
    assert activity.activity(wrapped, X[:8]) == activity.activity(SNN, X[:8])
    assert activity.spike_distance(wrapped, X[:8], MOVED[:8]) == activity.spike_distance(SNN, X[:8], MOVED[:8])


def test_an_attack_moves_spikes_and_more_of_it_moves_more():
    small, large = (activity.spike_distance(SNN, X, FGSM(eps)(SNN, X, Y)) for eps in (0.02, 0.1))
    assert all(0 < one.distance < other.distance for one, other in zip(small, large, strict=True))
    assert all(layer.distance == 0 for layer in activity.spike_distance(SNN, X, X))


def test_a_random_network_draws_the_same_numbers_for_both_images():
    model = nn.Sequential(fastsnn.NoisyLIF(sigma=0.4), nn.Flatten())
    images = torch.rand(4, 2, 3, 3)
    state = torch.get_rng_state()
    assert activity.spike_distance(model, images, images)[0].distance == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("merged", [False, True])
def test_layers_in_other_peoples_models_merged_or_step_by_step(merged):
    class Stepwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastsnn.IF(stateful=not merged, merged=merged, steps=3 if merged else None)

        def forward(self, images):
            if merged:
                return self.layer(images.repeat(3, 1, 1, 1)).sum((1, 2, 3))
            self.layer.forget()
            return sum(self.layer(images[None])[0] for _ in range(3)).sum((1, 2, 3))

    (found,) = activity.activity(Stepwise(), IMAGES)
    assert found == activity.LayerActivity("layer", 4, 3, 3.5, 7 / 24, 3 / 8, 0.5)


def test_the_model_is_left_as_it_was():
    model = network("snn").train()
    activity.activity(model, X[:4])
    activity.spike_distance(model, X[:4], MOVED[:4])
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def evaluated(model, attacks, limit=8):
    results = evaluation.evaluate(model, X[:12], Y[:12], attacks).results
    return activity_of(model, X[:12], Y[:12], attacks, results, limit)


def test_an_evaluation_says_what_layers_do():
    pgd = evaluation.make_suite("quick", "8/255", steps=2)
    found = evaluated(SNN, pgd)
    assert found["images"] == 8 and [len(found[kind]["layers"]) for kind in ("clean", "attacked")] == [3, 3] and len(found["attacked"]["distance"]) == 3
    whole = evaluation.evaluate(SNN, X[:12], Y[:12], {}, batch_size=5, check_images=8)
    assert whole.activity == whole.to_dict()["activity"] == {"images": 8, "clean": found["clean"]}
    assert set(evaluated(SNN, {"fgsm": FGSM(0.1)})) == {"images", "clean"}, "no PGD is among the attacks"
    assert evaluated(SNN, pgd, limit=0) is None
    assert evaluated(network("ann"), {}) is None and "activity" not in evaluation.evaluate(network("ann"), X[:4], Y[:4], {}, check_images=2).to_dict()


class Ten(nn.Module):
    """A layer over four steps, and ten numbers of its spikes for each image."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, images):
        return self.layer(3 * images.flatten(1).expand(4, len(images), -1)).sum(0)[:, 20:30]


def test_an_evaluation_of_a_random_network_repeats():
    model = Ten(fastsnn.NoisyLIF(sigma=0.4))
    state, (first, second, other) = torch.get_rng_state(), (activity_of(model, X, Y, {}, {}, 8, seed=seed) for seed in (0, 0, 1))
    assert first == second != other and first["clean"]["totals"]["spikes"] > 1 and torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_goes_on_where_layers_cannot_be_told_apart():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastsnn.IF()

        def forward(self, images):
            return self.layer(self.layer(images[None])[..., :5]).sum(0).flatten(1)[:, :10]

    found = evaluation.evaluate(Shared(), X[:12], Y[:12], {}, check_images=8).activity
    assert found["images"] == 8 and "runs at places of 2 shapes" in found["missing"]


def test_results_are_json():
    rows = [*activity.activity(SNN, X[:4]), *activity.spike_distance(SNN, X[:4], MOVED[:4])]
    assert all(json.loads(json.dumps(row.to_dict())) == row.to_dict() for row in rows)
    assert "per_neuron" in rows[0].to_dict()


def test_singular_values_are_those_of_the_matrices():
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    other, _ = torch.linalg.qr(torch.randn(18, 6, generator=torch.Generator().manual_seed(1)))
    wanted = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.1])
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_((turn * wanted @ other.T).view_as(model[0].weight))
        model[2].weight.copy_(torch.eye(2, 6) * 4)
    found = activity.singular_values(model)
    assert list(found) == ["0", "2"]
    assert torch.allclose(found["0"], wanted, atol=1e-6) and torch.equal(found["2"], torch.tensor([4.0, 4.0]))
    names = [name for name, layer in SNN.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert list(activity.singular_values(SNN)) == names and not next(iter(activity.singular_values(SNN).values())).requires_grad


@pytest.mark.parametrize(
    "call, error, wanted",
    [
        (lambda: activity.activity(network("ann"), X), ValueError, "no spiking layer"),
        (lambda: activity.activity(SNN, X.long()), TypeError, "wanted uint8, or float"),
        (lambda: activity.activity(SNN, X[:0]), ValueError, "one image or more"),
        (lambda: activity.activity(SNN, X, batch_size=0), ValueError, "batch_size is 0"),
        (lambda: activity.spike_distance(SNN, X, X[:3]), ValueError, "one shape"),
        (lambda: activity.spike_distance(SNN, X, None), ValueError, "changed is NoneType"),
        (lambda: activity.totals([]), ValueError, "got no layer"),
        (lambda: activity.singular_values(nn.ReLU()), ValueError, "no convolution"),
    ],
)
def test_what_cannot_be_measured_is_told(call, error, wanted):
    with pytest.raises(error, match=wanted):
        call()


def test_a_layer_at_places_of_two_shapes_is_told():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastsnn.IF()

        def forward(self, images):
            return self.layer(self.layer(images[None])[..., 1:]).sum(0).flatten(1)

    with pytest.raises(ValueError, match="runs at places of 2 shapes"):
        activity.activity(Shared(), X)


def test_weights_that_are_not_finite_are_told():
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, math.nan)
    with pytest.raises(FloatingPointError, match="holds NaN"):
        activity.singular_values(model)
