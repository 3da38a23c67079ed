"""Small data sets, written as their official sites ship them."""

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np

RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


class Python2:
    """Writes the dictionaries of CIFAR as Python 2 pickled them, by protocol 2: text and bytes are one type."""

    def __init__(self, value: object) -> None:
        self.out = [b"\x80\x02"]
        self.put(value)
        self.bytes = b"".join(self.out) + b"."

    def put(self, value: object) -> None:
        match value:
            case None:
                self.out += [b"N"]
            case bool():
                self.out += [b"\x88" if value else b"\x89"]
            case int():
                self.out += [b"J" + struct.pack("<i", value)]
            case str() | bytes():
                raw = value if isinstance(value, bytes) else value.encode()
                self.out += [b"T" + struct.pack("<i", len(raw)) + raw]
            case tuple():
                self.out += [b"("]
                [self.put(item) for item in value]
                self.out += [b"t"]
            case list():
                self.out += [b"]("]
                [self.put(item) for item in value]
                self.out += [b"e"]
            case dict():
                self.out += [b"}("]
                [self.put(item) for pair in value.items() for item in pair]
                self.out += [b"u"]
            case np.ndarray():
                self.out += [b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"]
                self.put((0,))
                self.put("b")
                self.out += [b"\x87R("]  # _reconstruct(ndarray, (0,), "b"), then its state
                [self.put(item) for item in (1, value.shape)]
                self.out += [b"cnumpy\ndtype\n"]
                self.put(("u1", 0, 1))
                self.out += [b"R"]
                self.put((3, "|", None, None, None, -1, -1, 0))
                self.out += [b"b"]
                [self.put(item) for item in (False, value.tobytes())]
                self.out += [b"tb"]


def python2(value: object) -> bytes:
    return Python2(value).bytes


def write(path: Path, contents: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)


def some(classes: int, channels: int, size: int, train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    """Two small sets of images, a label of the last class in each."""
    found = {}
    for part, count in (("train", train), ("test", test)):
        y = RANDOM.integers(0, classes, count)
        y[0] = classes - 1
        found |= {f"x_{part}": pixels(count, channels, size, size), f"y_{part}": y}
    return found


def write_cifar10(top: Path, dumps=python2) -> dict:
    data = some(10, 3, 32)
    folder = top / "cifar-10-batches-py"
    write(folder / "batches.meta", dumps({"num_cases_per_batch": 4, "label_names": list("abcdefghij"), "num_vis": 3072}))
    for number in range(5):
        rows = slice(4 * number, 4 * number + 4)
        batch = {"batch_label": "training batch", "labels": data["y_train"][rows].tolist(), "data": data["x_train"][rows].reshape(4, -1)}
        write(folder / f"data_batch_{number + 1}", dumps(batch))
    write(folder / "test_batch", dumps({"labels": data["y_test"].tolist(), "data": data["x_test"].reshape(10, -1), "filenames": ["a.png"]}))
    write(folder / "readme.html", b"")
    return data | {"labels": tuple("abcdefghij")}


def write_cifar100(top: Path) -> dict:
    data, labels = some(100, 3, 32), [f"class{number:02}" for number in range(100)]
    folder = top / "cifar-100-python"
    write(folder / "meta", python2({"fine_label_names": labels, "coarse_label_names": ["all"]}))
    for part in ("train", "test"):
        y = data[f"y_{part}"].tolist()
        write(folder / part, python2({"fine_labels": y, "coarse_labels": [0] * len(y), "data": data[f"x_{part}"].reshape(len(y), -1)}))
    return data | {"labels": tuple(labels)}


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape) + values.astype(np.uint8).tobytes()


def write_mnist(top: Path, suffix: str = ".gz", folder: str = "MNIST/raw") -> dict:
    data = some(10, 1, 28)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for name, values in ((f"{prefix}-images-idx3-ubyte", data[f"x_{part}"][:, 0]), (f"{prefix}-labels-idx1-ubyte", data[f"y_{part}"])):
            raw = idx(values)
            write(top / folder / (name + suffix), gzip.compress(raw) if suffix else raw)
    return data


def write_svhn(top: Path, compressed: bool = True) -> dict:
    from scipy.io import savemat

    data = some(10, 3, 32)
    data["y_test"][1] = 0
    for part in ("train", "test"):
        y = data[f"y_{part}"].astype(np.uint8)[:, None]
        savemat(top / f"{part}_32x32.mat", {"X": data[f"x_{part}"].transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)}, do_compression=compressed)
    return data


def picture(values: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)).save(file, kind)
    return file.getvalue()


def write_tiny(top: Path) -> dict:
    data, wnids = some(3, 3, 64), ["n02", "n01", "n03"]  # wnids.txt is not sorted
    top = top / "tiny-imagenet-200"
    write(top / "wnids.txt", "\n".join(wnids).encode())
    write(top / "words.txt", b"n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn03\tnewt, eft\n")
    order = np.argsort(data["y_train"], kind="stable")
    data["y_train"] = np.sort(np.resize([0, 1, 2], 20))
    data["x_train"] = data["x_train"][order]
    data["x_train"][0] = data["x_train"][0][:1]  # some of its images are grey
    for number, (x, y) in enumerate(zip(data["x_train"], data["y_train"])):
        write(top / f"train/n0{y + 1}/images/n0{y + 1}_{number:03}.JPEG", picture(x[:1] if number == 0 else x))
        write(top / f"train/n0{y + 1}/n0{y + 1}_boxes.txt", b"n01_0.JPEG\t0\t0\t9\t9\n")
    lines = []
    for number, (x, y) in enumerate(zip(data["x_test"], data["y_test"])):
        write(top / f"val/images/val_{number}.JPEG", picture(x))
        lines.append(f"val_{number}.JPEG\tn0{y + 1}\t0\t0\t62\t62\n")
    write(top / "val/val_annotations.txt", "".join(lines).encode())
    write(top / "test/images/test_0.JPEG", picture(pixels(3, 64, 64)))
    return data | {"labels": ("goldfish", "bullfrog", "newt")}


def write_images(top: Path, held_out: str = "test", channels: int = 3) -> dict:
    data = some(2, channels, 9)
    for part in ("train", "test"):
        y = data[f"y_{part}"] = np.sort(np.resize([0, 1], len(data[f"y_{part}"])))
        for number, (x, label) in enumerate(zip(data[f"x_{part}"], y)):
            folder = {"train": "train", "test": held_out}[part]
            write(top / "pets" / folder / ("cat", "dog")[label] / f"{number:03}.png", picture(x))
    write(top / "pets/train/cat/Thumbs.db", b"no image")
    return data | {"labels": ("cat", "dog")}


#: Every format that lies in a folder or an archive: what writes it, and the name of what is loaded.
WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "mnist": write_mnist,
    "fashion-mnist": lambda top: write_mnist(top, folder="FashionMNIST/raw"),
    "svhn": write_svhn,
    "tiny": write_tiny,
    "images": write_images,
}

CONTAINERS = ("folder", "zip", "tar", "tar.gz", "tgz")


def npz(path: Path, **changes) -> Path:
    arrays = {**some(3, 3, 8), **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def packed(folder: Path, container: str) -> Path:
    """The folder itself, or an archive of what is in it."""
    if container == "folder":
        return folder
    path = folder.parent / f"{folder.name}.{container}"
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if container == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            [archive.write(file, file.relative_to(folder)) for file in files]
    else:
        with tarfile.open(path, "w" if container == "tar" else "w:gz") as archive:
            archive.add(folder, ".")
    return path
