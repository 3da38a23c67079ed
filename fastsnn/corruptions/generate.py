"""CIFAR-C's corruptions for any images, over SciPy and Pillow, with the severities of CIFAR-10-C.

Each function takes an image [H, W, C] float64 in [0, 1], its setting for the severity, and a generator of random numbers, and returns
an image of the same shape, float or uint8.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..adjoints import nearest
from ..extras import need
from .files import SEVERITIES, check_severity

__all__ = ["CORRUPTIONS", "GENERATED", "corrupt", "generated", "suiting"]

Image = np.ndarray
Random = np.random.Generator


def _ndimage():
    return need("scipy.ndimage", "corruptions")


def _pillow():
    return need("PIL.Image", "corruptions")


def gaussian_noise(x: Image, scale: float, random: Random) -> Image:
    return x + random.normal(scale=scale, size=x.shape)


def shot_noise(x: Image, photons: float, random: Random) -> Image:
    return random.poisson(x * photons) / photons


def impulse_noise(x: Image, share: float, random: Random) -> Image:
    hit, salt = random.random(x.shape) < share, random.random(x.shape) < 0.5
    return np.where(hit, salt.astype(x.dtype), x)


def speckle_noise(x: Image, scale: float, random: Random) -> Image:
    return x + x * random.normal(scale=scale, size=x.shape)


def gaussian_blur(x: Image, sigma: float, random: Random) -> Image:
    return _ndimage().gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def defocus_blur(x: Image, setting: tuple[float, float], random: Random) -> Image:
    """A disk of this radius, its edge smoothed by three taps of a Gaussian."""
    radius, smooth = setting
    reach = int(np.ceil(radius)) + 1
    across = np.arange(-reach, reach + 1)
    disk = (across[:, None] ** 2 + across**2 <= radius**2).astype(float)
    taps = np.exp(-0.5 * (np.array([-1, 0, 1]) / smooth) ** 2)
    for axis in (0, 1):
        disk = _ndimage().convolve1d(disk, taps / taps.sum(), axis=axis, mode="constant")
    return _ndimage().convolve(x, (disk / disk.sum())[..., None], mode="mirror")


def glass_blur(x: Image, setting: tuple[float, int, int], random: Random) -> Image:
    """Each pixel takes the place of a neighbour's, between two blurs; the script that made CIFAR-C copies where its text says swap [R]."""
    sigma, reach, rounds = setting
    x = np.floor(gaussian_blur(x, sigma, random) * 255)
    rows, columns = (range(size - reach, reach, -1) for size in x.shape[:2])
    for _ in range(rounds):
        steps = random.integers(-reach, reach, size=(len(rows), len(columns), 2))
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                down, right = steps[i, j]
                x[row, column] = x[row + down, column + right]
    return gaussian_blur(x / 255, sigma, random)


def motion_blur(x: Image, setting: tuple[int, float], random: Random) -> Image:
    return _motion(x, *setting, random.uniform(-45, 45))


def zoom_blur(x: Image, furthest: float, random: Random) -> Image:
    factors = np.arange(1, furthest, 0.01)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(x: Image, setting: tuple[float, ...], random: Random) -> Image:
    mean, deviation, zoom, threshold, radius, sigma, kept = setting
    flakes = _zoom(random.normal(mean, deviation, x.shape[:2])[..., None], zoom)
    flakes = np.floor(np.clip(np.where(flakes < threshold, 0, flakes), 0, 1) * 255) / 255
    flakes = _motion(flakes, int(radius), sigma, random.uniform(-135, -45))
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None] if x.shape[2] == 3 else x
    x = kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5)
    return x + flakes + flakes[::-1, ::-1]


def fog(x: Image, setting: tuple[float, float], random: Random) -> Image:
    density, decay = setting
    size = 1 << (max(x.shape[:2]) - 1).bit_length()
    top = x.max()
    return (x + density * _plasma(size, decay, random)[: x.shape[0], : x.shape[1], None]) * top / (top + density)


def brightness(x: Image, more: float, random: Random) -> Image:
    """Value + more in hue, saturation, value: each colour in proportion to the largest, black to grey."""
    value = x.max(2, keepdims=True)
    wanted = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * wanted / np.where(value > 0, value, 1), wanted)


