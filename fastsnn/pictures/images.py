"""Images and what an attack makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import DARK, LIGHT, figure_of, png, styled

#: Inches: an image with its margin, and the rows' names.
CELL, NAMES = 1.0, 1.05


@dataclass(frozen=True)
class Example:
    """An image before and after an attack.

    clean, adversarial: [C, H, W] with values in [0, 1], C 1 or 3. gradient: [C, H, W], of the loss by the clean image's pixels.
    label: its class; before, after: the classes that the model sees.
    """

    clean: np.ndarray
    adversarial: np.ndarray
    gradient: np.ndarray
    label: int
    before: int
    after: int


def examples(found: Sequence[Example], eps: float, dark: bool = False) -> bytes:
    """Columns of clean image, adversarial image, their difference from -eps (eps in pixels) to eps, and the gradient's size.

    Differences of grey images are blue where darker and red where brighter; of coloured ones, colours around a middle grey. The
    gradient of each image is scaled by its largest entry.
    """
    with styled(dark) as (ink, muted, _):
        colours = DARK if dark else LIGHT
        rows = ("clean", "adversarial", "difference", "gradient")
        width, height = NAMES + CELL * len(found), CELL * len(rows) * 1.18 + 0.1
        figure = figure_of(width, height, layout=None)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for row, name in enumerate(rows):
            axes.text(-0.06, row * 1.18 + 0.7, name, ha="right", va="center", color=ink)
        for column, one in enumerate(found):
            fooled = one.after != one.label
            titles = (
                f"class {one.label}" if one.before == one.label else f"{one.label}, seen as {one.before}",
                f"seen as {one.after}",
                f"{np.abs(one.adversarial - one.clean).max() * 255:.3g}/255",
                f"{100 * np.mean(one.gradient == 0):.0f} % zero",
            )
            bodies = (_colours(one.clean), _colours(one.adversarial), _difference(one, eps), _heat(one.gradient, dark))
            for row, (title, body) in enumerate(zip(titles, bodies)):
                top = row * 1.18 + 0.24
                axes.imshow(body, extent=(column + 0.04, column + 0.96, top + 0.92, top), interpolation="nearest", aspect="auto")
                told = {"color": colours[1], "weight": "bold"} if row == 1 and fooled else {"color": muted if row > 1 else ink}
                axes.text(column + 0.5, top - 0.03, title, ha="center", va="bottom", fontsize=7.5, **told)
        axes.set_xlim(-NAMES / CELL, len(found))
        axes.set_ylim(height / CELL, 0)
        return png(figure)


def _colours(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] of an image [C, H, W]; of other numbers of channels their mean, in grey."""
    image = image if len(image) == 3 else np.repeat(image.mean(0, keepdims=True), 3, 0)
    return np.clip(np.moveaxis(image, 0, 2), 0, 1)


def _difference(one: Example, eps: float) -> np.ndarray:
    from matplotlib import colormaps

    share = 0.5 + (one.adversarial - one.clean) / (2 * max(eps, 1e-12))
    return _colours(share) if len(share) == 3 else colormaps["RdBu_r"](np.clip(share.mean(0), 0, 1))[..., :3]


def _heat(gradient: np.ndarray, dark: bool) -> np.ndarray:
    """The largest entry of each pixel's channels, as a share of the image's largest; nothing is the ground's colour."""
    from matplotlib import colormaps

    size = np.abs(gradient).max(0)
    share = size / (size.max() or 1.0)
    return colormaps["magma" if dark else "magma_r"](share)[..., :3]
