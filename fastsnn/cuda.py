"""The `cuda` backend: which threads serve which neurons, and how the kernels of `kernels/lif_cuda.cu` are found.

The geometry of every launch is computed here, for the prebuilt library, for NVRTC and for the emulation of the tests
alike. A thread holds `vector` neighbouring neurons (16 bytes of x where alignment allows, else one) for all steps.
What is summed over neurons is summed per thread, per block, and over blocks, in a fixed order and without atomics.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .launch import STATE_INTERVAL, STEPS_IN_REGISTERS, Call
from .problem import Problem
from .tables import KERNELS

SOURCE = KERNELS / "lif_cuda.cu"
#: What the source includes; it needs nothing else, no header of CUDA or C++.
HEADERS = tuple(KERNELS / name for name in ("lif.h", "lif.def", "problem.def", "cuda_memory.h", "cuda_neurons.h", "cuda_sums.h", "cuda_straight.h"))
#: Bits must equal the reference: no fused multiply-add; division, denormals and rounding as IEEE says.
FLAGS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--device-as-default-execution-space")

#: The kernels of the prebuilt library, in the order of `choose` in the source: the forward pass without statistics, and
#: with them by block or by column; the backward pass by what it can do; the approximations; the sums over blocks.
FORWARD, STATISTICS, STATISTICS_COLUMNS, BACKWARD, BACKWARD_STATISTICS, BACKWARD_ALL, STRAIGHT, FINISH_STATISTICS, FINISH_GRADIENT = range(9)
_NAMES = ("forward", "forward_statistics", "forward_statistics", "backward", "backward", "backward", "straight", "finish_statistics", "finish_gradient")
_USES_TENSORS, _USES_STATISTICS, _USES_SUMS = 1, 2, 4  # `enum Uses`
_ELEMENTS = ("float", "double", "lif::bf16", "lif::f16")
_BYTES = (4, 8, 2, 2)  # per element of x
_REAL_BYTES = (4, 8, 4, 4)
_AHEAD, _AHEAD_STATISTICS = 4, 8  # packs in flight per thread, `Ahead::depth`
_MOST_KEPT = 16  # registers per thread for h; above, shared memory lets more threads run at a time
_MOST_SHARED = 96 * 1024  # bytes per block that every device since sm_80 grants


def _tile_fields() -> list[tuple[str, type]]:
    body = (KERNELS / "cuda_neurons.h").read_text().split("struct Tiles {", 1)[1].split("};", 1)[0]
    return [(name, ctypes.c_int64) for name in re.findall(r"^\s*i64 (\w+);", body, re.M)]


class Tiles(ctypes.Structure):
    """`struct Tiles` of `kernels/cuda_neurons.h`: the geometry of one launch."""

    _fields_ = _tile_fields()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


_PER_NEURON = ("x", "v0", "spikes", "v", "membrane", "states", "g_spikes", "g_v", "g_membrane", "g_x", "g_v0")
_PARAMETERS = ("decay", "threshold", "a", "b")
_BY_CHANNEL = ("mean", "g_mean", "g_variance", "g_rate", "g_guard")


def uses(tensors: dict[str, Tensor]) -> int:
    """What a backward kernel must be able to do for this call: `enum Uses` of the source."""
    groups = (
        (_USES_TENSORS, ("decay", "threshold", "a", "b", "gain", "g_membrane")),
        (_USES_STATISTICS, ("g_mean", "g_variance", "g_rate", "g_guard")),
        (_USES_SUMS, ("g_decay", "g_threshold", "g_gain")),
    )
    return sum(bit for bit, names in groups if any(name in tensors for name in names))


@dataclass
class Plan:
    """The launches of one call, in order, and the doubles of scratch that they share."""

    launches: list[Tiles]
    scratch: int = 0


class Planner:
    """Lays the neurons of one call out over blocks and threads."""

    def __init__(self, call: Call) -> None:
        self.tensors, self.numbers = call.tensors, call.numbers
        get = self.numbers.get
        self.dtype, self.steps, self.count = get("dtype"), get("steps"), get("count")
        self.channels, self.inner = get("channels"), get("inner")
        self.period = self.channels * self.inner
        self.most = 16 // _BYTES[self.dtype]
        columns = {get(f"{name}_columns", 1) for name in _PARAMETERS if name in self.tensors}
        self.neuron_wise = any(c not in (1, self.channels) for c in columns)
        self.channel_wise = self.channels > 1 and (self.channels in columns or any(n in self.tensors for n in _BY_CHANNEL))

    def _vector(self, wanted: int) -> int:
        """`wanted` neurons per thread if alignment and the parameters allow it, else 1."""
        size = _BYTES[self.dtype]
        aligned = all(t.data_ptr() % 16 == 0 for name in _PER_NEURON if (t := self.tensors.get(name)) is not None)
        aligned &= self.count % wanted == 0 and self.numbers["x_stride"] * size % (wanted * size) == 0
        if self.channel_wise:  # the neurons of a thread lie in one channel, or in neighbouring ones
            aligned &= self.inner % wanted == 0 or (self.inner == 1 and self.channels % wanted == 0)
        if self.neuron_wise:
            aligned &= self.period % wanted == 0
        return wanted if aligned else 1

    def tiles(self, kernel: int, vector: int, threads: int, parts: int = 1, columns: set[int] = frozenset()) -> Tiles:
        """The geometry of a kernel that goes over all neurons.

        parts: tiles per block; 0: as the forward pass with statistics has it. columns: for how many columns (1, channels, or neurons) it keeps partial sums.
        """
        channels, inner, period = self.channels, self.inner, self.period
        g = Tiles(kernel=kernel, dtype=self.dtype, channel_step=int(inner == 1 and channels > 1))
        g.offset_0 = g.offset_1 = g.offset_2 = g.offset_3 = -1
        rows = self.count // period
        by_neuron = any(c not in (1, channels) for c in columns)
        by_channel = channels > 1 and channels in columns
        if by_channel and not by_neuron:
            # A block serves one channel where a row holds enough of it, else it serves columns.
            if inner % vector == 0 and inner * _BYTES[self.dtype] >= 32:
                by_column = False
            else:
                by_column = inner < 8 or (rows >= 64 and period % vector == 0)
                if not by_column:
                    vector = 1
        else:
            by_column = by_neuron
        if by_column and period % vector:
            vector = 1
        if parts == 0:
            parts = 1 if by_column and vector >= 8 else 2
            g.kernel = STATISTICS_COLUMNS if by_column else STATISTICS
        if by_column:
            width = min(_power_of_two(_ceil(period, vector)), max(1, 128 // (vector * _BYTES[self.dtype])), 32)
            threads = max(32, min(threads, _power_of_two(_ceil(width * rows, parts))))
            chunks = _ceil(rows, threads // width * parts)
            g.by_column, g.width, g.groups, g.inner, g.period, g.rows, g.chunks = 1, width, period, 1, period, rows, chunks
            g.blocks = _ceil(period, width * vector) * chunks
        else:
            if by_channel:
                g.groups, g.inner, g.period, g.rows = channels, inner, period, rows
            else:
                g.groups, g.inner, g.period, g.rows = 1, self.count, self.count, 1
            members = g.rows * g.inner
            threads = min(threads, 32 * _ceil(members, 32 * vector * parts))
            g.chunks = _ceil(members, threads * vector * parts)
            g.blocks = g.groups * g.chunks
        g.vector, g.threads = vector, threads
        return g

    def _that_fits(self, kernel: int, vector: int, threads: int, parts: int, columns: set[int], per_thread: Callable[[Tiles], int]) -> Tiles:
        """The geometry with as many threads as shared memory has room for; per_thread: the bytes that one needs."""
        while True:
            g = self.tiles(kernel, vector, threads, parts, columns)
            g.shared = per_thread(g) * g.threads
            if g.shared <= _MOST_SHARED or threads <= 32:
                return g
            threads //= 2

    def _finish(self, g: Tiles, kernel: int, quantity: int, steps: int, columns: int) -> Tiles:
        """The launch that adds up the partial sums which the launch g leaves."""
        f = Tiles.from_buffer_copy(g)
        f.kernel, f.vector, f.quantity, f.threads, f.shared = kernel, 1, quantity, 256, 256 * 8
        f.lanes = min(256, _power_of_two(g.groups // columns * g.chunks))
        f.blocks = _ceil(steps * columns * f.lanes, f.threads)
        return f

    def forward(self) -> Plan:
        tensors, statistics = self.tensors, "mean" in self.tensors
        vector = self._vector(self.most)
        if not statistics:
            g = self.tiles(FORWARD, vector, 256)
            g.shared = _AHEAD * g.threads * g.vector * _BYTES[self.dtype]
            return Plan([g])
        wanted = [True, True, "rate" in tensors, "guard" in tensors]

        def shared(g: Tiles) -> int:
            return 2 * sum(wanted) * (g.vector if g.by_column else 1) * 8 + _AHEAD_STATISTICS * g.vector * _BYTES[self.dtype]

        g = self._that_fits(STATISTICS, vector, 256, 0, {self.channels}, shared)
        plan = Plan([g])
        for quantity, is_wanted in enumerate(wanted):
            if is_wanted:
                setattr(g, f"offset_{quantity}", plan.scratch)
                plan.scratch += self.steps * g.chunks * g.groups
        plan.launches.append(self._finish(g, FINISH_STATISTICS, 0, self.steps, self.channels))
        return plan

    def backward(self) -> Plan:
        tensors, numbers = self.tensors, self.numbers
        if numbers["adjoint"] != 0:
            return Plan([self.tiles(STRAIGHT, self._vector(self.most), 128)])
        segment = self.steps if self.steps <= STEPS_IN_REGISTERS else STATE_INTERVAL
        if self.steps > STEPS_IN_REGISTERS and "states" not in tensors:
            raise ValueError(f"cuda: the backward pass over {self.steps} steps needs the states that forward keeps with states=True; got none.")
        jobs = []  # quantity, steps, columns
        for quantity, name in enumerate(("decay", "threshold")):
            if f"g_{name}" in tensors:
                jobs.append((quantity, numbers[f"{name}_steps"], numbers[f"{name}_columns"]))
        if "g_gain" in tensors:
            jobs.append((2, self.steps, 1))
        kernel = {0: BACKWARD, _USES_STATISTICS: BACKWARD_STATISTICS}.get(uses(tensors), BACKWARD_ALL)
        # 8 neurons per thread leave too little shared memory for more than 16 steps, and too few registers for sums.
        vector = self._vector(min(self.most, 4) if segment > 16 or kernel == BACKWARD_ALL else self.most)

        def shared(g: Tiles) -> int:
            sums = 2 * 3 * (g.vector if g.by_column else 1) * 8 if kernel == BACKWARD_ALL else 0
            return sums + _AHEAD * g.vector * _BYTES[self.dtype] + segment * g.vector * _REAL_BYTES[self.dtype]

        g = self._that_fits(kernel, vector, 128, 1, {columns for _, _, columns in jobs}, shared)
        g.segment = segment
        plan = Plan([g])
        for quantity, steps, _ in jobs:
            setattr(g, f"offset_{quantity}", plan.scratch)
            plan.scratch += steps * g.chunks * g.groups
        plan.launches += [self._finish(g, FINISH_GRADIENT, quantity, steps, columns) for quantity, steps, columns in jobs]
        return plan


def kernel_name(tiles: Tiles, call: Call) -> str:
    """The C++ name of the kernel for a launch, with the rows of this call, and the steps where they fit in registers."""
    name, element, vector = _NAMES[tiles.kernel], _ELEMENTS[tiles.dtype], tiles.vector
    if tiles.kernel >= FINISH_STATISTICS:
        return f"lif::{name}"
    charge, fire, reset = (call.numbers[n] for n in ("charge", "fire", "reset"))
    surrogate = call.numbers.get("surrogate", -1)
    rows = f"lif::Rows<{charge}, {fire}, {reset}, {surrogate}>"
    if tiles.kernel in (STATISTICS, STATISTICS_COLUMNS):
        return f"lif::{name}<{element}, {vector}, {'true' if tiles.by_column else 'false'}, {rows}>"
    if tiles.kernel in (BACKWARD, BACKWARD_STATISTICS, BACKWARD_ALL):
        steps = call.numbers["steps"]
        registers = steps * vector * _REAL_BYTES[tiles.dtype] // 4
        kept = steps if registers <= _MOST_KEPT and tiles.kernel != BACKWARD_ALL else 0
        exactly = uses(call.tensors) | (_USES_SUMS if tiles.kernel == BACKWARD_ALL else 0)  # as the shared memory was laid out
        return f"lif::{name}<{element}, {vector}, {kept}, {rows}, {exactly}>"
    return f"lif::{name}<{element}, {vector}, {rows}>"


class Library:
    """Kernels that were compiled ahead, in a shared library with the C ABI of `kernels/lif_cuda.cu`."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._launch = library.fastsnn_cuda_launch
        self._launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._message = library.fastsnn_cuda_message
        self._message.restype = ctypes.c_char_p
        for name, struct in (("problem", Problem), ("tiles", Tiles)):
            measure = getattr(library, f"fastsnn_cuda_{name}_bytes")
            measure.restype = ctypes.c_longlong
            if measure() != ctypes.sizeof(struct):
                raise OSError(f"{path.name} was built from other sources: its struct {struct.__name__} has {measure()} bytes, not {ctypes.sizeof(struct)}. Build it again.")

    def launch(self, tiles: Tiles, call: Call, problem: Problem, stream: int) -> None:
        error = self._launch(ctypes.addressof(problem), ctypes.addressof(tiles), stream)
        if error:
            raise RuntimeError(f"cuda: {_NAMES[tiles.kernel]} failed: {self._message(error).decode()} (error {error}).")


