"""Data that are cut short, hostile, or do not fit: every one is refused, with an error that names the file and what was wanted."""

import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from small_datasets import CONTAINERS, WRITERS, idx, npz, packed, picture, pixels, write, write_cifar10, write_cifar100, write_images, write_mnist, write_svhn, write_tiny
from fastsnn.data import load, pickles

every_format = pytest.mark.parametrize("name", WRITERS)
CUTS = (0.0, 0.2, 0.5, 0.9, -1)


def cut(raw: bytes, where: float) -> bytes:
    return raw[:-1] if where == -1 else raw[: int(where * len(raw))]


def assert_same_or_refused(path: Path, file: Path, want: str) -> bool:
    """Loading gives the right data set, or an error of ours that names the file; True for the error."""
    try:
        assert load(path).fingerprint() == want, f"{file.name} was damaged, and other data came back"
        return False
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith("data: ") and file.name in str(error) and "wanted" in str(error), error
        return True


#: Files that nothing is read from.
UNREAD = ("readme.html", "n01_boxes.txt", "n02_boxes.txt", "n03_boxes.txt", "test_0.JPEG", "Thumbs.db")


@every_format
def test_a_file_cut_short(name, tmp_path):
    WRITERS[name](tmp_path)
    want, refused = load(tmp_path).fingerprint(), 0
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file() and file.suffix != ".txt" and file.name not in UNREAD]
    for file in files[:: max(1, len(files) // 8)]:
        raw = file.read_bytes()
        for where in CUTS:
            file.write_bytes(cut(raw, where))
            refused += assert_same_or_refused(tmp_path, file, want)
        file.write_bytes(raw)
    assert refused >= 3 * min(len(files), 8), "cuts were read as if nothing were missing"


@pytest.mark.parametrize("container", CONTAINERS[1:])
def test_an_archive_cut_short(container, tmp_path):
    folder = tmp_path / "cifar"
    want = write_cifar10(folder)
    path = packed(folder, container)
    want, raw = load(path).fingerprint(), path.read_bytes()
    refused = 0
    for where in CUTS:
        path.write_bytes(cut(raw, where))
        refused += assert_same_or_refused(path, path, want)
    assert refused >= 4 - (container == "tar")  # a tar ends with zeros that hold nothing
    if container != "tar":  # which has no checksum of its contents
        path.write_bytes(raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :])
        assert_same_or_refused(path, path, want)


def test_an_npz_cut_short(tmp_path):
    path = npz(tmp_path / "x.npz")
    want, raw = load(path).fingerprint(), path.read_bytes()
    for where in CUTS:
        path.write_bytes(cut(raw, where))
        assert assert_same_or_refused(path, path, want)
    path.write_bytes(raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])
    assert assert_same_or_refused(path, path, want)


@every_format
def test_a_file_missing(name, tmp_path):
    WRITERS[name](tmp_path)
    files = [file for file in sorted(tmp_path.rglob("*")) if file.is_file() and file.name not in (*UNREAD, "words.txt") and "train/" not in file.as_posix()]
    for file in [] if name == "images" else files:  # any number of images makes a class
        raw = file.read_bytes()
        file.unlink()
        with pytest.raises((FileNotFoundError, ValueError), match=file.name.removesuffix(".gz")):
            load(f"{name}:{tmp_path}")
        file.write_bytes(raw)


def test_words_are_not_needed(tmp_path):
    write_tiny(tmp_path)
    (tmp_path / "tiny-imagenet-200/words.txt").unlink()
    assert load(tmp_path).labels == ("n01", "n02", "n03")


# Hostile pickles.


