"""What every reader returns, checked, and its stratified parts."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: More classes than any data set has: a larger label is a wrong file, and would cost memory.
MOST_CLASSES = 65536


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images in memory.

    x_train, x_test: [N, C, H, W] uint8, pixels 0 to 255. y_train, y_test: [N] int64, 0 to classes - 1.
    labels: the names of the classes. Raises ValueError that names the field which does not fit.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(map(str, self.labels)))
        for part in ("train", "test"):
            x, y = pair(getattr(self, f"x_{part}"), getattr(self, f"y_{part}"), len(self.labels), f"{self.name}: x_{part}", f"{self.name}: y_{part}")
            object.__setattr__(self, f"x_{part}", x)
            object.__setattr__(self, f"y_{part}", y)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"data: {self.name}: test images are {list(self.x_test.shape[1:])}, training images {list(self.x_train.shape[1:])}; "
                "wanted one [C, H, W]. Resize or convert one of them."
            )

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of an image, (C, H, W)."""
        return tuple(self.x_train.shape[1:])

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.labels)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any pixel, label or class name, and with nothing else (BLAKE2b)."""
        digest = hashlib.blake2b(repr(self.labels).encode(), digest_size=8)
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(repr(list(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike) -> Path:
        """Write the data set as an .npz that `load` reads; a file that was there stays whole until the new one is.

        >>> fastsnn.data.load("tiny-imagenet-200").save("tiny.npz")  # decoded once
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"data: {path} is not named *.npz, by which load knows the format. Name it {path.stem}.npz.")
        arrays = {key: getattr(self, key).cpu().numpy() for key in ("x_train", "y_train", "x_test", "y_test")}
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays, labels=np.array(self.labels), name=np.array(self.name))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
        return path

    def limited(self, train: int | None = None, test: int | None = None) -> Dataset:
        """At most `train` training and `test` test images, each class keeping its share; the same ones each time."""
        chosen = {}
        for part, limit in (("train", train), ("test", test)):
            x, y = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if limit is not None and (not isinstance(limit, int) or limit < 1):
                raise ValueError(f"data: {part}_limit is {limit!r}; wanted an int >= 1, or None for all {len(y)} images.")
            if limit is not None and limit < len(y):
                kept, _ = stratified(y, limit, seed=0)
                x, y = x[kept], y[kept]
            chosen |= {f"x_{part}": x, f"y_{part}": y}
        return Dataset(self.name, **chosen, labels=self.labels)


def _tensor(values: Tensor | np.ndarray, where: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        what = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
        raise ValueError(f"data: {where} is {what}; wanted an array of numbers.")
    return torch.from_numpy(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=not values.flags.writeable)))


def pair(images: Tensor | np.ndarray, labels: Tensor | np.ndarray, classes: int, images_at: str, labels_at: str) -> tuple[Tensor, Tensor]:
    """Images [N, C, H, W] uint8 and labels [N] int64 in 0 to classes - 1, or a ValueError that says at which of the two places it fails."""
    images, labels = _tensor(images, images_at), _tensor(labels, labels_at)
    if images.dtype != torch.uint8:
        cure = " Store round(255 * x) where pixels are 0 to 1." if images.is_floating_point() else ""
        raise ValueError(f"data: {images_at} is {str(images.dtype).removeprefix('torch.')}; wanted uint8, pixels 0 to 255.{cure}")
    if images.dim() != 4 or 0 in images.shape[1:]:
        cure = " Add the channel: x[:, None]." if images.dim() == 3 else ""
        raise ValueError(f"data: {images_at} has shape {list(images.shape)}; wanted [N, C, H, W].{cure}")
    if images.shape[3] in (1, 3, 4) and images.shape[1] > 4:
        raise ValueError(f"data: {images_at} has shape {list(images.shape)}, channels last; wanted [N, C, H, W]. Use x.transpose(0, 3, 1, 2).")
    if labels.dtype == torch.bool or labels.is_floating_point():
        raise ValueError(f"data: {labels_at} is {str(labels.dtype).removeprefix('torch.')}; wanted an integer type, one class number per image.")
    if labels.dim() != 1:
        cure = " Use y.argmax(1)." if labels.dim() == 2 and labels.shape[1] == classes else ""
        raise ValueError(f"data: {labels_at} has shape {list(labels.shape)}; wanted [N], one class number per image.{cure}")
    if len(images) != len(labels):
        raise ValueError(f"data: {images_at} holds {len(images)} images, {labels_at} {len(labels)} labels; wanted as many of both.")
    if len(images) == 0:
        raise ValueError(f"data: {images_at} holds no image; wanted at least one.")
    labels = labels.to(torch.int64)
    check_range(labels, 0, classes - 1, labels_at)
    return images.contiguous(), labels.contiguous()


def check_range(labels: Tensor, lowest: int, highest: int, where: str) -> None:
    """ValueError at the first label outside of lowest to highest."""
    outside = ((labels < lowest) | (labels > highest)).nonzero()
    if len(outside):
        place = int(outside[0])
        raise ValueError(f"data: {where}: label {int(labels[place])} at position {place} is out of range; wanted {lowest} to {highest}.")


def stratified(y: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` positions of y, each class with its share to within one, and the other positions; both sorted, [*] int64.

    Shares are rounded down, and what is missing goes to the largest remainders, ties to the lower class.
    """
    generator = torch.Generator().manual_seed(seed)
    y = y.cpu()
    order = torch.randperm(len(y), generator=generator)
    order = order[torch.argsort(y[order], stable=True)]  # by class, shuffled within
    sizes = torch.bincount(y)
    quotas = sizes * count // len(y)
    remainders = sizes * count % len(y)
    quotas[torch.argsort(remainders, descending=True, stable=True)[: count - int(quotas.sum())]] += 1
    position = torch.arange(len(y)) - (sizes.cumsum(0) - sizes)[y[order]]  # within its class
    first = position < quotas[y[order]]
    return order[first].sort().values, order[~first].sort().values


def split(x_train: Tensor, y_train: Tensor, validation: float | int = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions of the images for training and of those for validation, each class with its share of both.

    x_train: [N, ...]; y_train: [N] int64. validation: a share in [0, 1), or a number of images (int >= 1).
    Returns two sorted int64 tensors on the CPU that together hold 0 to N - 1 once; the same for the same seed.

    >>> train, validation = split(data.x_train, data.y_train, validation=0.1, seed=0)
    """
    if len(x_train) != len(y_train):
        raise ValueError(f"split: x_train holds {len(x_train)} images, y_train {len(y_train)} labels; wanted as many of both.")
    share = isinstance(validation, float) or validation == 0
    count = round(validation * len(y_train)) if share else validation
    if not (0 <= validation < 1 if share else 1 <= validation) or count >= len(y_train):
        raise ValueError(f"split: validation is {validation!r} of {len(y_train)} images; wanted a share in [0, 1) or a number of images that leaves some to train on.")
    held_out, rest = stratified(y_train, count, seed)
    return rest, held_out
