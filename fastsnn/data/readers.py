"""One function for each format: from its files to a checked `Dataset`."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from ..extras import need
from . import decoding, pickles
from .dataset import MOST_CLASSES, Dataset, check_range, pair
from .sources import DAMAGE, Folder, Source, damaged

DIGITS = tuple(map(str, range(10)))
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR10_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10_FILES = (*CIFAR10_TRAIN, "test_batch", "batches.meta")
TORCHVISION = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "SVHN")


def _spellings(name: str) -> tuple[str, ...]:
    """MNIST's files are found as train-images-idx3-ubyte and train-images.idx3-ubyte, plain and compressed."""
    plain = (name, name.replace("-idx", ".idx"))
    return (*plain, *(f"{spelling}.gz" for spelling in plain))


IDX = {
    "x_train": _spellings("train-images-idx3-ubyte"),
    "y_train": _spellings("train-labels-idx1-ubyte"),
    "x_test": _spellings("t10k-images-idx3-ubyte"),
    "y_test": _spellings("t10k-labels-idx1-ubyte"),
}
IDX_FILES = tuple(spelling for spellings in IDX.values() for spelling in spellings)


def npz(path: Path) -> Dataset:
    """x_train, y_train, x_test, y_test as in `Dataset`; labels [classes] text and name, where they are there."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} is not a file; wanted an .npz.")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one bare array")
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise KeyError(", ".join(missing))
            found = {key: file[key] for key in (*keys, "labels", "name") if key in file.files}
    except KeyError as error:
        raise ValueError(f"data: {path} has no {error.args[0]}; wanted {', '.join(keys)}. It has {', '.join(file.files) or 'nothing'}.") from None
    except ValueError as error:
        why = "an array of Python objects, which could run code" if "allow_pickle" in str(error) else str(error)
        raise ValueError(f"data: {path} does not read as an .npz of numbers ({why}); wanted {', '.join(keys)} as numpy.savez writes them.") from None
    except (*DAMAGE, OSError) as error:
        raise damaged(path, error) from error
    if "labels" in found:
        labels = tuple(map(str, np.atleast_1d(found["labels"]).tolist()))
    else:
        trained = pair(found["x_train"], found["y_train"], MOST_CLASSES, f"{path}: x_train", f"{path}: y_train")[1]
        labels = tuple(map(str, range(int(trained.max()) + 1)))
    parts = {}
    for part in ("train", "test"):
        parts[f"x_{part}"], parts[f"y_{part}"] = pair(found[f"x_{part}"], found[f"y_{part}"], len(labels), f"{path}: x_{part}", f"{path}: y_{part}")
    return Dataset(str(found["name"]) if "name" in found else path.stem, **parts, labels=labels)


def _batch(source: Source, name: str, label_key: str, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One pickled batch of CIFAR: data [n, 3072] uint8, a row holding red, green and blue planes of 32 x 32."""
    place = source.need(name)
    where = source.where(place)
    batch = pickles.loads(source.read(place), where)
    for key in ("data", label_key):
        if key not in batch:
            raise ValueError(f"data: {where} has no {key!r}; wanted 'data' and {label_key!r}. It has {', '.join(map(repr, batch)) or 'nothing'}.")
    x, y = batch["data"], batch[label_key]
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != 3072:
        what = f"shape {list(x.shape)}" if isinstance(x, np.ndarray) else f"the type {type(x).__name__}"
        raise ValueError(f"data: {where}: data has {what}; wanted an array [n, 3072].")
    if isinstance(y, list) and not all(type(label) is int and abs(label) < 2**31 for label in y):
        raise ValueError(f"data: {where}: {label_key} holds what is no class number; wanted a list of class numbers.")
    y = np.asarray(y, np.int64) if isinstance(y, list) else y
    return pair(x.reshape(-1, 3, 32, 32), y, classes, f"{where}: data", f"{where}: {label_key}")


def _cifar(source: Source, name: str, train: tuple[str, ...], test: str, meta: str, names_key: str, label_key: str) -> Dataset:
    place = source.need(meta)
    labels = pickles.loads(source.read(place), source.where(place)).get(names_key)
    if not (isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels)):
        raise ValueError(f"data: {source.where(place)} has no {names_key!r}; wanted the list of the classes' names.")
    batches = [_batch(source, file, label_key, len(labels)) for file in train]
    x, y = (torch.cat(parts) for parts in zip(*batches))
    return Dataset(name, x, y, *_batch(source, test, label_key, len(labels)), tuple(labels))


