"""What the CUDA compilers make of `kernels/lif_cuda.cu`, without a GPU: registers, spills, widths, bytes, fused operations.

`nvcc` rows are the kernels of the prebuilt library, which find rows and steps at run time; `nvrtc` rows are compiled for
one set of rows and one T, as on a machine without nvcc. Bytes are counted while the kernels run in the emulation, partial
sums of statistics and gradients apart. Prebuilt backward kernels hold the exponentials of libdevice, whose `fma` are meant.

    python -m bench.static_cuda
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from fastsnn import launch, surrogates  # noqa: E402
from fastsnn.cuda import FLAGS, HEADERS, SOURCE, Planner, Tiles, kernel_name  # noqa: E402
from fastsnn.reference import Dynamics  # noqa: E402

KERNELS = ("forward", "forward_statistics", "backward", "backward_statistics", "backward_threshold")
SHAPE = (8, 16, 16, 16)  # of a step; every count below is per neuron and step
#: Float32 bytes that nothing can save, per neuron-step (and per neuron): x and spikes; x, their gradient, and that of x.
_FEWEST = {"forward": (2, 1), "backward": (3, 0)}


class _Recorder:
    """A backend that keeps the call and its plan, and lets `inner` run it."""

    keeps_states = True

    def __init__(self, inner) -> None:
        self.inner = inner

    def forward(self, call) -> None:
        self.call, self.plan = call, Planner(call).forward()
        self.inner.forward(call)

    def backward(self, call) -> None:
        self.call, self.plan = call, Planner(call).backward()
        self.inner.backward(call)


def run(kernel: str, dtype: torch.dtype, steps: int, emulated) -> tuple[Tiles, str, float, float]:
    """One call: the geometry of its main kernel, that kernel's specialised name, the bytes per neuron-step, and the size
    of the partial sums in percent of x."""
    recorder, dynamics = _Recorder(emulated), Dynamics()
    x = torch.randn(steps, *SHAPE).to(dtype)
    emulated.bytes_moved()
    if kernel.startswith("forward"):
        launch.forward(recorder, x, None, None, None, None, None, steps, dynamics, 0.5, 1.0, statistics=3 if "statistics" in kernel else 0)
    else:
        table = torch.randn(4, steps, SHAPE[1], dtype=torch.float64) if "statistics" in kernel else None
        threshold = torch.ones(1, 1) if "threshold" in kernel else None
        launch.backward(
            recorder, launch.Gradients(spikes=x, table=table), x, None, None, threshold, None, None, None,
            None if table is None else table[0], steps, dynamics, surrogates.Triangle(1.0), "bptt", 0.5, 1.0, statistics=3,
        )  # fmt: skip
    tiles = recorder.plan.launches[0]
    partial = 100 * 8 * recorder.plan.scratch / (x.numel() * x.element_size())
    return tiles, kernel_name(tiles, recorder.call), sum(emulated.bytes_moved()) / x.numel(), partial


def any_rows(name: str) -> str:
    """The kernel of the prebuilt library for a specialised kernel."""
    name = re.sub(r"lif::Rows<[^>]*>", "lif::Rows<-1, -1, -1, -1>", name)
    if "backward" in name:
        head, element, vector, _, tail = re.match(r"(\w+::\w+)<([^,]+), (\d), (\d+), (.*)", name).groups()
        uses = int(tail.rsplit(", ", 1)[1].rstrip(">"))
        tail = tail.rsplit(", ", 1)[0] + f", {uses if uses in (0, 2) else 7}>"
        name = f"{head}<{element}, {vector}, 0, {tail}"
    return name


def ptx_of_nvcc(names: list[str], arch: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "kernels.cu"), Path(folder, "kernels.ptx")
        lines = [f"template __global__ void {n}(const __grid_constant__ lif::Problem, const __grid_constant__ lif::Tiles);" for n in names]
        source.write_text("\n".join(("#define LIF_KERNELS_ONLY", f'#include "{SOURCE}"', *lines)))
        command = ["nvcc", "-O3", "-std=c++17", "--fmad=false", f"-arch={arch.replace('sm', 'compute')}", "-ptx", "-o", str(out), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        return out.read_text()


def _nvrtc() -> ctypes.CDLL | None:
    """NVRTC from the system or from NVIDIA's package (`pip install nvidia-cuda-nvrtc`)."""
    places = [str(p) for path in sys.path for p in Path(path or ".").glob("nvidia/*/lib/libnvrtc.so.*")]
    for place in (*places, "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            # NVRTC looks for its builtins by name alone, so they must be loaded before.
            for builtins in Path(place).parent.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(place)
        except OSError:
            continue
    return None


def ptx_of_nvrtc(library: ctypes.CDLL, names: list[str], arch: str) -> str:
    strings = ctypes.c_char_p * len(HEADERS)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    texts, titles = strings(*(p.read_bytes() for p in HEADERS)), strings(*(p.name.encode() for p in HEADERS))
    library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), len(HEADERS), texts, titles)
    for name in names:
        library.nvrtcAddNameExpression(program, name.encode())
    flags = [*FLAGS, f"--gpu-architecture={arch.replace('sm', 'compute')}"]
    error = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags)))
    which = "ProgramLog" if error else "PTX"
    getattr(library, f"nvrtcGet{which}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{which}")(program, text)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if error:
        raise RuntimeError(f"static_cuda: NVRTC: {text.value.decode()}")
    return text.value.decode()


