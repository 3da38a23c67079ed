"""The loss around images and weights, against plain loops; gradients by the pixels and how few of them count."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastsnn import NoisyLIF, landscapes
from fastsnn.attacks import FGSM
from torch import nn
from trained import digits, network

torch.manual_seed(0)
IMAGES, LABELS = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


class Plain(nn.Module):
    """Two linear layers with a bias, a normalisation and a filter of zeros; dropout tells training from evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        with torch.no_grad():
            self.first.weight[0] = 0

    def forward(self, x):
        return self.second(F.dropout(self.norm(self.first(x.flatten(1))).tanh(), 0.5, self.training))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.neuron = nn.Linear(16, 3), NoisyLIF(0.4)

    def forward(self, x):
        return self.neuron(self.layer(x.flatten(1)).expand(4, -1, -1)).mean(0)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Plain()


def loss_of(model, x) -> float:
    return F.cross_entropy(model(x).double(), LABELS).item()


@pytest.mark.parametrize("batch_size", [256, 20, 1])
@pytest.mark.parametrize("directions", [("gradient", "random"), ("random", "gradient"), ("random", "random")])
def test_pixels_against_a_loop(model, directions, batch_size):
    found = landscapes.pixels(model, IMAGES, LABELS, "8/255", directions, points=5, reach=2.0, seed=3, batch_size=batch_size)
    model.eval()
    x = IMAGES.clone().requires_grad_()
    F.cross_entropy(model(x), LABELS).backward()
    streams = landscapes.Streams(3, torch.arange(6))
    first, second = (x.grad.sign() if kind == "gradient" else streams.signs(1, 4, 4) for kind in directions)
    assert found.directions == directions and found.eps == 8 / 255 and found.a.tolist() == found.b.tolist() == [-2, -1, 0, 1, 2]
    with torch.no_grad():
        for i, b in enumerate(found.b):
            for j, a in enumerate(found.a):
                moved = (IMAGES + 8 / 255 * (float(a) * first + float(b) * second)).clamp(0, 1)
                assert found.loss[i, j] == pytest.approx(loss_of(model, moved), rel=1e-5)
                assert found.accuracy[i, j] == (model(moved).argmax(1) == LABELS).double().mean().item()


@pytest.mark.parametrize("name", ["snn", "ann"])
def test_one_step_along_the_gradient_is_fgsm(name):
    x, y = digits(16)
    model = network(name)
    found = landscapes.pixels(model, x, y, "16/255", points=3)
    moved = FGSM("16/255")(model, x, y)
    with torch.no_grad():
        assert found.loss[1, 2] == pytest.approx(F.cross_entropy(model(moved).double(), y).item(), rel=1e-5)
        assert found.loss[1, 1] == pytest.approx(F.cross_entropy(model(x).double(), y).item(), rel=1e-5)
    assert found.loss[1, 2] > found.loss[2, 1]  # the gradient's direction hurts more than a random one