class Runs:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def hostile(marker: Path) -> dict[str, bytes]:
    evil = Runs(os.mkdir, (str(marker),))
    array = pickle.dumps({"data": np.zeros((2, 2), np.uint8)}, 2)
    return {
        **{f"protocol {p}": pickle.dumps({"data": evil}, p) for p in range(6)},
        "as a key": pickle.dumps({evil: 1} if evil.__hash__ else {}, 4),
        "in a list": pickle.dumps({"labels": [1, evil]}, 4),
        "eval": b"\x80\x02cbuiltins\neval\nX" + struct.pack("<i", 12) + b"__import__()" + b"\x85R.",
        "getattr by a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
        "objects in an array": pickle.dumps({"data": np.array([evil], object)}, 2),
        "an array of objects": pickle.dumps({"data": np.array([None])}, 4),
        "a structured array": pickle.dumps({"data": np.zeros(2, [("a", "u1")])}, 4),
        "numpy.load": b"cnumpy\nload\n(V/etc/passwd\ntR.",
        "another codec": b"c_codecs\nencode\n(Vabc\nVzlib\ntR.",
        **{f"an attribute for {name}": f"c{module}\n{name}\n".encode() + b"N}X\x01\x00\x00\x00aK\x01s\x86b0}." for module, name in pickles.ADMITTED},
        "a type after a comma": array.replace(b"X\x02\x00\x00\x00u1", b"X\x04\x00\x00\x00u1,O"),
        "a persistent id": b"Pabc\n.",
        "an extension": b"\x82\x01.",
        "a list at the top": pickle.dumps([1, 2]),
    }


#: Those that the machine of pickles itself stops at.
STOPPED = ("a persistent id", "an extension", *(name for name in hostile(Path("x")) if name.startswith("an attribute")))


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_a_hostile_pickle_is_refused(name, tmp_path):
    marker = tmp_path / "ran"
    write_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-py/data_batch_3"
    file.write_bytes(hostile(marker)[name])
    before = {admitted: dict(vars(admitted)) for admitted in pickles.ADMITTED.values()}
    with pytest.raises(ValueError, match=f"data: .*data_batch_3 is .*{'no whole pickle|refused' if name in STOPPED else 'refused'}"):
        load(tmp_path)
    assert not marker.exists(), "it ran"
    assert before == {admitted: dict(vars(admitted)) for admitted in pickles.ADMITTED.values()}, "it changed what the next pickle is read with"


def test_the_hostile_pickle_would_have_run(tmp_path):
    pickle.loads(hostile(tmp_path / "ran")["protocol 2"])
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["u1", "<i8", ">i4", "<f8", "?"])
def test_arrays_come_back(protocol, kind):
    arrays = {"c": np.arange(12).reshape(3, 4).astype(kind), "f": np.asfortranarray(np.arange(12).reshape(3, 4)).astype(kind)}
    found = pickles.loads(pickle.dumps(arrays, protocol), "here")
    for key, array in arrays.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)


# Contents that do not fit.


def batch_with(**changes):
    """CIFAR-10 whose second batch has other fields."""

    def make(top: Path) -> Path:
        write_cifar10(top)
        file = top / "cifar-10-batches-py/data_batch_2"
        batch = {"labels": [0, 1, 2, 3], "data": pixels(4, 3072)} | changes
        file.write_bytes(pickle.dumps({key: value for key, value in batch.items() if value is not None}))
        return top

    return make


def npz_with(**changes):
    return lambda top: npz(top / "my.npz", **changes)


def idx_with(name: str, raw: bytes):
    def make(top: Path) -> Path:
        write_mnist(top, "", "raw")
        (top / "raw" / name).write_bytes(raw)
        return top

    return make


def svhn_with(keep: tuple[str, ...] = ("X", "y"), **changes):
    def make(top: Path) -> Path:
        from scipy.io import savemat

        write_svhn(top)
        variables = {"X": pixels(32, 32, 3, 4), "y": np.array([[1], [2], [10], [3]], np.uint8)} | changes
        savemat(top / "test_32x32.mat", {key: variables[key] for key in keep})
        return top

    return make


def tree(writer, file: str, raw: bytes | None):
    def make(top: Path) -> Path:
        writer(top)
        shutil.rmtree(top / file) if raw is None else write(top / file, raw)
        return top

    return make


def empty(top: Path) -> Path:
    return top


def touched(name: str):
    def make(top: Path) -> Path:
        write(top / name, b"hello")
        return top / name

    return make


def two_sets(top: Path) -> Path:
    write_cifar10(top)
    write_cifar100(top)
    return top


def two_mnists(top: Path) -> Path:
    write_mnist(top)
    write_mnist(top, folder="FashionMNIST/raw")
    return top