def saturate(x: Image, setting: tuple[float, float], random: Random) -> Image:
    """Saturation * factor + more in hue, saturation, value; a grey pixel's hue is red, as usual."""
    if x.shape[2] != 3:
        raise ValueError(f"corrupt: saturate takes images with 3 channels; these have {x.shape[2]}. Leave it out of the names.")
    factor, more = setting
    value = x.max(2, keepdims=True)
    span = value - x.min(2, keepdims=True)
    saturation = span / np.where(value > 0, value, 1)
    below = np.where(span > 0, (value - x) / np.where(span > 0, span, 1), np.array([0.0, 1.0, 1.0]))
    return value - value * np.clip(saturation * factor + more, 0, 1) * below


def contrast(x: Image, factor: float, random: Random) -> Image:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def pixelate(x: Image, share: float, random: Random) -> Image:
    image, box = _picture(x), _pillow().Resampling.BOX
    return _array(image.resize([max(1, int(size * share)) for size in image.size], box).resize(image.size, box), x)


def jpeg_compression(x: Image, quality: int, random: Random) -> Image:
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=quality)
    return _array(_pillow().open(file), x)


def elastic_transform(x: Image, setting: tuple[float, float, float], random: Random) -> Image:
    """A random affine map of three points, then a smooth random displacement; lengths in units of the image's shorter side."""
    ndimage, side = _ndimage(), min(x.shape[:2])
    strength, smooth, shift = (side * value for value in setting)
    centre, arm = np.array(x.shape[:2]) // 2, side // 3
    before = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + random.uniform(-shift, shift, before.shape)
    back = np.linalg.solve(np.c_[after, np.ones(3)], before)  # from places of the new image to those of the old
    places = np.stack(np.mgrid[: x.shape[0], : x.shape[1]], -1)
    sources = places @ back[:2] + back[2]
    moves = [ndimage.gaussian_filter(random.uniform(-1, 1, x.shape[:2]), smooth, mode="reflect", truncate=3) * strength for _ in range(2)]
    for where, mode in ((sources, "mirror"), (places + np.stack(moves, -1), "reflect")):
        x = np.stack([ndimage.map_coordinates(plane, np.moveaxis(where, -1, 0), order=1, mode=mode) for plane in np.moveaxis(x, -1, 0)], -1)
    return x


#: What is generated: name -> (function, its setting at severities 1 to 5), from the script that made CIFAR-10-C.
GENERATED: dict[str, tuple[Callable[..., Image], tuple]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (elastic_transform, ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "saturate": (saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
#: The corruptions of CIFAR-C by their files' names: 15, and the four held out for validation. Frost needs its photographs and spatter
#: OpenCV's edges: these two are read from files only.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog"),
    *("brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression", "speckle_noise", "gaussian_blur", "spatter", "saturate"),
)


def corrupt(x: Tensor, corruption: str, severity: int, seed: int = 0, indices: Sequence[int] | Tensor | None = None) -> Tensor:
    """Images under a corruption of GENERATED: uint8, like x, on the CPU.

    x: [N, 1 or 3, H, W] uint8. severity: 1 to 5. seed: of the random numbers, keyed by it, the corruption, the severity and the index of
    each image; indices: [N] the images' places in the data set, by default 0 ... N-1. Settings are those of CIFAR-10-C, made for 32 pixels,
    whatever the size of x; the images are of the same kind as CIFAR-C's, not the same images. Needs SciPy and Pillow. A ValueError or
    TypeError for unknown names, other severities and images of another form. Source: Hendrycks and Dietterich, ICLR 2019.

    >>> foggy = corrupt(data.x_test, "fog", severity=3)
    """
    if corruption not in GENERATED:
        why = "is read from files only" if corruption in CORRUPTIONS else "is unknown"
        raise ValueError(f"corrupt: corruption {corruption!r} {why}; wanted one of {', '.join(GENERATED)}.{nearest(corruption, tuple(GENERATED))}")
    check_severity("corrupt", severity)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"corrupt: seed is {seed!r}; wanted an int.")
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"corrupt: x is {got}; wanted uint8, pixels from 0 to 255. For pixels in [0, 1]: (x * 255).round().byte().")
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"corrupt: x has shape {list(x.shape)}; wanted [N, 1 or 3, H, W].")
    places = range(len(x)) if indices is None else [int(place) for place in indices]
    if len(places) != len(x) or min(places, default=0) < 0:
        raise ValueError(f"corrupt: indices holds {len(places)} places from {min(places, default=0)}; wanted {len(x)}, one for each image, from 0.")
    function, settings = GENERATED[corruption]
    number = CORRUPTIONS.index(corruption)
    found = np.empty(x.shape, np.uint8)
    for target, image, place in zip(found, x.cpu().numpy(), places):
        random = np.random.default_rng([seed % 2**64, number, severity, place])
        made = function(image.transpose(1, 2, 0) / 255, settings[severity - 1], random)
        if made.dtype != np.uint8:  # cut, not rounded, as CIFAR-C was; the summand keeps what rounding alone has put below a whole number
            made = (np.clip(made, 0, 1) * 255 + 1e-9).astype(np.uint8)
        target[:] = made.transpose(2, 0, 1)
    return torch.from_numpy(found)