def _demangled(symbols: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = [line.replace("> >", ">>").replace("(bool)", "") for line in done.stdout.splitlines()]
    return [re.sub(r"^void |\(lif::Problem, lif::Tiles\)$", "", name) for name in names]


def measure(ptx: str, arch: str) -> dict[str, dict]:
    """By kernel: registers and spills as ptxas says, widths and fused or approximate operations as the PTX says."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.ptx")
        source.write_text(ptx)
        done = subprocess.run(["ptxas", "-v", f"-arch={arch}", "-o", str(Path(folder, "out")), str(source)], capture_output=True, text=True, check=True)
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(pattern, done.stdout + done.stderr, re.S)
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.S))
    result = {}
    for (symbol, stores, loads, registers), name in zip(found, _demangled([f[0] for f in found])):
        body = bodies[symbol]
        result[name] = {
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            # The widest load and the widest store, the narrower of the two.
            "access_bytes": min(max(loads_of(body), default=0), max(stores_of(body), default=0)),
            "fma": len(re.findall(r"\bfma\.rn\.f(?:32|64)", body)),
            "div_full": len(re.findall(r"\b(?:div|rcp)\.(?:approx|full)", body)),
        }
    return result


def loads_of(body: str) -> list[int]:
    copies = re.findall(r"cp\.async\.c\w\.shared\.global \[%r\d+\], \[%rd\d+\], (\d+)", body)
    return [*map(_width, re.findall(r"ld\.global(\S*)", body)), *map(int, copies)]


def stores_of(body: str) -> list[int]:
    return [_width(suffix) for suffix in re.findall(r"st\.global(\S*)", body)]


def _width(suffix: str) -> int:
    """Bytes of an access such as `.nc.v4.u32`."""
    lanes = int(m.group(1)) if (m := re.search(r"\.v(\d)", suffix)) else 1
    return lanes * int(re.search(r"\.[busf](\d+)", suffix).group(1)) // 8


def rows(architectures=("sm_80", "sm_90", "sm_100"), dtypes=(torch.float32, torch.bfloat16), lengths=(4, 8, 16, 32)) -> list[dict]:
    """One row per compiler, kernel, dtype, T and architecture, such as "sm_90" or 90."""
    from emulation import EmulatedCUDA

    emulated, nvrtc, result = EmulatedCUDA(), _nvrtc(), []
    cases = [(kernel, dtype, steps, *run(kernel, dtype, steps, emulated)) for kernel in KERNELS for dtype in dtypes for steps in lengths]
    for arch in (f"sm_{str(arch).removeprefix('sm_')}" for arch in architectures):
        for compiler, compile_, spell in (("nvcc", ptx_of_nvcc, any_rows), ("nvrtc", lambda n, a: ptx_of_nvrtc(nvrtc, n, a), str)):
            if shutil.which("nvcc" if compiler == "nvcc" else "ptxas") is None or (compiler == "nvrtc" and nvrtc is None):
                continue
            names = sorted({spell(case[4]) for case in cases})
            measured = measure(compile_(names, arch), arch)
            for kernel, dtype, steps, tiles, name, moved, partial in cases:
                per_step, per_neuron = _FEWEST[kernel.split("_")[0]]
                fewest = per_step * dtype.itemsize + per_neuron * 4 / steps
                result.append(
                    {"backend": "cuda", "compiler": compiler, "kernel": f"{kernel}, {compiler}", "dtype": str(dtype).removeprefix("torch.")}
                    | {"T": steps, "arch": int(arch[3:]), "neurons_per_thread": tiles.vector, "shared_bytes": tiles.shared}
                    | measured[spell(name)]
                    | {"bytes_per_step": moved, "fewest_bytes": fewest, "partial_percent": partial}
                    | {"exponential": compiler == "nvcc" and kernel.startswith("backward")}
                )
    return result


if __name__ == "__main__":
    table = rows()
    print(*table[0], sep="\t")
    for row in table:
        print(*row.values(), sep="\t")
