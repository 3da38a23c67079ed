"""A folder, a zip or a tar archive as one thing: names, and the bytes under a name. Archives are never unpacked to disk."""

from __future__ import annotations

import bisect
import gzip
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

#: What the standard library raises on a damaged archive.
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile)
#: How far below the given path a data set may lie: cifar-10-batches-py/x, MNIST/raw/x.
DEPTH = 2


def damaged(where: object, error: BaseException) -> ValueError:
    """The error for a file that ends early or does not decode."""
    return ValueError(f"data: {where} is damaged or cut short ({type(error).__name__}: {error}); wanted the whole file. Fetch it again.")


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


class Source(ABC):
    """The files below one path. Names are relative, with slashes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def where(self, name: str) -> str:
        """A file's place, for errors."""
        return f"{self.path}: {name}"

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The contents of a file."""

    @abstractmethod
    def below(self, folder: str) -> list[str]:
        """The names of all files under a folder, sorted."""

    @abstractmethod
    def places(self, name: str, folder: bool) -> list[str]:
        """Where a file (or a folder) of this name is, at most DEPTH folders down."""

    def find(self, *names: str, folder: bool = False) -> str | None:
        """The place of the first of the names that exists, nearest to the top; ValueError where two are equally near."""
        for name in names:
            places = self.places(name, folder)
            depth = min((place.count("/") for place in places), default=0)
            nearest = [place for place in places if place.count("/") == depth]
            if len(nearest) > 1:
                raise ValueError(f"data: {self.path} holds {name} in several folders: {', '.join(nearest[:3])}; wanted one data set. Give the path of its own folder.")
            if nearest:
                return nearest[0]
        return None

    def need(self, *names: str, folder: bool = False) -> str:
        """As `find`; FileNotFoundError where there is none."""
        place = self.find(*names, folder=folder)
        if place is None:
            raise FileNotFoundError(f"data: {self.path} has no {'folder' if folder else 'file'} {' or '.join(names)}, which this format needs.")
        return place

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_) -> None:
        pass


class Folder(Source):
    def where(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"data: {self.where(name)} does not exist.") from None

    def below(self, folder: str) -> list[str]:
        found = []
        for top, _, files in os.walk(self.path / folder):
            found += [(Path(top) / file).relative_to(self.path).as_posix() for file in files]
        return sorted(name for name in found if not _hidden(name))

    def places(self, name: str, folder: bool) -> list[str]:
        paths = [path for depth in range(DEPTH + 1) for path in self.path.glob("*/" * depth + name) if path.is_dir() == folder]
        return sorted(place for path in paths if not _hidden(place := path.relative_to(self.path).as_posix()))


class Archive(Source):
    """Files whose names are known at once."""

    names: list[str]

    def below(self, folder: str) -> list[str]:
        prefix = folder.rstrip("/") + "/"
        start = bisect.bisect_left(self.names, prefix)
        return self.names[start : bisect.bisect_left(self.names, prefix[:-1] + chr(ord("/") + 1), start)]

    def places(self, name: str, folder: bool) -> list[str]:
        found = set()
        for entry in self.names:
            parts = entry.split("/")
            heads = parts[: DEPTH + 1]
            if folder and name in heads[: len(parts) - 1]:
                found.add("/".join(parts[: heads.index(name) + 1]))
            elif not folder and parts[-1] == name and len(parts) <= DEPTH + 1:
                found.add(entry)
        return sorted(found)


class Zip(Archive):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGE as error:
            raise damaged(path, error) from error
        self._entries = {entry.filename.removeprefix("./"): entry for entry in self._zip.infolist() if not entry.is_dir()}
        self.names = sorted(name for name in self._entries if not _hidden(name))

    def read(self, name: str) -> bytes:
        if name not in self._entries:
            raise FileNotFoundError(f"data: {self.where(name)} does not exist.")
        try:
            return self._zip.read(self._entries[name])
        except (*DAMAGE, RuntimeError, NotImplementedError) as error:  # encrypted; an unknown compression
            raise damaged(self.where(name), error) from error

    def __exit__(self, *_) -> None:
        self._zip.close()


class Tar(Archive):
    """A tar archive, held in memory: it can only be read from front to back, and its checksum stands at the end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._contents: dict[str, bytes] = {}
        opened = path.open("rb") if path.suffix == ".tar" else gzip.open(path)
        try:
            with opened as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    if member.isfile():
                        self._contents[member.name.removeprefix("./")] = archive.extractfile(member).read()
                while stream.read(1 << 20):  # gzip compares its checksum at the end of the stream
                    pass
        except DAMAGE as error:
            raise damaged(path, error) from error
        self.names = sorted(name for name in self._contents if not _hidden(name))

    def read(self, name: str) -> bytes:
        if name not in self._contents:
            raise FileNotFoundError(f"data: {self.where(name)} does not exist.")
        return self._contents[name]


#: Which endings are archives.
ARCHIVES = {".tar.gz": Tar, ".tgz": Tar, ".tar": Tar, ".zip": Zip}


def open_source(path: Path) -> Source | None:
    """The folder or archive at a path; None for a file of another kind."""
    if path.is_dir():
        return Folder(path)
    for ending, kind in ARCHIVES.items():
        if path.name.lower().endswith(ending):
            return kind(path)
    return None
