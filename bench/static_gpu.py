"""What the GPU kernels cost, read off compiled code: no GPU is needed.

Every Triton kernel that matters is compiled for each architecture, and registers, spills, widths and counts of memory
accesses, divisions and fused multiply-adds are read from its PTX and its machine code; the CUDA kernels' figures join
the table where `bench/static_cuda.py` is there. Exit status 1 where a claim does not hold.

Bytes per neuron-step are counted, not estimated: every `ld.global` and `st.global` of the PTX is traced back to the
argument it addresses, weighted by its loop's trips, and multiplied by its width. Tables [T, C], scalars and partial
sums are not of the size of x; partial sums are compared with x on their own.

Fused multiply-adds: with `enable_fp_fusion=False` each float operation in the PTX carries `.rn`, which forbids ptxas to
fuse it. The columns count `fma` instructions and operations without `.rn`. Expansions of a quotient happen below the
PTX, in ptxas, and are correctly rounded as a whole, so they count nowhere; only the float64 exponential, of libdevice,
has `fma` in PTX, and no kernel in the table but `backward, exponential` uses it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)  # this is about compiled kernels

import torch  # noqa: E402
from measure import check_outputs, replacing  # noqa: E402
from fastsnn import launch, surrogates  # noqa: E402
from fastsnn.reference import Dynamics, state_dtype  # noqa: E402
from torch import Tensor  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
SHAPE = (128, 64, 32, 32)  # N, C, H, W of the measured layer
#: Arguments of the size of a step of x, or of T steps.
LARGE = {"x", "v0", "spikes", "v_end", "h_out", "states", "g_spikes", "g_v", "g_h_out", "g_x", "g_v0"}
KEYS = ("backend", "compiler", "kernel", "dtype", "T", "arch", "registers", "spill_bytes", "access_bytes", "bytes_per_step", "fewest_bytes", "div_full", "fma")


@dataclass(frozen=True)
class Variant:
    """One kernel to compile: a direction, and what is asked of it."""

    backward: bool
    dtype: str
    steps: int
    statistics: bool = False
    parameters: str = ""  # "", "scalar" or "channel": decay and threshold as tensors that get a gradient
    channels_last: bool = False
    charge: str = "leak"
    fire: str = "ge"
    surrogate: str = "triangle"
    adjoint: str = "bptt"
    launch: int = 0  # of those that the call takes: 1 is the second stage of the statistics

    @property
    def name(self) -> str:
        words = ["backward" if self.backward else "forward"]
        words += ["statistics"] * self.statistics + [f"{self.parameters} parameters"] * bool(self.parameters)
        words += ["channels-last"] * self.channels_last + [self.charge] * (self.charge != "leak") + [self.fire] * (self.fire != "ge")
        words += [self.adjoint] * (self.adjoint != "bptt") + ["second stage"] * (self.launch > 0)
        return ", ".join(words + [self.surrogate] * (self.surrogate != "triangle"))

    @property
    def plain(self) -> Variant:
        return Variant(self.backward, self.dtype, self.steps)

    @property
    def fewest(self) -> float:
        """Bytes per neuron-step that have to move: x, spikes and the state after the last step; or x, g_spikes, g_x."""
        item, state = ITEM[self.dtype], 8 if self.dtype == "float64" else 4
        if self.launch:
            return 0.0
        if self.adjoint != "bptt":  # x and g_spikes read, g_x written; x waits for no second time
            return 3 * item
        if not self.backward:
            return 2 * item + state / self.steps
        kept = math.ceil(self.steps / launch.STATE_INTERVAL) if self.steps > launch.STEPS_IN_REGISTERS else 0
        return 3 * item + state * kept / self.steps


def variants(quick: bool) -> list[Variant]:
    found = []
    if quick:
        return [Variant(b, d, t, s) for d in ("float32", "bfloat16") for t in (4, 16) for b in (False, True) for s in (False, True)]
    for dtype in DTYPES:
        main = dtype in ("float32", "bfloat16")
        for steps in (4, 8, 16, 32, 64) if main else (4, 16):
            found += [Variant(b, dtype, steps) for b in (False, True)]
            if main:
                found += [Variant(b, dtype, steps, statistics=True) for b in (False, True)]
            if main and steps in (4, 16, 32):
                found.append(Variant(True, dtype, steps, parameters="scalar"))
    for dtype in ("float32", "bfloat16"):
        for steps in (4, 16):
            found += [Variant(b, dtype, steps, statistics=True, parameters="channel", channels_last=True) for b in (False, True)]
    for dtype in ("float32", "float64"):
        found += [Variant(b, dtype, 4, charge="leak_input", fire="gaussian", surrogate="softsign") for b in (False, True)]
    found += [Variant(True, dtype, 4, surrogate="exponential") for dtype in ("float32", "float64")]
    for dtype in ("float32", "bfloat16"):
        found += [Variant(b, dtype, 16, fire="gaussian") for b in (False, True)]
        found += [Variant(True, dtype, 4, adjoint=adjoint) for adjoint in ("bptr", "spatial", "hart", "rga")]
        found += [Variant(False, dtype, 4, statistics=True, launch=1), Variant(False, dtype, 4, statistics=True, channels_last=True, launch=1)]
    return sorted(found, key=lambda v: -v.steps * v.backward)  # the slowest first, so that no process ends alone


class _Recorder:
    """A backend that runs nothing."""

    keeps_states = True

    def __init__(self) -> None:
        self.calls = []

    def forward(self, call) -> None:
        self.calls.append(call)

    backward = forward


def recorded(v: Variant):
    """The call of a variant, with tensors that have no memory."""

    def empty(*shape: int, dtype: torch.dtype = DTYPES[v.dtype]) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x = empty(v.steps, *SHAPE)
    if v.channels_last:
        n, c, h, w = SHAPE
        x = empty(v.steps, n, h, w, c).permute(0, 1, 4, 2, 3)
    real = state_dtype(x.dtype)
    p = empty(1, SHAPE[1] if v.parameters == "channel" else 1, dtype=real) if v.parameters else None
    dynamics = Dynamics(v.charge, v.fire, noise=0.5 if v.fire == "gaussian" else 0.0)
    seed = empty(1, dtype=torch.int64) if v.fire == "gaussian" else None
    rows = launch.MEAN | launch.VARIANCE if v.statistics else 0
    recorder = _Recorder()
    f = launch.forward(recorder, x, None, p, p, None, seed, v.steps, dynamics, 2.0, 1.0, statistics=rows, states=v.backward)
    if v.backward:
        kind = {s.name: s for s in (surrogates.Triangle, surrogates.Exponential, surrogates.SoftSign)}[v.surrogate]
        surrogate = kind(2.0) if v.surrogate == "softsign" else kind(1.0, 1.0)
        gradients = launch.Gradients(spikes=torch.empty_like(x), table=empty(4, v.steps, SHAPE[1], dtype=torch.float64) if v.statistics else None)
        mean = f.table[0] if v.statistics else None
        needs = (True, False, bool(v.parameters), bool(v.parameters), False)
        launch.backward(recorder, gradients, x, None, p, p, None, seed, f.states, mean, v.steps, dynamics, surrogate, v.adjoint, 2.0, 1.0, needs, rows)
    return recorder.calls[-1]


def source(plans, launch: int, tensors: dict[str, Tensor]):
    """A kernel and what its arguments are, as the just-in-time compiler would see them; and the names of its arguments."""
    from triton.compiler import ASTSource

    from fastsnn.kernels import lif_triton

    plan = plans[launch]
    # A second stage reads what the first one wrote.
    scratch = {name: torch.empty(shape, dtype=dtype, device="meta") for one in plans for name, (shape, dtype) in one.scratch.items()}
    values = lif_triton.arguments(plan, tensors, scratch)
    signature, constants, attributes, names = {}, {}, {}, []
    for place, parameter in enumerate(plan.kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or value == () or (type(value) is int and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        names.append(name)
        if isinstance(value, Tensor):
            signature[name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp64"
        elif isinstance(value, tuple):  # of numbers: how a place in memory becomes an index
            signature[name] = tuple("i32" if number < 2**31 else "i64" for number in value)
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(plan.kernel, signature, constants, attributes), names


@dataclass
class Accesses:
    """Bytes per thread to each argument, and the widest access."""

    bytes_to: dict[str, int] = field(default_factory=dict)
    widest: int = 0


def accesses(ptx: str, names: list[str], trips: int) -> Accesses:
    """Global accesses of a kernel, by argument; those inside its loop count `trips` times."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line[:-1].split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L__BB") and ":" in line}
    loops = []
    for i, line in enumerate(lines):
        jump = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if jump and labels[jump[1]] < i:
            loops.append((labels[jump[1]], i))
    origin: dict[str, str] = {}
    result = Accesses()
    for i, line in enumerate(lines):
        line = re.sub(r"^@!?%p\d+\s+", "", line)
        if argument := re.match(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            if int(argument[2]) < len(names):
                origin[argument[1]] = names[int(argument[2])]
            continue
        if move := re.match(r"(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", line):
            address = re.search(r"\[\s*(%rd\d+)", line)[1]
            width = int(move[2] or 1) * int(move[3]) // 8
            name = origin[address]
            weight = trips if any(a < i < b for a, b in loops) else 1
            result.bytes_to[name] = result.bytes_to.get(name, 0) + weight * width
            if name in LARGE:
                result.widest = max(result.widest, width)
            continue
        if step := re.match(r"(?:add|sub|mad|mov|cvta|selp)\S*\s+(%rd\d+), (.*);", line):
            known = [origin[r] for r in re.findall(r"%rd\d+", step[2]) if r in origin and origin[r] != "x_stride"]
            if known:
                origin[step[1]] = known[0]
    return result


def measure(v: Variant, arch: int) -> dict:
    """Compile one variant for one architecture and read its figures."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastsnn.kernels import lif_triton

    call = recorded(v)
    plans = lif_triton.plans(call)[1]
    plan = plans[v.launch]
    code, names = source(plans, v.launch, call.tensors)
    kernel = triton.compile(code, target=GPUTarget("cuda", arch, 32), options={"num_warps": plan.warps, "enable_fp_fusion": False})
    ptx = kernel.asm["ptx"]
    whole = plan.constants.get("LENGTH" if v.backward and v.adjoint == "bptt" else "CHUNK", v.steps)
    trips = -(-v.steps // whole)
    found = accesses(ptx, names, trips)
    per_thread = plan.tiling.R * plan.tiling.W / (32 * plan.warps) * v.steps
    partial = sum(math.prod(shape) * dtype.itemsize for shape, dtype in plan.scratch.values())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = usage.stdout + usage.stderr
    return {
        "backend": "triton",
        "compiler": f"triton {triton.__version__}",
        "kernel": v.name,
        "dtype": v.dtype,
        "T": v.steps,
        "arch": arch,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "access_bytes": found.widest,
        "bytes_per_step": sum(size for name, size in found.bytes_to.items() if name in LARGE) / per_thread,
        "fewest_bytes": v.fewest,
        "div_full": len(re.findall(r"\bdiv\.(?:full|approx)", ptx)),
        "fma": len(re.findall(r"\bfma\.", ptx)) + len(re.findall(r"\b(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64)\b", ptx)),
        "partial_percent": 100 * partial / (math.prod(SHAPE) * v.steps * ITEM[v.dtype]),
        "exponential": v.surrogate == "exponential",
    }


def claims(rows: list[dict]) -> list[tuple[str, list[str]]]:
    """Each claim, and the rows that break it."""

    def name(row: dict) -> str:
        return f"{row['backend']} {row['kernel']} {row['dtype']} T={row['T']} sm_{row['arch']}"

    def broken(rule) -> list[str]:
        return [name(row) for row in rows if not rule(row)]

    plain = {(r["backend"], r["dtype"], r["T"], r["arch"], r["kernel"]): r for r in rows}

    def adds_nothing(row: dict) -> bool:
        if "statistics" not in row["kernel"] or "second stage" in row["kernel"]:
            return True
        base = plain.get((row["backend"], row["dtype"], row["T"], row["arch"], row["kernel"].split(",")[0].split(" + ")[0]))
        return base is None or row["bytes_per_step"] is None or abs(row["bytes_per_step"] - base["bytes_per_step"]) < 1e-9

    def fewest(row: dict) -> bool:
        return row["bytes_per_step"] is None or row["fewest_bytes"] is None or abs(row["bytes_per_step"] - row["fewest_bytes"]) < 1e-9

    return [
        ("no spills", broken(lambda r: not r["spill_bytes"])),
        ("bytes = fewest", broken(fewest)),
        ("no div.full", broken(lambda r: not r["div_full"])),
        ("no fused multiply-add", broken(lambda r: not r["fma"] or r.get("exponential"))),
        ("statistics add 0 bytes of x's size", broken(adds_nothing)),
        ("partial sums at most 5 % of x", broken(lambda r: r.get("partial_percent", 0) <= 5)),
    ]


def line(row: dict) -> str:
    def cell(key: str, width: int, form: str = "") -> str:
        value = row[key]
        return f"{'-' if value is None else format(value, form):>{width}}"

    return (
        f"{row['backend']:7} {row['kernel']:48} {row['dtype']:9}{row['T']:3} sm_{row['arch']:<4}"
        f"{cell('registers', 5)}{cell('spill_bytes', 7)}{cell('access_bytes', 7)}{cell('bytes_per_step', 9, '.3f')}{cell('fewest_bytes', 9, '.3f')}"
        f"{cell('div_full', 5)}{cell('fma', 5)}"
    )


def table(rows: list[dict]) -> str:
    head = f"{'backend':7} {'kernel':48} {'dtype':9}{'T':>3} {'arch':7}{'regs':>5}{'spill':>7}{'widest':>7}{'B/step':>9}{'fewest':>9}{'div~':>5}{'fma':>5}"
    order = sorted(rows, key=lambda r: (r["backend"], r["kernel"], r["dtype"], r["T"], r["arch"]))
    return "\n".join([head, *map(line, order)])


def cuda_rows(architectures: list[int]) -> list[dict]:
    """The CUDA kernels' rows, from the script beside this one."""
    path = Path(__file__).with_name("static_cuda.py")
    if not path.exists():
        return []
    spec = importlib.util.spec_from_file_location("static_cuda", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["static_cuda"] = module
    spec.loader.exec_module(module)
    rows = list(module.rows(architectures))
    for row in rows:
        if missing := [key for key in KEYS if key not in row]:
            raise ValueError(f"static_cuda.rows: a row lacks {', '.join(missing)}; got {row}.")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", help="compute capabilities times ten (default: 80 90 100; with --quick: 90)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    parser.add_argument("--quick", action="store_true", help="float32 and bfloat16 at T 4 and 16 only")
    parser.add_argument("--backend", choices=("triton", "cuda", "all"), default="all")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default 2)")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: wanted at least 1")
    check_outputs(parser, options.json)
    architectures = options.arch or ([90] if options.quick else [80, 90, 100])
    rows, start = [], time.time()
    if options.backend != "cuda":
        jobs = [(v, arch) for v in variants(options.quick) for arch in architectures]
        # Spawned, not forked: torch has threads by now.
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            for done, job in enumerate(as_completed([pool.submit(measure, *job) for job in jobs]), 1):
                rows.append(job.result())
                if sys.stderr.isatty() or done % 20 == 0 or done == len(jobs):
                    print(f"\r{done} of {len(jobs)} kernels, {time.time() - start:.0f} s", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    if options.backend != "triton":
        rows += cuda_rows(architectures)
    print(table(rows))
    print()
    verdicts = claims(rows)
    for claim, broken in verdicts:
        print(f"{claim}: {'holds' if not broken else f'broken by {len(broken)} of {len(rows)}'}")
        for name in broken:
            print(f"    {name}")
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps({"rows": rows, "claims": {claim: broken for claim, broken in verdicts}}, indent=1) + "\n")
    return int(any(broken for _, broken in verdicts))


if __name__ == "__main__":
    sys.exit(main())
