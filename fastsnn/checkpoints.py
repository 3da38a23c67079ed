"""Files of a run: each is either the old one or the new one, whenever the machine stops.

A checkpoint is one safetensors file: tensors by name, and everything else as JSON in the file's metadata.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from .extras import need
from .recipes import canonical

__all__ = ["BEST", "LAST", "LOG", "RUN", "append_line", "fingerprint", "fingerprint_of", "load", "load_run", "read_lines", "read_run", "save", "write_json"]

RUN, LOG, LAST, BEST = "run.json", "log.jsonl", "last.safetensors", "best.safetensors"
FORMAT = 1
#: What the names of the weights begin with in a checkpoint.
MODEL = "model."


def _open(path: Path) -> BinaryIO:
    return open(path, "wb", buffering=0)


def _explained(error: OSError, path: Path) -> OSError:
    """The error, with what it means for the file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kept = f"{path.name} of before is untouched" if path.exists() else "nothing half is left"
        return OSError(error.errno, f"no space left on the disk while writing {path}; {kept}. Free some space; a run goes on with --resume")
    if error.errno == errno.ENOENT:
        return OSError(error.errno, f"{path} cannot be written: its folder is gone")
    return OSError(error.errno, f"{path} cannot be written: {error.strerror}")


def write(path: str | Path, content: bytes) -> None:
    """Write a file so that it is never seen half: beside it, flushed to the disk, then renamed."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        with _open(part) as file:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        os.replace(part, path)
        _flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise _explained(error, path) from None


def _flush_folder(folder: Path) -> None:
    """The rename itself reaches the disk; not every system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | Path, content: dict) -> None:
    write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def append_line(path: str | Path, record: dict) -> None:
    """One JSON line at the end of a file."""
    path = Path(path)
    try:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(record) + "\n").encode())
    except OSError as error:
        raise _explained(error, path) from None


def read_lines(path: str | Path) -> list[dict]:
    """The records of a JSON-lines file; a line cut off by a crash is left out."""
    records = []
    with suppress(FileNotFoundError):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def save(path: str | Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write a checkpoint: tensors by name, on any device, and `state`, anything that JSON holds.

    >>> save("last.safetensors", {"model.weight": torch.ones(2)}, {"step": 7})
    """
    safetensors = need("safetensors.torch", "train")
    plain = {name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write(path, safetensors.save(plain, {"state": json.dumps(state, allow_nan=False), "format": str(FORMAT)}))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) and the state of a checkpoint."""
    path = Path(path)
    safetensors = need("safetensors", "train")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}). It was cut off or changed after it was written; use another checkpoint.") from None
    if about.get("format") != str(FORMAT):
        raise ValueError(f"{path}: not a checkpoint of this fastsnn: its format is {about.get('format')!r}; wanted {str(FORMAT)!r}.")
    return tensors, json.loads(about["state"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fingerprint(path: str | Path) -> str:
    """16 hexadecimal digits that change with any bit of a checkpoint's weights, and with nothing else in its file.

    The optimiser, the state and the order in the file do not count. Errors as in `load`.
    """
    return _fingerprint(part(load(path)[0], MODEL))


def fingerprint_of(model: nn.Module) -> str:
    """`fingerprint` of a network in memory: the same digits as those of a checkpoint with its weights."""
    return _fingerprint({name: value.detach().cpu() for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_run(folder: str | Path) -> dict:
    """What `run.json` says: config, model, data, versions, and whether the run is finished."""
    path = Path(folder) / RUN
    if not path.is_file():
        what = "holds no run: run.json is missing" if Path(folder).is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{folder}: {what}. Wanted a folder that `fastsnn train --out` has made.")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Restore it from a copy, or train again.") from None
    if run.get("format") != FORMAT:
        raise ValueError(f"{path}: the format of the run is {run.get('format')!r}; this fastsnn reads {FORMAT}.")
    if isinstance(run.get("config"), dict):
        run["config"] = canonical(run["config"])
    return run


def load_run(folder: str | Path, which: str = "best", device: str | torch.device = "cpu") -> tuple[nn.Module, dict]:
    """The trained network of a run, in eval mode, and what `run.json` says, with `weights` (file, fingerprint, state) added.

    which: `best` by validation accuracy, or `last`. A run without a validation has only the last.

    >>> model, run = load_run("runs/digits")
    """
    from . import models
    from .adjoints import nearest
    from .defenses import make_defense

    if which not in ("best", "last"):
        raise ValueError(f"load_run: which is {which!r}; wanted best or last.{nearest(which, ('best', 'last'))}")
    folder, run = Path(folder), read_run(folder)
    path = folder / (BEST if which == "best" and run["config"]["validation"] > 0 else LAST)
    if not path.is_file():
        cure = "it has not reached its first validation; which='last' takes the last checkpoint" if which == "best" and (folder / LAST).is_file() else "it has written no checkpoint yet"
        raise FileNotFoundError(f"{folder}: no {path.name}: {cure}.")
    tensors, state = load(path)
    model = models.build(**run["model"])
    make_defense(run["config"]["defense"], run["defense_options"]).prepare(model)
    if run["config"]["precision"] == "float64":
        model.double()
    weights = part(tensors, MODEL)
    model.load_state_dict(weights)
    run["weights"] = {"file": path.name, "fingerprint": _fingerprint(weights), "epoch": state["epoch"], "step": state["step"]}
    return model.to(device).eval(), run