class NVRTC:
    """Kernels that NVRTC, as CuPy brings it, compiles at first use, each for its rows and number of steps."""

    def __init__(self) -> None:
        from cupy.cuda import driver, function, nvrtc, runtime

        self._driver, self._function, self._nvrtc, self._runtime = driver, function, nvrtc, runtime
        nvrtc.getVersion()  # CuPy looks for the library when it is first used: now, so that a missing one is known
        self._kernels: dict[tuple[int, str], tuple[object, int]] = {}
        self._lock = threading.Lock()

    def compile(self, name: str, architecture: str) -> tuple[bytes, str]:
        """The binary of one kernel for an architecture such as sm_90, and its name in there."""
        nvrtc = self._nvrtc
        headers = {path.name.encode(): path.read_bytes() for path in HEADERS}
        # CuPy's own RawModule would compile with --ftz=true: denormals would differ from the reference.
        program = nvrtc.createProgram(SOURCE.read_text(), SOURCE.name, tuple(headers.values()), tuple(headers))
        try:
            nvrtc.addNameExpression(program, name)
            try:
                nvrtc.compileProgram(program, (*FLAGS, f"--gpu-architecture={architecture}"))
            except nvrtc.NVRTCError as error:
                raise RuntimeError(f"cuda: NVRTC could not compile {name} for {architecture}: {error}\n{nvrtc.getProgramLog(program)}") from error
            return nvrtc.getCUBIN(program), nvrtc.getLoweredName(program, name)
        finally:
            nvrtc.destroyProgram(program)

    def _kernel(self, name: str) -> int:
        key = (torch.cuda.current_device(), name)
        with self._lock:
            if key not in self._kernels:
                major, minor = torch.cuda.get_device_capability()
                binary, lowered = self.compile(name, f"sm_{major}{minor}")
                module = self._function.Module()
                module.load(binary)
                self._kernels[key] = (module, self._driver.moduleGetFunction(module.ptr, lowered))
        return self._kernels[key][1]

    def _bind(self) -> None:
        """Makes the current device's context current in a thread that has none yet.

        A thread of autograd, or a user's, in which nothing has run on the GPU so far stands on device 0 without its
        context, and torch's guards find nothing to change (pytorch/pytorch#195256). The driver's calls fail there.
        """
        if not self._driver.ctxGetCurrent():
            self._runtime.setDevice(torch.cuda.current_device())

    def launch(self, tiles: Tiles, call: Call, problem: Problem, stream: int) -> None:
        self._bind()
        kernel = self._kernel(kernel_name(tiles, call))
        if tiles.shared > 48 * 1024:
            self._driver.funcSetAttribute(kernel, 8, tiles.shared)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        arguments = (ctypes.c_void_p * 2)(ctypes.addressof(problem), ctypes.addressof(tiles))
        self._driver.launchKernel(kernel, tiles.blocks, 1, 1, tiles.threads, 1, 1, tiles.shared, stream, ctypes.addressof(arguments), 0)