def cifar10(source: Source) -> Dataset:
    """CIFAR-10, the version for Python: five training batches, a test batch, batches.meta."""
    return _cifar(source, "cifar10", CIFAR10_TRAIN, "test_batch", "batches.meta", "label_names", "labels")


def cifar100(source: Source) -> Dataset:
    """CIFAR-100, the version for Python, with its 100 fine labels: train, test, meta."""
    return _cifar(source, "cifar100", ("train",), "test", "meta", "fine_label_names", "fine_labels")


def _idx(source: Source, spellings: tuple[str, ...], dimensions: int) -> tuple[np.ndarray, str]:
    """One IDX file: two zero bytes, the type (8: unsigned byte), the number of dimensions, each as big-endian int32, the values."""
    place = source.need(*spellings)
    where, raw = source.where(place), source.read(place)
    if place.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise damaged(where, error) from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise ValueError(f"data: {where} begins with {raw[:4].hex(' ') or 'nothing'}; wanted an IDX file, 00 00 08 {dimensions:02x}.")
    if raw[2] != 8:
        raise ValueError(f"data: {where} holds values of IDX type {raw[2]:02x}; wanted 08, unsigned bytes.")
    if raw[3] != dimensions:
        raise ValueError(f"data: {where} has {raw[3]} dimensions; wanted {dimensions}.")
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], ">u4")) if len(raw) >= start else ()
    count = int(np.prod(shape, dtype=object)) if shape else None
    if len(raw) - start != count:
        wanted = "a whole header" if count is None else f"{count} for the shape {list(shape)}"
        raise ValueError(f"data: {where} holds {max(0, len(raw) - start)} bytes of values; wanted {wanted}. It is cut short or damaged: fetch it again.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape), where


def _mnist(source: Source, fashion: bool | None) -> Dataset:
    parts = {}
    for part in ("train", "test"):
        (x, x_at), (y, y_at) = _idx(source, IDX[f"x_{part}"], 3), _idx(source, IDX[f"y_{part}"], 1)
        parts[f"x_{part}"], parts[f"y_{part}"] = pair(x[:, None], y, 10, x_at, y_at)
        if fashion is None:
            fashion = "fashion" in x_at.lower()
    return Dataset("fashion-mnist" if fashion else "mnist", **parts, labels=CLOTHES if fashion else DIGITS)


def mnist(source: Source) -> Dataset:
    """MNIST, or Fashion-MNIST where the path says so: the two ship files of the same names."""
    return _mnist(source, None)


def fashion_mnist(source: Source) -> Dataset:
    """Fashion-MNIST, whatever its folder is called."""
    return _mnist(source, True)


def svhn(source: Source) -> Dataset:
    """SVHN's cropped digits: X [H, W, C, N] uint8, y [N, 1] with 10 for the digit 0."""
    scipy_io = need("scipy.io", "train")
    parts = {}
    for part in ("train", "test"):
        place = source.need(f"{part}_32x32.mat")
        where = source.where(place)
        raw = source.read(place)
        try:
            found = scipy_io.loadmat(io.BytesIO(raw), variable_names=("X", "y"))
        except Exception as error:  # scipy's reader meets damage in many ways
            raise damaged(where, error) from error
        for key in ("X", "y"):
            if key not in found:
                raise ValueError(f"data: {where} has no variable {key}; wanted X and y.")
        x, y = found["X"], found["y"]
        if x.ndim != 4 or x.shape[2] != 3:
            raise ValueError(f"data: {where}: X has shape {list(x.shape)}; wanted [H, W, 3, N].")
        if y.dtype.kind not in "iu" or y.size != max(y.shape, default=0):
            raise ValueError(f"data: {where}: y is {y.dtype} of shape {list(y.shape)}; wanted integers [N, 1].")
        numbers = torch.from_numpy(y.reshape(-1).astype(np.int64))
        check_range(numbers, 1, 10, f"{where}: y")
        parts[f"x_{part}"], parts[f"y_{part}"] = pair(x.transpose(3, 2, 0, 1), numbers % 10, 10, f"{where}: X", f"{where}: y")
    return Dataset("svhn", **parts, labels=DIGITS)


def _lines(source: Source, name: str) -> list[str]:
    try:
        return [line for line in source.read(name).decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise damaged(source.where(name), error) from error


def tiny(source: Source) -> Dataset:
    """Tiny-ImageNet; val, whose labels are public, is the test set. Classes in the order of their WordNet ids."""
    top = source.need("wnids.txt").removesuffix("wnids.txt")
    classes = {wnid: number for number, wnid in enumerate(sorted(line.strip() for line in _lines(source, f"{top}wnids.txt")))}
    train, y_train = [], []
    for wnid, number in classes.items():
        found = [name for name in source.below(f"{top}train/{wnid}") if decoding.is_image(name)]
        if not found:
            raise FileNotFoundError(f"data: {source.where(f'{top}train/{wnid}')} holds no image; wanted some of each class in wnids.txt.")
        train += found
        y_train += [number] * len(found)
    table = f"{top}val/val_annotations.txt"
    test, y_test = [], []
    for position, line in enumerate(_lines(source, table), 1):
        words = line.split("\t")
        if len(words) < 2 or words[1] not in classes:
            raise ValueError(f"data: {source.where(table)}: line {position} is {line[:60]!r}; wanted a file, a tab, and an id of wnids.txt.")
        test.append(f"{top}val/images/{words[0]}")
        y_test.append(classes[words[1]])
    there = {name for name in source.below(f"{top}val/images") if decoding.is_image(name)}
    if there != set(test) or len(there) != len(test) or not test:
        stray = sorted(there ^ set(test))
        such = f", such as {stray[0]}" if stray else ""
        raise ValueError(f"data: {source.where(table)} names {len(test)} images, val/images holds {len(there)}; wanted the same{such}.")
    table = f"{top}words.txt"
    words = dict(line.split("\t", 1) for line in _lines(source, table) if "\t" in line) if source.find("words.txt") == table else {}
    labels = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in classes)
    return _decoded("tiny", source, train, y_train, test, y_test, labels, colour=True)


def _decoded(name: str, source: Source, train: list[str], y_train: list[int], test: list[str], y_test: list[int], labels: tuple[str, ...], colour: bool) -> Dataset:
    x = torch.from_numpy(decoding.decode(source, train + test, colour))
    return Dataset(name, x[: len(train)], torch.tensor(y_train), x[len(train) :], torch.tensor(y_test), labels)


def images(source: Source) -> Dataset:
    """Image files of one size in train/CLASS/ and test/CLASS/, or val/CLASS/ where there is no test; classes in alphabetical order."""
    train = source.need("train", folder=True)
    top = train.removesuffix("train")
    parts = {}
    for part in ("train", "test", "val"):
        prefix = f"{top}{part}/"
        names = [name for name in source.below(prefix[:-1]) if decoding.is_image(name) and "/" in name[len(prefix) :]]
        parts[part] = [(name, name[len(prefix) :].split("/")[0]) for name in names]
    if not parts["train"]:
        raise FileNotFoundError(f"data: {source.where(train)} holds no image in a folder of its class; wanted train/CLASS/*.png, .jpg or the like.")
    held_out = "test" if parts["test"] else "val"
    if not parts[held_out]:
        raise FileNotFoundError(f"data: {source.where(top or '.')} holds no test image; wanted test/CLASS/* or val/CLASS/*.")
    labels = tuple(sorted({label for _, label in parts["train"]}))
    for name, label in parts[held_out]:
        if label not in labels:
            known = ", ".join((*labels[:10], *["..."] * (len(labels) > 10)))
            raise ValueError(f"data: {source.where(name)} is of the class {label!r}, which train has not; wanted one of {known}.")
    number = {label: position for position, label in enumerate(labels)}
    title = PurePosixPath(top).name or (source.path.name if isinstance(source, Folder) else source.path.name.split(".")[0])
    (train_names, train_labels), (test_names, test_labels) = (zip(*parts[part]) for part in ("train", held_out))
    return _decoded(
        title or "images", source, list(train_names), [number[label] for label in train_labels],
        list(test_names), [number[label] for label in test_labels], labels, colour=False,
    )


def torchvision(name: str, root: str) -> Dataset:
    """One of torchvision's data sets; it downloads what is not in `root`, and checks its sums."""
    datasets = need("torchvision.datasets", "torchvision")
    parts, labels = {}, ()
    for part in ("train", "test"):
        which = {"split": part} if name == "SVHN" else {"train": part == "train"}
        found = getattr(datasets, name)(root, download=True, **which)
        x = torch.as_tensor(found.data)
        if name.startswith("CIFAR"):
            x = x.permute(0, 3, 1, 2)
        parts[f"x_{part}"] = x[:, None] if x.dim() == 3 else x
        parts[f"y_{part}"] = torch.as_tensor(found.labels if name == "SVHN" else found.targets)
        labels = tuple(getattr(found, "classes", DIGITS))
    return Dataset({"FashionMNIST": "fashion-mnist"}.get(name, name.lower()), **parts, labels=labels)


