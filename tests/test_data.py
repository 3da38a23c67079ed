"""Data sets: every format as its official site ships it, in folders and archives, and their parts."""

import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from small_datasets import CONTAINERS, WRITERS, packed, picture, some, write, write_cifar10, write_images, write_mnist, write_svhn
from fastsnn.data import FORMATS, Dataset, load, split

every_format = pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_written_here():
    assert set(WRITERS) | {"digits", "npz", "torchvision"} == set(FORMATS)


def assert_holds(found: Dataset, want: dict) -> None:
    for key in ("x_train", "y_train", "x_test", "y_test"):
        values = getattr(found, key)
        assert values.dtype == (torch.uint8 if key[0] == "x" else torch.int64)
        assert values.is_contiguous()
        np.testing.assert_array_equal(values.numpy(), want[key], err_msg=key)
    assert found.image == want["x_train"].shape[1:]
    assert found.classes == len(found.labels)
    assert found.labels == want.get("labels", found.labels)


@every_format
@pytest.mark.parametrize("container", CONTAINERS)
def test_format(name, container, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    want = WRITERS[name](folder)
    path = packed(folder, container)
    found = load(path)
    assert found.name == ("pets" if name == "images" else name)
    assert_holds(found, want)
    forced = load(f"{name}:{path}")
    assert (forced.name, forced.fingerprint()) == (found.name, found.fingerprint())


VARIANTS = {
    "MNIST, not compressed": (lambda top: write_mnist(top, ""), "MNIST/raw"),
    "MNIST, a file named": (write_mnist, "MNIST/raw/t10k-labels-idx1-ubyte.gz"),
    "SVHN, not compressed": (lambda top: write_svhn(top, False), "."),
    "SVHN, a file named": (write_svhn, "train_32x32.mat"),
    "grey images, val in place of test": (lambda top: write_images(top, "val", 1), "pets"),
    "CIFAR-10, a batch named": (write_cifar10, "cifar-10-batches-py/data_batch_1"),
    **{f"CIFAR-10, protocol {p}": (lambda top, p=p: write_cifar10(top, lambda value: pickle.dumps(value, p)), "cifar-10-batches-py") for p in range(6)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path):
    writer, path = VARIANTS[name]
    want = writer(tmp_path)
    assert_holds(load(tmp_path / path), want)


def test_the_spelling_of_mnist_with_dots_and_fashion_by_name(tmp_path):
    want = write_mnist(tmp_path, "", "raw")
    for file in (tmp_path / "raw").iterdir():
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    found = load(f"fashion-mnist:{tmp_path}")
    assert_holds(found, want)
    assert found.name == "fashion-mnist" and found.labels[9] == "Ankle boot"
    assert load(tmp_path).name == "mnist"


def test_photographs(tmp_path):
    """JPEG is read as Pillow reads it, in colour where one image is."""
    smooth = np.linspace(0, 255, 192).reshape(3, 8, 8).astype(np.uint8)
    for part in ("train", "test"):
        write(tmp_path / part / "a/1.jpg", picture(smooth, "JPEG"))
        write(tmp_path / part / "b/1.jpeg", picture(smooth[:1], "JPEG"))
    found = load(tmp_path)
    assert found.image == (3, 8, 8)
    assert (found.x_train[0].int() - torch.from_numpy(smooth).int()).abs().max() < 100
    assert (found.x_train[1, 0] == found.x_train[1, 2]).all() and (found.x_train[1, 0].int() - torch.from_numpy(smooth[0]).int()).abs().max() < 16


def test_digits():
    found = load("digits")
    assert (found.image, found.classes, len(found.y_train), len(found.y_test)) == ((1, 8, 8), 10, 1438, 359)
    assert found.x_train.max() == 255 and found.x_train.min() == 0
    assert found.y_test.bincount().min() >= 34
    assert found.fingerprint() == load("digits").fingerprint() == "70a626241b25f309", "the split has changed"
    from sklearn.datasets import load_digits

    both = torch.cat([found.x_train, found.x_test]).flatten(1).double() * 16 / 255
    assert sorted(both.round().tolist()) == sorted(load_digits().data.tolist())


def test_npz(tmp_path):
    data = some(3, 3, 8)
    np.savez(tmp_path / "my.set.npz", **(data | {"y_train": data["y_train"].astype(np.uint8)}))
    found = load(str(tmp_path / "my.set.npz"))
    assert_holds(found, data | {"labels": ("0", "1", "2")})
    assert found.name == "my.set"
    assert_holds(load(f"npz:{tmp_path / 'my.set.npz'}"), data)
    np.savez(tmp_path / "named.npz", **data, labels=["x", "y", "z", "never"])
    assert load(tmp_path / "named.npz").labels == ("x", "y", "z", "never")


def test_saved_and_loaded(tmp_path, monkeypatch):
    digits = load("digits", train_limit=30, test_limit=20)
    again = load(digits.save(tmp_path / "d.npz"))
    assert (again.name, again.fingerprint()) == ("digits", digits.fingerprint())
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        load("digits").save(tmp_path / "d.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["d.npz"]
    assert load(tmp_path / "d.npz").fingerprint() == digits.fingerprint()
    with pytest.raises(ValueError, match="not named .*npz"):
        digits.save(tmp_path / "d.npy")


def test_fingerprint_follows_the_contents_alone():
    base = {key: torch.from_numpy(value) for key, value in some(3, 1, 8).items()}
    print_of = lambda **changes: Dataset(**({"name": "a", "labels": ("x", "y", "z")} | base | changes)).fingerprint()
    seen = {print_of(), print_of(labels=("x", "y", "w")), print_of(x_test=base["x_test"] ^ 1), print_of(y_train=(base["y_train"] + 1) % 3)}
    seen.add(print_of(x_train=base["x_train"].transpose(2, 3)))
    assert len(seen) == 5
    assert print_of(name="b") == print_of() and len(print_of()) == 16


@pytest.mark.parametrize("name, image", [("CIFAR10", (3, 32, 32)), ("MNIST", (1, 28, 28)), ("FashionMNIST", (1, 28, 28)), ("SVHN", (3, 32, 32))])
def test_torchvision(name, image, tmp_path, monkeypatch):
    """A stand-in with torchvision's attributes: numpy [N, H, W, C] and a list (CIFAR), tensors [N, H, W] (MNIST), numpy [N, C, H, W] and `labels` (SVHN)."""
    data = some(10, *image[:2])

    class Set:
        def __init__(self, root, download, train=None, split=None):
            assert root == str(tmp_path) and download and (train is None) != (split is None)
            part = split or ("train" if train else "test")
            x, y = data[f"x_{part}"], data[f"y_{part}"]
            if name == "SVHN":
                self.data, self.labels = x, y
            elif name == "CIFAR10":
                self.data, self.targets, self.classes = x.transpose(0, 2, 3, 1), y.tolist(), list("abcdefghij")
            else:
                self.data, self.targets, self.classes = torch.from_numpy(x[:, 0]), torch.from_numpy(y), list("abcdefghij")

    module = types.ModuleType("torchvision")
    module.datasets = types.ModuleType("torchvision.datasets")
    setattr(module.datasets, name, Set)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module.datasets)
    found = load(f"torchvision:{name}:{tmp_path}")
    assert_holds(found, data)
    assert found.name == {"FashionMNIST": "fashion-mnist"}.get(name, name.lower())


# Parts of a data set.


def test_limits():
    whole, part = load("digits"), load("digits", train_limit=100, test_limit=37)
    assert (len(part.y_train), len(part.y_test)) == (100, 37)
    assert part.fingerprint() == load("digits", 100, 37).fingerprint() != whole.fingerprint()
    share = whole.y_train.bincount() / len(whole.y_train) * 100
    assert ((part.y_train.bincount() - share).abs() < 1).all()
    assert load("digits", train_limit=10**6).fingerprint() == whole.fingerprint()
    for limit in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"train_limit is {limit}; wanted an int >= 1"):
            load("digits", train_limit=limit)


@pytest.mark.parametrize("validation, count", [(0.1, 60), (0, 0), (0.0, 0), (0.25, 150), (7, 7)])
def test_split(validation, count):
    y = torch.from_numpy(np.repeat([0, 1, 2, 4], [300, 200, 99, 1]))
    train, held_out = split(torch.zeros(600, 1), y, validation, seed=3)
    assert len(held_out) == count
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(600))
    assert torch.equal(train, train.sort().values) and torch.equal(held_out, held_out.sort().values)
    assert ((y[held_out].bincount(minlength=5) - y.bincount() * count / 600).abs() < 1).all()
    again, other = split(torch.zeros(600, 1), y, validation, seed=3)[1], split(torch.zeros(600, 1), y, validation, seed=4)[1]
    assert torch.equal(again, held_out)
    assert not count or not torch.equal(other, held_out)


@pytest.mark.parametrize("validation", [1.0, -0.1, 600, -1, 1.5])
def test_split_refuses(validation):
    with pytest.raises(ValueError, match="wanted a share in"):
        split(torch.zeros(600), torch.zeros(600, dtype=torch.int64), validation)
    with pytest.raises(ValueError, match="x_train holds 5 images, y_train 600 labels"):
        split(torch.zeros(5), torch.zeros(600, dtype=torch.int64))
