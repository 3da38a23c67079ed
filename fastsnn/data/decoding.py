"""Encoded images (png, jpeg and relatives) as arrays."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..extras import need
from .sources import Source

#: Which files of a folder are images.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
#: The 8-bit modes of Pillow, and what each is read as.
MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


def is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def decode(source: Source, names: list[str], colour: bool = False) -> np.ndarray:
    """The images as one array [N, 3, H, W] uint8; [N, 1, H, W] where all are grey and `colour` is False.

    All must have one size: ValueError names the first that has another, or that does not decode.
    """
    Image = need("PIL.Image", "train")

    def picture(name: str) -> np.ndarray:
        raw = source.read(name)
        try:
            with Image.open(io.BytesIO(raw)) as image:
                if image.mode not in MODES:
                    raise ValueError(f"its mode is {image.mode}, which 8 bits do not hold")
                return np.asarray(image.convert(MODES[image.mode]))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # Pillow's formats each raise their own
            reason = "it is of no known kind" if isinstance(error, Image.UnidentifiedImageError) else error
            raise ValueError(f"data: {source.where(name)} does not decode ({reason}); wanted a whole 8-bit image.") from error

    first = picture(names[0])
    images = np.empty((len(names), 3, *first.shape[:2]), np.uint8)

    def put(place: int) -> bool:
        values = picture(names[place])
        if values.shape[:2] != first.shape[:2]:
            sizes = [f"{height} x {width}" for height, width in (values.shape[:2], first.shape[:2])]
            raise ValueError(f"data: {source.where(names[place])} has {sizes[0]} pixels, {names[0]} {sizes[1]}; wanted one size. Resize the images.")
        images[place] = values if values.ndim == 2 else values.transpose(2, 0, 1)
        return values.ndim == 2

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # Pillow decodes without Python's lock
        grey = list(threads.map(put, range(len(names))))
    return images if colour or not all(grey) else images[:, :1].copy()
