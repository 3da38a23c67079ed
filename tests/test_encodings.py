"""Encodings: what they show at each step, and what gradient they pass on."""

import math

import pytest
import torch
from fastsnn import encodings
from fastsnn.encodings import ENCODINGS, RSC, Direct, Encoding, Frequency, Latency, Poisson, make_encoding, radii_of
from torch import Tensor

STEPS = 8
every_encoding = pytest.mark.parametrize("name", ENCODINGS)
RANDOM = [name for name in ENCODINGS if ENCODINGS[name].random]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES = draw(2, 3, 16, 16)


@every_encoding
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shape_dtype_and_flags(name, dtype):
    encoding = make_encoding(name, STEPS)
    y = encoding(IMAGES.to(dtype))
    assert y.dtype == dtype and y.shape[0] in (1, STEPS) and y.shape[1:] == IMAGES.shape
    assert encoding.normalises in (True, False, None) and not (encoding.normalises is False and encoding.after_normalisation)
    assert f"steps={STEPS}" in repr(encoding)


@every_encoding
def test_random_as_declared_and_repeats_with_a_seed(name):
    encoding = make_encoding(name, STEPS)
    first, second = encoding(IMAGES), encoding(IMAGES)
    assert torch.equal(first, second) != encoding.random
    if encoding.random:
        torch.manual_seed(3)
        first = encoding(IMAGES)
        torch.manual_seed(3)
        assert torch.equal(encoding(IMAGES), first), "torch's seed does not count"
    encoding.seed = 5
    before = torch.get_rng_state()
    first = encoding(IMAGES)
    assert torch.equal(encoding(IMAGES), first) and torch.equal(torch.get_rng_state(), before)
    encoding.seed = 6
    assert torch.equal(encoding(IMAGES), first) != encoding.random


@every_encoding
def test_compiles_whole(name):
    encoding = make_encoding(name, STEPS)
    x = IMAGES.clone().requires_grad_()
    y = torch.compile(encoding, backend="eager", fullgraph=True)(x)
    if not encoding.random:
        assert torch.equal(y, encoding(x))
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("name", RANDOM)
def test_seeded_encodings_compile_with_a_break(name):
    encoding = make_encoding(name, STEPS)
    encoding.seed = 5
    assert torch.equal(torch.compile(encoding, backend="eager")(IMAGES), encoding(IMAGES))


# ---- direct ------------------------------------------------------------------------------------------------------------


def test_direct_is_the_image_itself():
    y = Direct(STEPS)(IMAGES)
    assert torch.equal(y, IMAGES[None]) and y.data_ptr() == IMAGES.data_ptr()
    assert Direct.after_normalisation and Direct.normalises is None


# ---- Poisson -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
def test_poisson_rates(signed):
    """Within five standard deviations of a binomial rate, for each grey value."""
    steps, n = 64, 1024
    encoding = Poisson(steps, signed)
    encoding.seed = 1
    for value in (-3.0, -1.0, -0.4, 0.0, 0.1, 0.5, 0.93, 1.0, 2.5) if signed else (0.0, 0.01, 0.3, 0.5, 0.97, 1.0):
        y = encoding(torch.full((1, 1, 1, n), value))
        rate = min(1.0, abs(value) / 2) if signed else value
        assert set(y.unique().tolist()) <= {0.0, math.copysign(1.0, value)}
        assert abs(y.abs().mean().item() - rate) <= 5 * math.sqrt(rate * (1 - rate) / (steps * n)), value


def test_poisson_is_fresh_at_each_step_and_pixel():
    encoding = Poisson(64)
    encoding.seed = 2
    y = encoding(torch.full((1, 1, 32, 32), 0.5)).flatten(1).double() - 0.5
    between_steps = (y[1:] * y[:-1]).mean().item() * 4
    between_pixels = (y[:, 1:] * y[:, :-1]).mean().item() * 4
    assert abs(between_steps) < 5 / 255 and abs(between_pixels) < 5 / 255


@pytest.mark.parametrize("encoding", [Poisson(STEPS), Poisson(STEPS, signed=True), RSC(STEPS, 0.2)], ids=repr)
def test_the_gradient_of_random_encodings_is_the_identity(encoding):
    x = (2 * IMAGES - 0.5).requires_grad_()
    weight = draw(STEPS, *IMAGES.shape, seed=1) - 0.5
    found = torch.autograd.grad(encoding(x), x, weight)[0]
    assert (found - weight.sum(0)).abs().max() < 1e-14


def test_poissons_place_is_with_pixels_unless_signed():
    assert Poisson(2).normalises is False and not Poisson(2).after_normalisation
    assert Poisson(2, signed=True).normalises is True and Poisson(2, signed=True).after_normalisation


# ---- RSC ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5])
def test_rsc_moments(sigma):
    encoding = RSC(64, sigma)
    encoding.seed = 3
    x = draw(1, 1, 32, 32)
    noise = encoding(x) - x
    n = noise.numel()
    assert abs(noise.mean().item()) <= 5 * sigma / math.sqrt(n)
    assert abs(noise.std().item() - sigma) <= 5 * sigma / math.sqrt(2 * n)
    assert abs((noise[1:] * noise[:-1]).mean().item()) <= 5 * sigma**2 / math.sqrt(n * 63 / 64)
    assert not encoding.after_normalisation and encoding.normalises is None


# ---- latency -----------------------------------------------------------------------------------------------------------


