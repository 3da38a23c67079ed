"""The CUDA kernels, run on the CPU: `kernels/lif_cuda.cu` compiled by g++ under `cuda_emulation.h`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from fastsnn.cuda import HEADERS, SOURCE, Launcher, Library

_HERE = Path(__file__).resolve().parent
_BUILD = _HERE.parent.parent / "build" / "emulation"
#: One IEEE operation for each in the source; -fno-strict-aliasing because device code reads packs as words.
_FLAGS = ("-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes")


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(sanitize: bool = False) -> Path:
    """The shared library, compiled unless one of these very sources is there.

    sanitize: with -fsanitize=address, so that accesses outside of any allocation end the process with a report. Load
    it in a process started with `LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0`.
    """
    sources = [SOURCE, *HEADERS, _HERE / "cuda_emulation.h"]
    flags = [*_FLAGS, *(("-O1", "-g", "-fsanitize=address") if sanitize else ("-O1",))]
    key = hashlib.sha256(b"\0".join([" ".join(flags).encode(), *(path.read_bytes() for path in sources)])).hexdigest()[:16]
    library = _BUILD / f"emulated_{key}.so"
    if not library.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        command = [compiler() or "g++", *flags, "-include", str(_HERE / "cuda_emulation.h"), "-x", "c++", str(SOURCE), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"emulation: {' '.join(command)}\n{done.stderr}")
        partial.replace(library)  # other processes see all of it or none
    return library


class EmulatedCUDA(Launcher):
    """The `cuda` backend with CPU tensors: the same geometry, the same kernels, fibers for threads."""

    name = "cuda (emulated)"

    def __init__(self, sanitize: bool = False) -> None:
        self._path = build(sanitize)
        super().__init__(Library(self._path))

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes of tensors of the size of a step that kernels read and wrote since the last call, with 16-byte alignment."""
        moved = (ctypes.c_longlong * 2)()
        ctypes.CDLL(str(self._path)).fastsnn_emulation_bytes(moved)
        return moved[0], moved[1]