class Launcher:
    """Runs calls through `kernels`, a Library or NVRTC."""

    name = "cuda"
    keeps_states = True

    def __init__(self, kernels: Library | NVRTC | None = None) -> None:
        self.kernels = kernels

    def _run(self, call: Call, forward: bool, stream: int) -> None:
        if call.numbers["count"] == 0:
            for name in ("mean", "variance", "rate", "guard") if forward else ():
                if name in call.tensors:
                    call.tensors[name].fill_(float("nan"))
            for name in ("g_decay", "g_threshold", "g_gain"):
                if name in call.tensors:
                    call.tensors[name].zero_()
            return
        planner = Planner(call)
        plan = planner.forward() if forward else planner.backward()
        if plan.scratch:
            # From torch's allocator, so that a captured graph owns it.
            call.put(scratch=torch.empty(8 * plan.scratch, dtype=torch.uint8, device=call.tensors["x"].device))
        problem = call.problem()
        for tiles in plan.launches:
            self.kernels.launch(tiles, call, problem, stream)

    def forward(self, call: Call) -> None:
        self._run(call, True, 0)

    def backward(self, call: Call) -> None:
        self._run(call, False, 0)


class CUDA(Launcher):
    """The backend: the prebuilt library beside the package, else NVRTC; one error naming both causes."""

    def __init__(self) -> None:
        super().__init__()
        self._reason: str | None = None
        self._lock = threading.Lock()

    def _load(self) -> str | None:
        """Finds the kernels once; returns why there are none."""
        with self._lock:
            if self.kernels is None and self._reason is None:
                causes = []
                package = Path(__file__).resolve().parent
                libraries = sorted((*package.glob("_fastsnn_cuda*.so"), *package.parent.glob("build/cmake/lib/_fastsnn_cuda*.so")))
                if not libraries:
                    causes.append("no prebuilt library _fastsnn_cuda*.so beside the package (reinstall fastsnn where nvcc is on PATH)")
                for path in libraries:
                    try:
                        self.kernels = Library(path)
                        return None
                    except (OSError, AttributeError) as error:
                        causes.append(f"{path.name} does not load: {error}")
                try:
                    self.kernels = NVRTC()
                    return None
                except Exception as error:  # CuPy raises many kinds
                    causes.append(f"no NVRTC: {type(error).__name__}: {error} (pip install cupy-cuda12x or cupy-cuda13x, as torch.version.cuda says)")
                self._reason = "no kernels: " + "; ".join(causes) + "."
            return self._reason

    def missing(self) -> str | None:
        """Why this backend cannot run here, with the cure; None where it can."""
        if torch.version.cuda is None:
            return "this torch was built without CUDA. Install a CUDA build of torch."
        if not torch.cuda.is_available():
            return "torch finds no CUDA device. Check the driver with nvidia-smi."
        return self._load()

    def refuses(self, x: Tensor) -> str | None:
        """Why this backend cannot serve x; None where it can."""
        if x.device.type != "cuda":
            return f"x is on {x.device}; wanted a CUDA device. Move it, for example x.cuda()."
        capability = torch.cuda.get_device_capability(x.device)
        if capability < (8, 0):
            return f"{x.device} has compute capability {capability[0]}.{capability[1]}; wanted 8.0 or later. Use backend='triton' or 'reference'."
        return None

    def _on_device(self, call: Call, forward: bool) -> None:
        if self.kernels is None and (reason := self._load()) is not None:
            raise RuntimeError(f"cuda: {reason}")
        x = call.tensors["x"]
        with torch.cuda.device(x.device):
            self._run(call, forward, torch.cuda.current_stream(x.device).cuda_stream)

    def forward(self, call: Call) -> None:
        self._on_device(call, True)

    def backward(self, call: Call) -> None:
        self._on_device(call, False)