X, Y = pixels(20, 3, 8, 8), np.resize([0, 1, 2], 20)
PETS, TINY = "pets/train/cat/000.png", "tiny-imagenet-200"
#: What is wrong: what makes it, and what the error must say.
WRONG = {
    "a missing path": (lambda top: top / "none", FileNotFoundError, "none does not exist; wanted"),
    "a missing path of a named format": (lambda top: f"cifar10:{top}/none", FileNotFoundError, "none does not exist"),
    "an empty folder": (empty, FileNotFoundError, "is empty; wanted one of: cifar10"),
    "an empty folder of a named format": (lambda top: f"svhn:{top}", FileNotFoundError, "has no file train_32x32.mat"),
    "an unknown folder": (lambda top: touched("notes.md")(top).parent, FileNotFoundError, "is of no known format; wanted one of"),
    "an unknown file": (touched("notes.md"), ValueError, "notes.md is of no known kind; wanted"),
    "a misspelt format": (lambda top: f"cifar-10:{top}", ValueError, "'cifar-10' is unknown.*Did you mean 'cifar10'?"),
    "a misspelt name": (lambda top: "digit", FileNotFoundError, "digit does not exist.*Did you mean 'digits'?"),
    "a format without its path": (lambda top: "cifar10", ValueError, "cifar10 is a format; wanted its path too, cifar10:PATH"),
    "a format with no path": (lambda top: "mnist:", ValueError, "mnist: names no path; wanted mnist:PATH"),
    "digits with a path": (lambda top: "digits:here", ValueError, "wanted digits alone"),
    "two sets": (two_sets, ValueError, "holds cifar10 and cifar100; wanted one. Name it: cifar10:"),
    "two of one kind": (two_mnists, ValueError, "in several folders: FashionMNIST/raw.*Give the path of its own folder"),
    "a folder in place of an npz": (lambda top: f"npz:{top}", FileNotFoundError, "is not a file; wanted an .npz"),
    "text in place of a zip": (touched("a.zip"), ValueError, "a.zip is damaged or cut short"),
    "text in place of a tar": (touched("a.tar"), ValueError, "a.tar is damaged or cut short"),
    "text in place of a tar.gz": (touched("a.tar.gz"), ValueError, "a.tar.gz is damaged or cut short"),
    "text in place of an npz": (touched("a.npz"), ValueError, "a.npz does not read as an .npz"),
    "npz: a missing key": (npz_with(y_test=None), ValueError, "my.npz has no y_test; wanted x_train, y_train, x_test, y_test. It has x_train"),
    "npz: float images": (npz_with(x_train=X / 255), ValueError, r"my.npz: x_train is float64; wanted uint8.*round\(255"),
    "npz: int images": (npz_with(x_test=X.astype(int)), ValueError, "x_test is int64; wanted uint8"),
    "npz: text": (npz_with(x_train=np.array(["a"])), ValueError, "x_train is an array of <U1; wanted an array of numbers"),
    "npz: objects": (npz_with(x_train=np.array([None])), ValueError, "Python objects, which could run code"),
    "npz: no channel": (npz_with(x_train=X[:, 0]), ValueError, r"x_train has shape \[20, 8, 8\]; wanted \[N, C, H, W\]. Add the channel"),
    "npz: channels last": (npz_with(x_train=X.transpose(0, 2, 3, 1)), ValueError, r"channels last; wanted \[N, C, H, W\]. Use x.transpose"),
    "npz: no image": (npz_with(x_train=X[:0], y_train=Y[:0]), ValueError, "x_train holds no image"),
    "npz: no pixel": (npz_with(x_train=X[..., :0]), ValueError, r"has shape \[20, 3, 8, 0\]"),
    "npz: another test size": (npz_with(x_test=pixels(10, 3, 9, 9)), ValueError, r"test images are \[3, 9, 9\], training images \[3, 8, 8\]"),
    "npz: float labels": (npz_with(y_train=Y * 1.0), ValueError, "y_train is float64; wanted an integer type"),
    "npz: one-hot labels": (npz_with(y_test=np.eye(3, dtype=int)[Y[:10]]), ValueError, r"y_test has shape \[10, 3\]; wanted \[N\].*argmax"),
    "npz: too few labels": (npz_with(y_train=Y[:-1]), ValueError, "x_train holds 20 images, .*y_train 19 labels"),
    "npz: a negative label": (npz_with(y_train=Y - 1), ValueError, "y_train: label -1 at position 0 is out of range; wanted 0 to"),
    "npz: a test label that no training image has": (npz_with(y_train=Y, y_test=np.full(10, 3)), ValueError, "y_test: label 3 at position 0 is out of range; wanted 0 to 2"),
    "npz: a label without a name": (npz_with(y_train=Y, labels=np.array(["a", "b"])), ValueError, "label 2 at position 2 is out of range; wanted 0 to 1"),
    "npz: an absurd label": (npz_with(y_train=Y + 2**40), ValueError, "is out of range; wanted 0 to 65535"),
    "CIFAR: no data": (batch_with(data=None), ValueError, "data_batch_2 has no 'data'; wanted 'data' and 'labels'. It has 'labels'"),
    "CIFAR: no labels": (batch_with(labels=None), ValueError, "data_batch_2 has no 'labels'"),
    "CIFAR: narrow rows": (batch_with(data=pixels(4, 784)), ValueError, r"data_batch_2: data has shape \[4, 784\]; wanted an array \[n, 3072\]"),
    "CIFAR: data of another type": (batch_with(data=[1]), ValueError, "data has the type list"),
    "CIFAR: float data": (batch_with(data=pixels(4, 3072) * 1.0), ValueError, "data_batch_2: data is float64; wanted uint8"),
    "CIFAR: a label out of range": (batch_with(labels=[0, 1, 2, 10]), ValueError, "data_batch_2: labels: label 10 at position 3 is out of range; wanted 0 to 9"),
    "CIFAR: too many labels": (batch_with(labels=[0] * 5), ValueError, "data_batch_2: data holds 4 images, .*labels 5 labels"),
    "CIFAR: labels that are text": (batch_with(labels=list("abcd")), ValueError, "labels holds what is no class number"),
    "CIFAR: a label of many digits": (batch_with(labels=[0, 1, 2, 10**30]), ValueError, "labels holds what is no class number"),
    "CIFAR: no class names": (tree(write_cifar10, "cifar-10-batches-py/batches.meta", pickle.dumps({})), ValueError, "batches.meta has no 'label_names'"),
    "IDX: no IDX file": (idx_with("train-images-idx3-ubyte", b"hello"), ValueError, "train-images-idx3-ubyte begins with 68 65 6c 6c; wanted an IDX file"),
    "IDX: float values": (idx_with("train-images-idx3-ubyte", b"\0\0\x0d\x03" + bytes(12)), ValueError, "of IDX type 0d; wanted 08"),
    "IDX: labels for images": (idx_with("train-images-idx3-ubyte", idx(Y)), ValueError, "has 1 dimensions; wanted 3"),
    "IDX: more than it says": (idx_with("t10k-labels-idx1-ubyte", idx(Y[:10]) + b"\0"), ValueError, "t10k-labels-idx1-ubyte holds 11 bytes of values; wanted 10"),
    "IDX: an absurd shape": (idx_with("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12), ValueError, "holds 0 bytes of values; wanted 7922816"),
    "IDX: a label out of range": (idx_with("t10k-labels-idx1-ubyte", idx(Y[:10] + 8)), ValueError, "t10k-labels-idx1-ubyte: label 10 at position 2 is out of range"),
    "IDX: too few labels": (idx_with("t10k-labels-idx1-ubyte", idx(Y[:9])), ValueError, "holds 10 images, .*t10k-labels-idx1-ubyte 9 labels"),
    "IDX: text in place of gzip": (tree(write_mnist, "MNIST/raw/train-labels-idx1-ubyte.gz", b"hello"), ValueError, "train-labels-idx1-ubyte.gz is damaged"),
    "SVHN: no X": (svhn_with(("y",)), ValueError, "test_32x32.mat has no variable X"),
    "SVHN: no y": (svhn_with(("X",)), ValueError, "test_32x32.mat has no variable y"),
    "SVHN: another layout": (svhn_with(X=pixels(4, 3, 32, 32)), ValueError, r"X has shape \[4, 3, 32, 32\]; wanted \[H, W, 3, N\]"),
    "SVHN: float images": (svhn_with(X=pixels(32, 32, 3, 4) / 255), ValueError, "test_32x32.mat: X is float64; wanted uint8"),
    "SVHN: label 0": (svhn_with(y=np.array([[0], [1], [2], [3]])), ValueError, "label 0 at position 0 is out of range; wanted 1 to 10"),
    "SVHN: label 11": (svhn_with(y=np.array([[1], [11], [2], [3]])), ValueError, "label 11 at position 1 is out of range; wanted 1 to 10"),
    "SVHN: too few labels": (svhn_with(y=np.array([[1], [2]])), ValueError, "X holds 4 images, .*y 2 labels"),
    "SVHN: a table of labels": (svhn_with(y=np.ones((4, 2))), ValueError, r"y is float64 of shape \[4, 2\]; wanted integers \[N, 1\]"),
    "Tiny: a class without images": (tree(write_tiny, f"{TINY}/train/n02", None), FileNotFoundError, "train/n02 holds no image"),
    "Tiny: no training images": (tree(write_tiny, f"{TINY}/train", None), FileNotFoundError, "train/n01 holds no image"),
    "Tiny: wnids.txt cut": (tree(write_tiny, f"{TINY}/wnids.txt", b"n02\nn0"), FileNotFoundError, "train/n0 holds no image"),
    "Tiny: wnids.txt cut at a line": (tree(write_tiny, f"{TINY}/wnids.txt", b"n02\nn01\n"), ValueError, "val_annotations.txt: line 1 is .*n03.*; wanted a file, a tab, and an id"),
    "Tiny: an unknown class": (tree(write_tiny, f"{TINY}/val/val_annotations.txt", b"val_0.JPEG\tn09\n"), ValueError, "line 1 is .*n09.*; wanted a file, a tab, and an id"),
    "Tiny: too few annotations": (tree(write_tiny, f"{TINY}/val/val_annotations.txt", b"val_0.JPEG\tn01\n"), ValueError, "names 1 images, val/images holds 10; wanted the same, such as .*val_1"),
    "Tiny: one image annotated twice": (tree(write_tiny, f"{TINY}/val/val_annotations.txt", b"val_0.JPEG\tn01\n" * 10), ValueError, "names 10 images, val/images holds 10"),
    "Tiny: annotations that are no text": (tree(write_tiny, f"{TINY}/val/val_annotations.txt", b"\xff\xfe"), ValueError, "val_annotations.txt is damaged"),
    "images: no class folders": (tree(write_images, "pets/train", None), FileNotFoundError, "is of no known format"),
    "images: no images": (lambda top: touched("train/a/notes.md")(top).parents[2], FileNotFoundError, "train holds no image in a folder of its class"),
    "images: no test images": (tree(write_images, "pets/test", None), FileNotFoundError, r"holds no test image; wanted test/CLASS/\* or val/CLASS"),
    "images: a class only in test": (tree(write_images, "pets/test/cow/1.png", picture(pixels(3, 9, 9))), ValueError, "cow/1.png is of the class 'cow', which train has not; wanted one of cat, dog"),
    "images: another size": (tree(write_images, "pets/train/dog/019.png", picture(pixels(3, 9, 12))), ValueError, "019.png has 9 x 12 pixels, .*000.png 9 x 9; wanted one size"),
    "images: no image": (tree(write_images, PETS, b"hello"), ValueError, r"000.png does not decode \(it is of no known kind\)"),
    "torchvision: a misspelt name": (lambda top: f"torchvision:CIFAR:{top}", ValueError, "torchvision:CIFAR is unknown; wanted one of .*Did you mean 'CIFAR10'"),
    "torchvision: no folder": (lambda top: "torchvision:CIFAR10", ValueError, "names no folder; wanted torchvision:CIFAR10:FOLDER"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, tmp_path):
    make, kind, words = WRONG[name]
    with pytest.raises(kind, match=words) as caught:
        load(make(tmp_path))
    assert str(caught.value).startswith("data: ")


def test_deep_pixels_are_refused(tmp_path):
    from PIL import Image

    write_images(tmp_path)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / PETS)
    with pytest.raises(ValueError, match="its mode is I;16, which 8 bits do not hold"):
        load(tmp_path)


@pytest.mark.parametrize("package, writer, spec", [
    ("sklearn", None, "digits"), ("scipy", write_svhn, "svhn:{}"), ("PIL", write_images, "images:{}"), ("torchvision", None, "torchvision:CIFAR10:{}"),
])  # fmt: skip
def test_a_package_is_absent(package, writer, spec, tmp_path, monkeypatch):
    if writer:
        writer(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"is not installed; install it with: pip install 'fastsnn\["):
        load(spec.format(tmp_path))
