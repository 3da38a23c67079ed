"""`load`: which format a path holds, and the readers of each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..adjoints import nearest
from ..extras import need
from . import readers
from .dataset import Dataset, split
from .sources import ARCHIVES, Folder, Source, open_source


@dataclass(frozen=True)
class Format:
    """How one format is told and read.

    read: from a folder or archive, or, where `on_source` is False, from the text after the colon of a spec.
    text: what it reads, for help and errors. files: a folder or archive that holds one of these is of this format.
    """

    read: Callable[..., Dataset]
    text: str
    files: tuple[str, ...] = ()
    on_source: bool = True


def _digits(_: str) -> Dataset:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, which come with the package; a fixed fifth is the test set."""
    found = need("sklearn.datasets", "train").load_digits()
    x = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8))[:, None]
    y = torch.from_numpy(found.target.astype(np.int64))
    train, test = split(x, y, validation=0.2, seed=0)
    return Dataset("digits", x[train], y[train], x[test], y[test], tuple(map(str, range(10))))


def _npz(text: str) -> Dataset:
    return readers.npz(Path(text))


def _torchvision(text: str) -> Dataset:
    name, _, root = text.partition(":")
    if name not in readers.TORCHVISION:
        raise ValueError(f"data: torchvision:{name} is unknown; wanted one of {', '.join(readers.TORCHVISION)}.{nearest(name, readers.TORCHVISION)}")
    if not root:
        raise ValueError(f"data: torchvision:{name} names no folder; wanted torchvision:{name}:FOLDER, where it is or is to be downloaded to.")
    return readers.torchvision(name, root)


#: Every format by name; the order is that of the errors.
FORMATS = {
    "digits": Format(_digits, "scikit-learn's digits, no file needed", on_source=False),
    "npz": Format(_npz, "an .npz with x_train, y_train, x_test, y_test, and labels if the classes have names", on_source=False),
    "cifar10": Format(readers.cifar10, "cifar-10-batches-py or cifar-10-python.tar.gz", readers.CIFAR10_FILES),
    "cifar100": Format(readers.cifar100, "cifar-100-python or cifar-100-python.tar.gz", ("meta", "train")),
    "mnist": Format(readers.mnist, "MNIST's four IDX files, plain or .gz", readers.IDX_FILES),
    "fashion-mnist": Format(readers.fashion_mnist, "Fashion-MNIST's four IDX files, plain or .gz"),
    "svhn": Format(readers.svhn, "train_32x32.mat and test_32x32.mat", ("train_32x32.mat", "test_32x32.mat")),
    "tiny": Format(readers.tiny, "tiny-imagenet-200 or tiny-imagenet-200.zip", ("wnids.txt", "val_annotations.txt")),
    "images": Format(readers.images, "train/CLASS/* and test/CLASS/* (or val/) of one size"),
    "torchvision": Format(_torchvision, "torchvision:CIFAR10:FOLDER, through torchvision", on_source=False),
}


def load(spec: str | os.PathLike, train_limit: int | None = None, test_limit: int | None = None) -> Dataset:
    """A data set in memory, from a path (its format is recognised), `FORMAT:PATH`, or `digits`.

    spec: a folder, an archive (.zip, .tar, .tar.gz, never unpacked to disk), an .npz, or one file of a data set in its
        folder; formats: `fastsnn.data.FORMATS`. Files are read as their official sites ship them. Pickles in them are
        read without running what they name.
    train_limit, test_limit: at most so many images, each class keeping its share; the same ones each time.

    Raises FileNotFoundError for what is missing, ValueError that names the file for what is damaged or does not fit,
    ImportError where a format needs a package that is not installed.

    >>> data = load("digits", train_limit=500)
    >>> data.image, data.classes
    ((1, 8, 8), 10)
    """
    text = os.fspath(spec)
    head, colon, rest = text.partition(":")
    if text == "digits":
        found = _digits(text)
    elif colon and re.fullmatch(r"[A-Za-z][\w-]+", head) and not Path(text).exists():
        if head not in FORMATS:
            raise ValueError(f"data: format {head!r} is unknown; wanted one of {', '.join(FORMATS)}.{nearest(head, tuple(FORMATS))}")
        found = _read(FORMATS[head], head, rest)
    else:
        found = _recognise(Path(text).expanduser())
    return found if train_limit is None and test_limit is None else found.limited(train_limit, test_limit)


def _read(form: Format, name: str, text: str) -> Dataset:
    if name == "digits":
        raise ValueError(f"data: digits:{text} names a path; wanted digits alone, which comes with scikit-learn.")
    if not text:
        raise ValueError(f"data: {name}: names no path; wanted {name}:PATH, {form.text}.")
    if not form.on_source:
        return form.read(text)
    path = _existing(Path(text).expanduser())
    with open_source(path) or Folder(path.parent) as source:
        return form.read(source)


def _existing(path: Path) -> Path:
    if not path.exists():
        if str(path) in FORMATS:
            raise ValueError(f"data: {path} is a format; wanted its path too, {path}:PATH ({FORMATS[str(path)].text}).")
        raise FileNotFoundError(f"data: {path} does not exist; wanted a folder, an archive, an .npz, or digits.{nearest(str(path), tuple(FORMATS))}")
    return path


def _recognise(path: Path) -> Dataset:
    if _existing(path).suffix == ".npz":
        return readers.npz(path)
    source = open_source(path)
    if source is None and any(path.name in form.files for form in FORMATS.values()):
        source = Folder(path.parent)
    if source is None:
        kinds = ", ".join((".npz", *ARCHIVES))
        raise ValueError(f"data: {path} is of no known kind; wanted a folder, {kinds}, or a file of a known data set. Give the data set's folder.")
    with source:
        name = _format_of(source)
        return FORMATS[name].read(source)


def _format_of(source: Source) -> str:
    found = [name for name, form in FORMATS.items() if any(source.places(file, folder=False) for file in form.files)]
    if not found and source.places("train", folder=True):
        return "images"
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"data: {source.path} holds {' and '.join(found)}; wanted one. Name it: {found[0]}:{source.path}.")
    empty = isinstance(source, Folder) and not any(source.path.iterdir())
    kinds = "; ".join(f"{name}: {form.text}" for name, form in FORMATS.items() if form.on_source)
    raise FileNotFoundError(f"data: {source.path} is {'empty' if empty else 'of no known format'}; wanted one of: {kinds}.")
