"""The table of backends: what can run a layer here, and why the rest cannot.

A backend has a `name`, `keeps_states` (whether its backward pass wants states kept above 32 steps), `missing()` (why it
cannot run on this machine, or None), `refuses(x)` (why it cannot serve this input, or None), `forward(call)` and
`backward(call)`, which fill the tensors of a `fastsnn.launch.Call`.

To add one: a kernel file in `kernels/`, a class with these members, and its row in BACKENDS. The tests find it there.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from .adjoints import nearest
from .cuda import CUDA
from .launch import Call
from .problem import Problem

#: Forces a backend for every call that says `backend="auto"`.
FORCE = "FASTSNN_BACKEND"
#: Set to 1: `auto` never falls back to the reference.
REQUIRE = "FASTSNN_REQUIRE_KERNELS"

NO_MEMORY = "cpu: no memory left for the sums of this call; use a smaller batch or fewer steps."


class Reference:
    """Plain PyTorch; runs anything (`fastsnn.reference`). Calls go there directly, not through `Call`."""

    name, keeps_states = "reference", False

    def missing(self) -> str | None:
        return None

    def refuses(self, x: Tensor) -> str | None:
        return None


class CPU:
    """The C++ kernels, loaded with ctypes."""

    name, keeps_states = "cpu", False

    def __init__(self, library: str | Path | None = None) -> None:
        self._path = library

    @functools.cached_property
    def _library(self) -> ctypes.CDLL | str:
        """The loaded library, or why there is none."""
        path = self._path or next(iter(libraries("_fastsnn_cpu")), None)
        if path is None:
            return (
                "the package was installed without its CPU kernels (no C++ compiler or no CMake was found then). "
                "Install a C++17 compiler and CMake (Debian: apt install g++ cmake), then reinstall fastsnn: "
                "pip install --force-reinstall --no-deps ."
            )
        try:
            library = self._open(str(path))
        except OSError as error:
            return f"{path} does not load: {error}. Reinstall fastsnn on this machine."
        library.fastsnn_problem_size.restype = ctypes.c_longlong
        library.fastsnn_instruction_set.restype = ctypes.c_char_p
        if library.fastsnn_problem_size() != ctypes.sizeof(Problem):
            return f"{path} was built from another version of the kernels. Reinstall fastsnn."
        for function in (library.fastsnn_forward, library.fastsnn_backward):
            function.argtypes = [ctypes.POINTER(Problem)]
        return library

    @staticmethod
    def _open(path: str) -> ctypes.CDLL:
        try:
            # The kernels name no OpenMP library: they use the one that torch has loaded, and so its threads.
            return ctypes.CDLL(path)
        except OSError as error:
            if "GOMP" not in str(error):
                raise
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(path)

    @property
    def instruction_set(self) -> str:
        """`baseline`, `v3` (AVX2) or `v4` (AVX-512): what the kernels run with on this machine."""
        return self._library.fastsnn_instruction_set().decode()

    def use_instruction_set(self, name: str) -> bool:
        """Run the kernels of another instruction set, for tests; False where this machine lacks it."""
        return self._library.fastsnn_use_instruction_set(name.encode()) == 0

    def missing(self) -> str | None:
        return self._library if isinstance(self._library, str) else None

    def refuses(self, x: Tensor) -> str | None:
        return None if x.device.type == "cpu" else f"x is on {x.device}; it serves CPU tensors. Move it: x.cpu()."

    def forward(self, call: Call) -> None:
        self.run_forward(call.problem())

    def backward(self, call: Call) -> None:
        self.run_backward(call.problem())

    def run_forward(self, problem: Problem) -> None:
        if self._library.fastsnn_forward(problem):
            raise MemoryError(NO_MEMORY)

    def run_backward(self, problem: Problem) -> None:
        if self._library.fastsnn_backward(problem):
            raise MemoryError(NO_MEMORY)


class Triton:
    """The Triton kernels (`kernels/lif_triton.py`), compiled at first use."""

    name, keeps_states = "triton", True

    @functools.cached_property
    def _module(self):
        from .kernels import lif_triton

        return lif_triton

    def missing(self) -> str | None:
        try:
            return self._module.missing()
        except ImportError as error:
            return f"triton cannot be imported ({error}). Install it: pip install 'fastsnn[gpu]'."

    def refuses(self, x: Tensor) -> str | None:
        return self._module.refuses(x)

    def forward(self, call: Call) -> None:
        self._module.forward(call)

    def backward(self, call: Call) -> None:
        self._module.backward(call)


#: Every backend by its name, in the order in which `auto` tries them.
BACKENDS = {backend.name: backend for backend in (CUDA(), Triton(), CPU(), Reference())}


def libraries(stem: str) -> list[Path]:
    """Shared libraries of that name in the package, or in the build folder of a checkout."""
    here = Path(__file__).resolve().parent
    return sorted([*here.glob(f"{stem}*.so"), *here.parent.glob(f"build/cmake/lib/{stem}*.so")])


def reasons(x: Tensor | None = None) -> dict[str, str | None]:
    """For each backend why it cannot run here (or serve x), or None if it can."""
    result = {}
    for name, backend in BACKENDS.items():
        why = backend.missing()
        if why is None and x is not None:
            why = backend.refuses(x)
        result[name] = why
    return result


def why(x: Tensor | None = None) -> str:
    """What `backend="auto"` would take for x, and why not the others, as text."""
    lines = [f"auto takes {resolve('auto', x).name!r}" if x is not None else "backends:"]
    lines += [f"  {name}: {reason or 'ready'}" for name, reason in reasons(x).items()]
    return "\n".join(lines)


def check_name(name: str) -> None:
    known = ("auto", *BACKENDS)
    if name not in known:
        raise ValueError(f"lif: backend {name!r} is unknown; wanted one of {', '.join(known)}.{nearest(name, known)}")


@functools.lru_cache(maxsize=None)
def _ready(name: str) -> bool:
    return BACKENDS[name].missing() is None


def resolve(name: str, x: Tensor):
    """The backend that serves x: the one named, or for `auto` the first that can."""
    if name == "auto":
        name = os.environ.get(FORCE) or "auto"
    check_name(name)
    if name != "auto":
        backend = BACKENDS[name]
        reason = backend.missing() or backend.refuses(x)
        if reason:
            others = "".join(f"\n  {other}: {text or 'ready'}" for other, text in reasons(x).items() if other != name)
            raise RuntimeError(f"lif: backend {name!r} cannot serve this call: {reason}\nThe others:{others}")
        return backend
    for backend in BACKENDS.values():
        if not _ready(backend.name) or backend.refuses(x) is not None:
            continue
        if x.device.type == "cpu" and backend.name in ("cuda", "triton"):
            continue  # they serve CPU tensors only to be tested: emulated, or interpreted
        if backend.name == "reference" and os.environ.get(REQUIRE) == "1":
            break
        return backend
    listing = "".join(f"\n  {other}: {text or 'ready'}" for other, text in reasons(x).items())
    raise RuntimeError(f"lif: {REQUIRE}=1 and no compiled backend can serve this call:{listing}")
