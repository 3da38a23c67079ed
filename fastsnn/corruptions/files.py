"""CIFAR-C's files: for each corruption one array of all five severities, one after the other, and labels.npy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..adjoints import nearest

__all__ = ["SEVERITIES", "from_folder", "names", "opened", "read"]

SEVERITIES = (1, 2, 3, 4, 5)
LABELS = "labels.npy"


def read(folder: str | Path, corruption: str, severity: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The images [N, 3, 32, 32] uint8 and labels [N] int64 of one corruption and severity from CIFAR-10-C's or CIFAR-100-C's folder.

    FOLDER/CORRUPTION.npy: [5*N, 32, 32, 3] uint8, severity 1 first; FOLDER/labels.npy: [5*N], or [N] where all severities share them.
    Sizes other than 32 are read too. limit: the first so many images. Only what is asked for is read from the disk. A FileNotFoundError
    or ValueError says what is missing or of another form. Source: Hendrycks and Dietterich, ICLR 2019, https://zenodo.org/records/2535967.

    >>> x, y = read("CIFAR-10-C", "gaussian_noise", severity=3)
    """
    check_severity("read", severity)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"read: limit is {limit!r}; wanted an int >= 1, or None for all images.")
    images, labels = (part[severity - 1] for part in opened(folder, corruption))
    return torch.from_numpy(images[:limit].transpose(0, 3, 1, 2).copy(order="C")), torch.from_numpy(labels[:limit].copy())  # writable, unlike the file


def opened(folder: str | Path, corruption: str) -> tuple[np.ndarray, np.ndarray]:
    """The images [5, N, H, W, C] uint8, on the disk until they are taken, and labels [5, N] int64 of one corruption; errors as of `read`."""
    folder = Path(folder)
    known = names(folder)
    if corruption not in known:
        raise FileNotFoundError(f"corruptions: {folder} has no {corruption}.npy; it has {', '.join(known)}.{nearest(corruption, known)}")
    path = folder / f"{corruption}.npy"
    images, labels = _array(path), _array(folder / LABELS)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0 or len(images) % len(SEVERITIES):
        raise ValueError(f"corruptions: {path} holds {images.dtype} {list(images.shape)}; wanted uint8 [5*N, H, W, 3], the severities one after the other.")
    count = len(images) // len(SEVERITIES)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) not in (count, len(images)):
        raise ValueError(
            f"corruptions: {folder / LABELS} holds {labels.dtype} {list(labels.shape)}; wanted integers [{len(images)}] or [{count}], "
            f"one for each image of {path.name}."
        )
    if labels.min() < 0:
        raise ValueError(f"corruptions: {folder / LABELS} holds {labels.min()}; wanted class numbers from 0.")
    every = np.broadcast_to(labels.astype(np.int64).reshape(-1, count), (len(SEVERITIES), count))
    return images.reshape(len(SEVERITIES), count, *images.shape[1:]), every


def from_folder(
    folder: str | Path, corruptions: Sequence[str] | None = None, severities: Sequence[int] = SEVERITIES, limit: int | None = None
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """(corruption, severity, x, y) for each file of CIFAR-C's folder, or those named, and each severity; see `read`.

    >>> rows = evaluate(model, from_folder("CIFAR-10-C", ["fog", "contrast"], severities=[5]))
    """
    chosen = names(Path(folder)) if corruptions is None else tuple(corruptions)
    return ((name, severity, *read(folder, name, severity, limit)) for name in chosen for severity in severities)


def names(folder: Path) -> tuple[str, ...]:
    """The corruptions that a folder holds, in the order of CIFAR-C, others behind."""
    from .generate import CORRUPTIONS

    if not folder.is_dir():
        raise FileNotFoundError(f"corruptions: {folder} is not a folder; wanted CIFAR-10-C's or CIFAR-100-C's, unpacked: labels.npy and a file for each corruption.")
    found = sorted(path.stem for path in folder.glob("*.npy") if path.name != LABELS and not path.name.startswith("."))
    if not found or not (folder / LABELS).is_file():
        what = f"no {LABELS}" if found else "no .npy file of a corruption"
        raise FileNotFoundError(f"corruptions: {folder} holds {what}; wanted CIFAR-10-C's or CIFAR-100-C's folder, unpacked.")
    return (*(name for name in CORRUPTIONS if name in found), *(name for name in found if name not in CORRUPTIONS))


def check_severity(who: str, severity: object) -> None:
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"{who}: severity is {severity!r}; wanted an int from 1 to 5.")


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"corruptions: {path} does not read as an array of numbers ({error}); wanted a whole .npy file. Fetch it again.") from None
