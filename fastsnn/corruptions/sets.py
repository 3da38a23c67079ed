"""Corrupted images that are taken some at a time: what an evaluation deals to processes and resumes in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..adjoints import nearest
from ..data.dataset import stratified
from .files import SEVERITIES, check_severity, names, opened
from .generate import GENERATED, corrupt, suiting

__all__ = ["GENERATE", "Corrupted", "fingerprint", "sets"]

#: In place of a folder: corrupt the images themselves.
GENERATE = "generated"
#: Images of each file that a fingerprint reads.
PROBED = 16


@dataclass(frozen=True)
class Corrupted:
    """Images under one corruption at one severity.

    labels: [N] int64. take: places [n] int64 -> images [n, C, H, W] uint8. key: a text that other images would change.
    """

    corruption: str
    severity: int
    labels: Tensor
    take: Callable[[Tensor], Tensor]
    key: str


def sets(
    where: str | Path,
    x: Tensor,
    y: Tensor,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    limit: int | None = None,
    classes: int | None = None,
) -> list[Corrupted]:
    """Every corruption of CIFAR-C's folder, or of "generated", at each severity, for `evaluation.evaluate(corruptions=...)`.

    x: [N, C, H, W] uint8, y: [N] int64: the clean test images. "generated" corrupts these, as `generated` does, batch by batch, with the
    random numbers of `seed`; of a folder, images and labels are the files' own, of the same size as x. limit: at most so many of a folder's
    images, each class keeping its share, as `Dataset.limited` keeps it. classes: how many the model tells apart. All that can be wrong with
    files, libraries and severities is told at once, by a FileNotFoundError, ImportError, TypeError or ValueError.

    >>> found = evaluate(model, x, y, make_suite("quick"), corruptions=sets("CIFAR-10-C", x, y, severities=[3, 5]))
    """
    severities = checked(severities)
    if where == GENERATE:
        chosen = suiting(x)
        for name in chosen:
            corrupt(x[:1], name, severities[0], seed)  # what it lacks is told before hours of other work
        return [Corrupted(name, severity, y, _making(x, name, severity, seed), f"{GENERATE} {seed}") for name in chosen for severity in severities]
    folder, found = _folder(where), []
    for name in names(folder):
        images, labels = opened(folder, name)
        if (shape := (images.shape[4], *images.shape[2:4])) != tuple(x.shape[1:]):
            raise ValueError(f"corruptions: {folder / name}.npy holds images of [C, H, W] = {list(shape)}, the test images are {list(x.shape[1:])}; wanted the same.")
        if classes is not None and labels.max() >= classes:
            raise ValueError(f"corruptions: {folder} holds class number {labels.max()}, the model tells {classes} classes apart; wanted corruptions of its own data set.")
        for severity in severities:
            own = torch.from_numpy(labels[severity - 1].copy())
            kept = stratified(own, limit, seed=0)[0] if limit is not None and limit < len(own) else torch.arange(len(own))
            found.append(Corrupted(name, severity, own[kept], _reading(images[severity - 1], kept), _hash(images, labels)))
    return found


def fingerprint(where: str | Path) -> str | None:
    """16 hexadecimal digits that change with a folder's files, their sizes, the labels and some of the images; None for "generated"."""
    if where == GENERATE:
        return None
    folder = _folder(where)
    return _digest("".join(f"{name} {_hash(*opened(folder, name))}" for name in names(folder)).encode())


def _folder(where: str | Path) -> Path:
    if not Path(where).is_dir():
        raise FileNotFoundError(
            f"corruptions: {where} is not a folder; wanted CIFAR-10-C's or CIFAR-100-C's, unpacked, or {GENERATE!r} to corrupt the test images "
            f"themselves.{nearest(where, (GENERATE,))}"
        )
    return Path(where)


def checked(severities: Sequence[int]) -> list[int]:
    """Severities in ascending order, each once; a ValueError where one is none."""
    if not severities:
        raise ValueError("corruptions: severities is empty; wanted one from 1 to 5, or more.")
    for severity in severities:
        check_severity("corruptions", severity)
    return sorted(set(severities))


def _making(x: Tensor, name: str, severity: int, seed: int) -> Callable[[Tensor], Tensor]:
    return lambda places: corrupt(x[places], name, severity, seed, places)


def _reading(images: np.ndarray, kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda places: torch.from_numpy(np.ascontiguousarray(images[kept[places].numpy()].transpose(0, 3, 1, 2)))


def _hash(images: np.ndarray, labels: np.ndarray) -> str:
    spread = np.linspace(0, images.shape[1] - 1, min(PROBED, images.shape[1])).astype(int)
    return _digest(repr(images.shape).encode(), labels.tobytes(), *(images[severity][spread].tobytes() for severity in range(len(images))))


def _digest(*parts: bytes) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