def test_latency_spikes_once_and_earlier_for_brighter_pixels():
    grey = torch.arange(256, dtype=torch.float32) / 255
    y = Latency(STEPS)(grey.view(1, 1, 16, 16)).flatten(1)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(y.sum(0), (grey > 0).float()), "a pixel spikes not once, or a black one does"
    step = y[:, 1:].argmax(0)
    assert (step.diff() <= 0).all() and step[0] == STEPS - 1 and step[-1] == 0
    counts = step.bincount()
    assert len(counts) == STEPS and counts.min() >= 31 and counts.max() <= 33, "steps are not equally wide"


@pytest.mark.parametrize("value, step", [(1.0, 0), (0.76, 0), (0.75, 1), (0.5, 2), (0.25, 3), (1e-9, 3), (1.2, 0)])
def test_latency_steps(value, step):
    y = Latency(4)(torch.full((1, 1, 1, 1), value))
    assert y.flatten().tolist() == [float(t == step) for t in range(4)]


def test_the_gradient_of_latency_is_that_of_the_pixels_own_step():
    x = torch.tensor([1.0, 0.5, 0.1, 0.0]).view(1, 1, 1, 4).requires_grad_()
    weight = torch.arange(1.0, 17).view(4, 1, 1, 1, 4)
    found = torch.autograd.grad(Latency(4)(x), x, weight)[0]
    assert torch.equal(found.flatten(), weight[[0, 2, 3, 3], 0, 0, 0, [0, 1, 2, 3]])


# ---- frequency ---------------------------------------------------------------------------------------------------------


def test_published_radii():
    assert radii_of(32, 8) == (16, 14, 12, 10, 8, 6, 4, 2)
    assert radii_of(32, 4) == (16, 14, 12, 10)
    assert radii_of(64, 4) == (32, 30, 28, 26)


@pytest.mark.parametrize("size", [1, 7, 8, 28, 32, 64, 224])
@pytest.mark.parametrize("steps", [1, 4, 8, 20])
def test_radii_of_any_size(size, steps):
    radii = radii_of(size, steps)
    assert len(radii) == steps and radii[0] == (size + 1) // 2 and min(radii) >= 1
    assert all(first >= second for first, second in zip(radii, radii[1:]))


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 10)], ids=str)
def test_half_the_size_returns_the_absolute_image(size):
    x = (draw(2, 3, *size) - 0.5).requires_grad_()
    y = Frequency(2, radii=(6, 5))(x)
    assert (y - x.detach().abs()).abs().max() < 1e-14
    weight = draw(*y.shape, seed=1)
    found = torch.autograd.grad(y, x, weight)[0]
    assert (found - weight.sum(0) * x.detach().sign()).abs().max() < 1e-13


def by_matrices(x: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """The same filter without an FFT: a sum of the kept waves along rows and columns, then |.|."""

    def filter_of(size: int, r: int) -> Tensor:
        k = torch.arange(-(size // 2), size - size // 2)
        k = k[(k >= -r) & (k < r)].double()
        n = torch.arange(size).double()
        return torch.exp(2j * math.pi / size * k[:, None, None] * (n[:, None] - n)).sum(0) / size

    steps = [filter_of(x.shape[-2], r) @ x.to(torch.complex128) @ filter_of(x.shape[-1], c).T for r, c in zip(rows, columns)]
    return torch.stack(steps).abs()


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (32, 32), (12, 8)], ids=str)
def test_frequency_keeps_the_waves_within_the_box(size):
    x = (draw(2, 1, *size) - 0.3).requires_grad_()
    wanted = by_matrices(x, radii_of(size[0], 4), radii_of(size[1], 4))
    y = Frequency(4)(x)
    assert (y - wanted).abs().max() < 1e-12
    weight = draw(*y.shape, seed=1)
    found, wanted = (torch.autograd.grad(out, x, weight)[0] for out in (y, wanted))
    assert (found - wanted).abs().max() < 1e-10


def test_frequency_takes_radii():
    x = draw(1, 1, 8, 8)
    assert (Frequency(2, radii=[1, 3])(x) - by_matrices(x, (1, 3), (1, 3))).abs().max() < 1e-13
    assert Frequency.normalises is False and not Frequency.after_normalisation


# ---- errors ------------------------------------------------------------------------------------------------------------


class Unwritten(Encoding):
    pass


@pytest.mark.parametrize(
    "kind, call, words",
    [
        (ValueError, lambda: Direct(0), ["Direct", "steps is 0", "int >= 1"]),
        (ValueError, lambda: Poisson(4)(IMAGES[0]), ["Poisson", "[3, 16, 16]", "[N, C, H, W]", "images[None]"]),
        (TypeError, lambda: Direct(4)((255 * IMAGES).byte()), ["Direct", "torch.uint8", "/ 255"]),
        (ValueError, lambda: RSC(4, sigma=-1), ["RSC", "sigma is -1", ">= 0"]),
        (ValueError, lambda: Frequency(4, radii=(2, 1)), ["Frequency", "(2, 1)", "4 ints"]),
        (ValueError, lambda: Frequency(2, radii=(2, 0)), ["Frequency", "(2, 0)", ">= 1"]),
        (ValueError, lambda: make_encoding("poison", 4), ["'poison'", "latency", "Did you mean 'poisson'?"]),
        (ValueError, lambda: make_encoding("rsc", 4, sigme=1), ["rsc has no option 'sigme'", "Did you mean 'sigma'?"]),
        (ValueError, lambda: make_encoding("direct", 4, signed=True), ["direct has no option 'signed'", "takes none"]),
        (NotImplementedError, lambda: Unwritten(4)(IMAGES), ["Unwritten", "encode(images)"]),
    ],
)
def test_errors_say_what_is_wrong(kind, call, words):
    with pytest.raises(kind) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_every_encoding_is_exported():
    assert all(kind.__name__ in encodings.__all__ for kind in ENCODINGS.values())
