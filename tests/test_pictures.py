"""The pictures: the same bytes for the same data, light and dark, and odd data drawn too."""

import io

import numpy as np
import pytest
from fastsnn import pictures
from fastsnn.pictures import Bars, Curve, Example, Ground, Layer, Panel

RANDOM = np.random.default_rng(0)
AXIS = np.linspace(-1, 1, 5)


def example(channels: int = 1, after: int = 3, gradient: float = 1.0) -> Example:
    clean = RANDOM.random((channels, 4, 4))
    return Example(clean, np.clip(clean + 0.1, 0, 1), gradient * RANDOM.normal(size=clean.shape), 3, 3, after)


def layer(density: np.ndarray, deviation: float = 1.0, half_width: float = 1.0) -> Layer:
    return Layer("x", np.linspace(-2, 2, 9), density, density, 0.0, deviation, 0.5, 0.5, 0.0, 1.0, half_width, np.ones_like)


EVEN = np.full(8, 0.25)
LINE, POINT = Curve("a", [1, 2], [0.1, 0.3]), Curve("b", [1], [2.0])

#: One way to draw each picture, by the name of its function.
PLAIN = {
    "against_eps": ({"PGD": [Curve("a", [0.0, 0.1], [0.9, 0.2], [0.8, 0.1], [1.0, 0.3])]}, ["a"], 0.1),
    "against_steps": ({"PGD": [Curve("a", [1, 10, 100], [0.9, 0.2, 0.1])]}, ["a"]),
    "curves": ([Panel("one", "potential", [LINE, POINT])],),
    "errors_by_steps": ([Curve("a", [4, 8, 64], [0.5, 0.3, 0.04])], "errors", "relative error"),
    "examples": ([example()], 0.1),
    "landscapes": ([Ground("Pixels", "a", "b", AXIS, AXIS, AXIS[:, None] ** 2 + AXIS**2)],),
    "layers_over_training": ([Panel("one", "potential", [LINE])],),
    "layers_under_attack": ([Panel("S", "norm", [Curve("PGD", ["first", "second"], [1.0, 2.0])])], {"first": [2.0, 1.0], "second": [3.0]}),
    "members": (["bptr", "ste"], ["8/255"], [Bars("run", [[0.5, 0.4]], [[0.5, None]])]),
    "membranes": ([layer(EVEN)],),
}

TALL = np.array([0.01, 50.0, *[0.01] * 6])
RUNS = [Curve(f"run {i}", [0.0, 8 / 255], [0.9, i / 30], [0.8, 0.0], [1.0, 0.9]) for i in range(20)]
NAMES = [f"blocks.{i}.branch.neuron" for i in range(20)]
#: One point, one value, an endless window, a bar far above the rest, many runs and layers, flat and steep ground, nothing at all.
ODD = [
    ("membranes", ([layer(TALL, 1e-6, float("inf"))],)),
    ("layers_over_training", ([Panel("", "", [Curve("x", [1], [0.5])])],)),
    ("curves", ([Panel("", "", [], log=True), Panel("", "", [Curve("x", [3], [0.5])], share=True)],)),
    ("against_eps", ({"FGSM": [None, *RUNS]}, [f"{i}" for i in range(21)], 0.1)),
    ("against_steps", ({"PGD": [Curve("a", [7], [0.5])], "BIM": [None]}, ["a"], 0.1)),
    ("errors_by_steps", ([Curve("a", [4], [0.0])], "", "")),
    ("errors_by_steps", ([Curve(name, [1, 2, 3, 1000], [0.0, 1.0, 2.0, 1e-9]) for name in NAMES], "", "")),
    ("examples", ([example(3, 5), example(1), example(2, 3, 0.0)], 0.0)),
    ("landscapes", ([Ground("", "", "", AXIS, AXIS, heights) for heights in (np.zeros((5, 5)), np.full((5, 5), 2.0), np.exp(20 * AXIS[:, None] + AXIS))],)),
    ("layers_under_attack", ([], {"a": [0.0], "b": [0.0, 0.0]})),
    ("layers_under_attack", ([Panel("", "", [Curve("", NAMES, [0.0] * 20)])], {name: [1.0, 0.0] for name in NAMES})),
    ("layers_under_attack", ([Panel("", "", [Curve("", ["a"], [1.0])])], {})),
    ("members", (["a"], ["1/255", "2/255", "3/255"], [Bars(f"{i}", [[0.0], [None], [1.0]], [[None]] * 3) for i in range(4)])),
]


def corner(png: bytes) -> list[int]:
    from matplotlib.image import imread

    return [round(255 * float(value)) for value in imread(io.BytesIO(png), format="png")[0, 0, :3]]


def test_every_picture_is_tried():
    functions = {name for name in pictures.__all__ if name.islower() and name != "window"}
    assert functions == set(PLAIN) == {name for name, _ in ODD}


@pytest.mark.parametrize("name", PLAIN)
def test_pictures_repeat_whatever_the_user_s_settings(name, monkeypatch):
    import matplotlib

    monkeypatch.setattr(pictures.base, "DPI", 40)
    draw = getattr(pictures, name)
    first = draw(*PLAIN[name])
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert draw(*PLAIN[name]) == first
        assert matplotlib.rcParams["font.size"] == 30
    assert first.startswith(b"\x89PNG") and corner(first) == [255, 255, 255]


@pytest.mark.parametrize("name, arguments", ODD)
def test_pictures_of_odd_data(name, arguments, monkeypatch):
    monkeypatch.setattr(pictures.base, "DPI", 40)
    png = getattr(pictures, name)(*arguments, dark=True)
    assert png.startswith(b"\x89PNG") and len(png) > 1000 and corner(png) == [0x15, 0x19, 0x1E]


def test_examples_show_the_difference_from_minus_eps_to_eps(monkeypatch):
    """Red where brighter by eps, blue where darker, white where nothing changes."""
    from matplotlib.image import imread

    monkeypatch.setattr(pictures.base, "DPI", 100)
    clean = np.full((1, 1, 3), 0.5)
    png = pictures.examples([Example(clean, clean + 0.1 * np.array([[[-1.0, 0.0, 1.0]]]), np.ones_like(clean), 0, 0, 0)], 0.1)
    picture = imread(io.BytesIO(png), format="png")[..., :3]
    row = picture[round((2 * 1.18 + 0.24 + 0.46) * 100)]  # the middle of the third row
    left, middle, right = (row[round((pictures.images.NAMES + place) * 100)] for place in (0.2, 0.5, 0.8))
    assert left[2] > 2 * left[0] and right[0] > 2 * right[2] and min(middle) > 0.95