@pytest.mark.parametrize("directions", [("gradient", "random"), ("random", "random")])
def test_weights_against_a_loop(model, directions):
    found = landscapes.weights(model, IMAGES, LABELS, directions, points=3, reach=0.5, seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    names = ("first.weight", "second.weight")
    F.cross_entropy(model(IMAGES), LABELS).backward()
    generator, moves = torch.Generator().manual_seed(2), []
    for kind in directions:
        each = []
        for name in names:
            weight = model.get_parameter(name)
            move = weight.grad if kind == "gradient" else torch.randn(weight.shape, generator=generator, dtype=torch.float64).float()
            each.append(torch.stack([row * size.norm() / row.norm() if row.norm() > 0 else row for row, size in zip(move, weight.detach())]))
        moves.append(each)
    with torch.no_grad():
        for i, b in enumerate(found.b):
            for j, a in enumerate(found.a):
                for name, first, second in zip(names, *moves):
                    model.get_parameter(name).copy_(before[name] + float(a) * first + float(b) * second)
                assert found.loss[i, j] == pytest.approx(loss_of(model, IMAGES), rel=1e-4)
    assert moves[0][0][0].norm() == 0 == moves[1][0][0].norm()  # a filter of zeros stays


@pytest.mark.parametrize("of", [landscapes.weights, lambda *given, **options: landscapes.pixels(*given, 0.1, **options)])
def test_models_are_left_as_they_were(model, of):
    model.norm.eval()
    model.first.bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    of(model, IMAGES, LABELS, points=3)
    assert torch.equal(numbers, torch.get_rng_state()) and modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.first.bias.requires_grad and model.first.weight.requires_grad and model.first.weight.grad is None


@pytest.mark.parametrize("of", [landscapes.weights, lambda *given, **options: landscapes.pixels(*given, 0.0, **options)])
def test_random_models_draw_the_same_numbers_everywhere(of):
    """At reach 0 the surface would be flat; so it is at eps 0, and at a reach too small to move a weight."""
    torch.manual_seed(0)
    found = of(Noisy(), IMAGES, LABELS, points=3, reach=1e-30)
    assert (found.loss == found.loss[1, 1]).all()
    assert (of(Noisy(), IMAGES, LABELS, points=3, reach=1e-30, seed=1).loss != found.loss).any()


def test_input_gradient_is_that_of_each_image(model):
    found = landscapes.input_gradient(model, IMAGES, LABELS, batch_size=4)
    model.eval()
    for k in range(6):
        x = IMAGES[k : k + 1].clone().requires_grad_()
        F.cross_entropy(model(x), LABELS[k : k + 1]).backward()
        torch.testing.assert_close(found[k : k + 1], x.grad, rtol=1e-4, atol=1e-7)


def test_input_gradient_passes_through_the_adjoint():
    x, y = digits(4)
    model = network("snn")
    own, other, pair = (landscapes.input_gradient(model, x, y, adjoint) for adjoint in (None, "bptr", ("spatial", None)))
    assert not torch.equal(own, other) and not torch.equal(own, pair) and not torch.equal(other, pair)


def test_sparsity():
    rows = torch.tensor([[0.0, -2.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0], [3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    zero, hoyer, l1 = landscapes.sparsity(rows.view(4, 1, 2, 2))
    assert zero.tolist() == [0.75, 0.0, 0.5, 1.0] and l1.tolist() == [2.0, 4.0, 7.0, 0.0]
    assert hoyer[:3].tolist() == pytest.approx([1.0, 0.0, 2 - 7 / 5]) and math.isnan(hoyer[3])


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"model": len}, TypeError, "model is a builtin_function_or_method; wanted a torch.nn.Module"),
        ({"images": IMAGES * 255}, ValueError, r"wanted \[0, 1\]"),
        ({"images": (IMAGES * 255).byte()}, TypeError, "images is torch.uint8"),
        ({"images": IMAGES * math.nan}, ValueError, "from nan to nan"),
        ({"labels": LABELS[:2]}, TypeError, r"labels is torch.int64 \[2\]; wanted int64 \[6\]"),
        ({"directions": ("gradient", "gradient")}, ValueError, "wanted at most one gradient"),
        ({"directions": ("gradeint", "random")}, ValueError, "Did you mean 'gradient'"),
        ({"directions": "random"}, ValueError, "wanted two of gradient, random"),
        ({"points": 4}, ValueError, "points is 4; wanted an odd int >= 3"),
        ({"points": 1}, ValueError, "points is 1; wanted an odd int >= 3"),
        ({"reach": 0}, ValueError, "reach is 0; wanted a number > 0"),
        ({"model": nn.Flatten(0)}, ValueError, r"the model returned \[864\] for 54 images; wanted logits|no parameter named weight"),
    ],
)
@pytest.mark.parametrize("space", ["pixels", "weights"])
def test_wrong_arguments(model, space, change, error, says):
    given = {"model": model, "images": IMAGES, "labels": LABELS, "directions": ("random", "random"), "points": 3} | change
    with pytest.raises(error, match=f"landscapes.{space}.*({says})"):
        getattr(landscapes, space)(**given, **({"eps": 0.1} if space == "pixels" else {}))


def test_wrong_gradients():
    with pytest.raises(ValueError, match=r"sparsity: gradient is \[4\]; wanted a tensor \[N, ...\]"):
        landscapes.sparsity(torch.ones(4))
    with pytest.raises(ValueError, match="eps is 'x'"):
        landscapes.pixels(Plain(), IMAGES, LABELS, "x")