def generated(
    x: Tensor, y: Tensor, corruptions: Sequence[str] | None = None, severities: Sequence[int] = SEVERITIES, seed: int = 0
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """(corruption, severity, corrupted x, y) for each corruption of GENERATED, or those named, and each severity; see `corrupt`.

    By default all that suit x: `saturate` is left out for images of one channel.

    >>> rows = evaluate(model, generated(data.x_test, data.y_test, ["fog", "contrast"]))
    """
    chosen = suiting(x) if corruptions is None else corruptions
    return ((name, severity, corrupt(x, name, severity, seed), y) for name in chosen for severity in severities)


def suiting(x: Tensor) -> list[str]:
    """The corruptions of GENERATED that images x [N, C, H, W] can have."""
    return [name for name in GENERATED if name != "saturate" or x.shape[1] == 3]


def _picture(x: Image):
    """A Pillow image of [H, W, C]."""
    return _pillow().fromarray(np.round(x * 255).astype(np.uint8).squeeze(2) if x.shape[2] == 1 else np.round(x * 255).astype(np.uint8))


def _array(picture, like: Image) -> Image:
    return np.asarray(picture, np.uint8).reshape(like.shape)


def _zoom(x: Image, factor: float) -> Image:
    """The middle of [H, W, C] enlarged to its size, linearly."""
    sizes = x.shape[:2]
    crop = [int(np.ceil(size / factor)) for size in sizes]
    starts = [(size - part) // 2 for size, part in zip(sizes, crop)]
    x = _ndimage().zoom(x[starts[0] : starts[0] + crop[0], starts[1] : starts[1] + crop[1]], (factor, factor, 1), order=1)
    starts = [(got - size) // 2 for got, size in zip(x.shape, sizes)]
    return x[starts[0] : starts[0] + sizes[0], starts[1] : starts[1] + sizes[1]]


def _motion(x: Image, radius: int, sigma: float, angle: float) -> Image:
    """Half a Gaussian of 2*radius + 1 pixels in one direction (degrees), edges repeated: ImageMagick's motion blur."""
    along = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (along / sigma) ** 2)
    turn = np.deg2rad(angle)
    down, right = (np.ceil(along * part - 0.5).astype(int) for part in (np.sin(turn), np.cos(turn)))
    rows, columns = (np.clip(np.arange(size)[None] + steps[:, None], 0, size - 1) for size, steps in zip(x.shape, (down, right)))
    return sum(weight * x[row][:, column] for weight, row, column in zip(weights / weights.sum(), rows, columns))


def _plasma(size: int, decay: float, random: Random) -> Image:
    """A cloud [size, size] in [0, 1] by the diamond-square algorithm on a torus; size: a power of 2."""
    cloud, step, wobble = np.zeros((size, size)), size, 100.0

    def mean(*parts: Image) -> Image:
        return sum(parts) / 4 + wobble * random.uniform(-wobble, wobble, parts[0].shape)

    while step > 1:
        half = step // 2
        corners = cloud[::step, ::step]
        below = np.roll(corners, -1, 0)
        middles = cloud[half::step, half::step] = mean(corners, below, np.roll(corners, -1, 1), np.roll(below, -1, 1))
        cloud[::step, half::step] = mean(corners, np.roll(corners, -1, 1), middles, np.roll(middles, 1, 0))
        cloud[half::step, ::step] = mean(corners, below, middles, np.roll(middles, 1, 1))
        step, wobble = half, wobble / decay
    cloud -= cloud.min()
    return cloud / (cloud.max() or 1.0)
