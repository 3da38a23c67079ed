"""What an evaluation has found so far, sample by sample: in memory, in a file to go on from, and over several processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["WRITE_EVERY", "Part", "ResumeError", "Store", "key_of"]

#: Seconds between two writes of a file to resume from.
WRITE_EVERY = 10.0
#: Of a sample that nothing is known of.
UNKNOWN = -1


class ResumeError(ValueError):
    """A file to resume from does not fit the evaluation that is asked for, or cannot be read."""


def _text(flags: Tensor) -> str:
    return bytes((flags + 46).clamp(45).tolist()).decode().replace(".", "0").replace("/", "1")


def _flags(text: str) -> Tensor:
    return torch.tensor([{"0": 0, "1": 1, "-": UNKNOWN}[letter] for letter in text], dtype=torch.int8)


class Part:
    """One row: for each sample whether the model was right, whether its first gradient was zero, whom each member fooled (-1: unknown)."""

    def __init__(self, count: int) -> None:
        self.correct = torch.full((count,), UNKNOWN, dtype=torch.int8)
        self.zero = self.correct.clone()
        self.members: dict[str, Tensor] = {}
        self.largest, self.seconds = 0.0, 0.0

    def known(self) -> Tensor:
        """[N] bool: which samples are done."""
        return self.correct != UNKNOWN

    def add(self, places: Tensor, right: Tensor, zero: Tensor | None, members: tuple[Sequence[str], Tensor] | None, largest: float, seconds: float) -> None:
        """What a batch has found; `correct` last, so that what is interrupted in between does not count."""
        if zero is not None and zero.shape == right.shape:
            self.zero[places] = zero.to("cpu", torch.int8)
        if members is not None:
            for name, flags in zip(*members):
                self.members.setdefault(name, torch.full_like(self.correct, UNKNOWN))[places] = flags.to("cpu", torch.int8)
        self.largest = max(self.largest, largest)
        self.seconds += seconds
        self.correct[places] = right.to("cpu", torch.int8)

    def merge(self, other: Part) -> None:
        """What another process has found, too."""
        new = other.known() & ~self.known()
        self.correct[new], self.zero[new] = other.correct[new], other.zero[new]
        for name, flags in other.members.items():
            self.members.setdefault(name, torch.full_like(self.correct, UNKNOWN))[new] = flags[new]
        self.largest, self.seconds = max(self.largest, other.largest), self.seconds + other.seconds

    def to_dict(self) -> dict:
        members = {name: _text(flags) for name, flags in self.members.items()}
        return {"correct": _text(self.correct), "zero": _text(self.zero), "members": members, "largest": self.largest, "seconds": self.seconds}

    @staticmethod
    def from_dict(saved: dict) -> Part:
        part = Part(0)
        part.correct, part.zero = _flags(saved["correct"]), _flags(saved["zero"])
        part.members = {name: _flags(text) for name, text in saved["members"].items()}
        part.largest, part.seconds = float(saved["largest"]), float(saved["seconds"])
        return part


class Store:
    """The rows of an evaluation by name; in a file where one is wanted.

    Of several processes the first writes `path`, and process r a file of its own, `path.r`, with what it has found itself. Whoever
    goes on, in however many processes, begins with what all of these hold.
    """

    def __init__(self, path: str | Path | None, key: Callable[[], str], count: int, rank: int = 0, ranks: int = 1) -> None:
        self.path = None if path is None else Path(path)
        self.count, self.rank, self.ranks = count, rank, ranks
        self.parts: dict[str, Part] = {}
        self.own: dict[str, Part] = self.parts  # what this process writes
        self.written = time.monotonic()
        if self.path is not None:
            self.key = key()
            others = self._others()
            for file in (self.path, *others):
                if file.exists():
                    self._read(file)
            self._wait()
            if rank == 0 and others:
                self.write(now=True)  # before the files that it replaces go
            self._wait()
            if rank == 0:
                for file in (*others, *self._halves()):
                    file.unlink(missing_ok=True)
            self._wait()
        if rank:
            self.own = {}

    def _others(self) -> list[Path]:
        """The files of the processes but the first."""
        return sorted(file for file in self.path.parent.glob(f"{self.path.name}.*") if file.name.removeprefix(f"{self.path.name}.").isdecimal())

    def _halves(self) -> list[Path]:
        """What processes were writing when they were killed."""
        half = re.compile(re.escape(self.path.name) + r"(\.\d+)?\.\d+\.part")
        return [file for file in self.path.parent.glob(f"{self.path.name}.*") if half.fullmatch(file.name)]

    def _wait(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    def _read(self, file: Path) -> None:
        try:
            state = json.loads(file.read_text())
            before, parts = state["key"], {name: Part.from_dict(saved) for name, saved in state["rows"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ResumeError(f"evaluate: {file} is not a file of evaluate(resume=...); wanted one, or a new path. Delete it to begin anew.") from None
        if before != self.key:
            raise ResumeError(
                f"evaluate: {file} is of another model, other images or other attacks; wanted the same ones to go on. "
                "Delete it to begin anew, or choose another path."
            )
        for name, part in parts.items():
            self.part(name, len(part.correct)).merge(part)

    def part(self, name: str, count: int | None = None) -> Part:
        """All that is known of a row; count: of its samples, where they are not those of the evaluation."""
        return self.parts.setdefault(name, Part(self.count if count is None else count))

    def add(self, name: str, *found) -> None:
        """What a batch of this process has found; see `Part.add`."""
        self.part(name).add(*found)
        if self.own is not self.parts:
            self.own.setdefault(name, Part(len(self.part(name).correct))).add(*found)
        self.write()

    def share(self, name: str) -> None:
        """A row is done: every process learns what the others have found."""
        if self.ranks == 1:
            return
        news: list[dict] = [{}] * self.ranks
        dist.all_gather_object(news, self.part(name).to_dict())
        whole = Part(len(self.part(name).correct))
        for found in news:
            whole.merge(Part.from_dict(found))
        self.parts[name] = whole

    def write(self, now: bool = False) -> None:
        """Write the file, every few seconds, or now."""
        if self.path is None or not (now or time.monotonic() - self.written > WRITE_EVERY):
            return
        path = self.path if self.rank == 0 else self.path.with_name(f"{self.path.name}.{self.rank}")
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(part, "w") as file:
                json.dump({"key": self.key, "rows": {name: row.to_dict() for name, row in self.own.items()}}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self.written = time.monotonic()

    def finish(self) -> None:
        """Leave one file, of the first process, complete."""
        self.write(now=True)
        self._wait()
        if self.path is not None and self.rank:
            self.path.with_name(f"{self.path.name}.{self.rank}").unlink(missing_ok=True)
            self.path = None


def key_of(model: nn.Module, x: Tensor, y: Tensor, rest: object) -> str:
    """A hash of all that an evaluation depends on. rest: what JSON can hold: attacks, their options, settings."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, value in [*model.state_dict().items(), ("x", x), ("y", y)]:
        if not isinstance(value, Tensor):
            continue
        hashed.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    hashed.update(repr(model).encode())
    hashed.update(json.dumps(rest).encode())
    return hashed.hexdigest()
