"""Breaks the kernels on purpose, one line at a time, and checks that the tests see it.

    python tests/mutations.py [--list] [--only N ...]

Each mutation is applied to a copy of the sources, built for one instruction set without optimisation to speak of, and
has to fail a short selection of tests which passes on the sources as they are. Exits with 1 if a mutation survives, or
if its text is no longer in the sources.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "_mutated_cpu.so"
COMPILE = ("-std=gnu++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-DLIF_ISA=baseline", "-DLIF_FEW")
#: Per backend: test files, a -k expression, and the cases of the property tests.
SELECTION = {
    "cpu": (("tests/test_properties.py", "tests/test_laws.py", "tests/test_short_way.py"), "(cpu or threads or short_way or hard_membranes) and not instruction", 320),
    "cuda": (("tests/test_properties.py", "tests/test_laws.py"), "cuda and (reference or far_from or repeated)", 160),
    "triton": (("tests/test_properties.py", "tests/test_laws.py"), "triton and (reference or far_from)", 64),
}


@dataclass(frozen=True)
class Mutation:
    what: str
    file: str
    old: str
    new: str
    backend: str = "cpu"


MUTATIONS = [
    Mutation(">= turned to >", "lif.def", "FIRE(ge,       z >= lit(0.0))", "FIRE(ge,       z > lit(0.0))"),
    Mutation("hard reset forgets v_reset", "lif.def", "h * (lit(1.0) - s) + r * s,", "h * (lit(1.0) - s),"),
    Mutation("soft reset passes no gradient to the spike", "lif.def", "lit(1.0),           lit(0.0) - threshold, g_v * s)", "lit(1.0),           lit(0.0), g_v * s)"),
    Mutation("soft reset drops its threshold term", "lif.def", "lit(0.0) - threshold, g_v * s)", "lit(0.0) - threshold, lit(0.0))"),
    Mutation("delayed reset at >= the threshold", "lif.h", "(v - threshold > real(0)) ? real(1)", "(v - threshold >= real(0)) ? real(1)"),
    Mutation("gaussian surrogate with the wrong sign of the mean", "lif.def", "divide(z - b, a) * divide(z - b, a)", "divide(z + b, a) * divide(z + b, a)"),
    Mutation("gradient of tau with the wrong sign", "lif.def", "divide((v - r) - x, p * p)", "divide(x - (v - r), p * p)"),
    Mutation("relative surrogate without the chain rule", "lif.h", "surrogate_plain(surrogate, z / threshold, a, b) / threshold :", "surrogate_plain(surrogate, z / threshold, a, b) :"),
    Mutation("reset not detached in sums", "lif.h", "return detach || reset == reset_none", "return reset == reset_none"),
    Mutation("reset not detached in the recurrence", "lif_cpu.cpp", "real g_spike = detach ? g_s[i] : through;", "real g_spike = through;"),
    Mutation("guard's slope with the wrong power", "lif.h", "real size = power == 2 ? real(2) * room : real(1);", "real size = power == 2 ? room : real(1);"),
    Mutation("wrong Philox constant", "lif.h", "u64(0xCD9E8D57u) * c2", "u64(0xCD9E8D59u) * c2"),
    Mutation("noise keyed by the place in memory", "lif.h", "if (p.rank == 0) return u64(i);", "return u64(i);"),
    Mutation("gain dropped from the gradient of x", "lif_cpu.cpp", "g[i] = g[i] * gain;", "g[i] = g[i];"),
    Mutation("gradient of v0 never written", "lif_cpu.cpp", "if (exact && p.g_v0)", "if (false && exact && p.g_v0)"),
    Mutation("constant current takes the last step only", "lif_cpu.cpp", "sum[i] += g[i];", "sum[i] = g[i];"),
    Mutation("hart sums where it should average", "lif_cpu.cpp", "weight[i] = weight[i] / real(T);", ""),
    Mutation("rate never written", "cpu_sums.h", "rate[at + k] += from.rate[k];", ";"),
    Mutation("mean without the shift", "cpu_sums.h", "to[k] += from.shift[k] * count[k] + from.sum[k];", "to[k] += from.sum[k];"),
    Mutation("elements of a channel cut by a unit's ends not counted", "cpu_memory.h", "periods * inner + before(end, k) - before(begin, k)", "periods * inner"),
    Mutation("rows of a repeated call not rounded", "dispatch.cpp", "if (!failed) round_rows(*p);", ""),
    Mutation("a repeated call's gradient of the variance halved", "dispatch.cpp", "(row == 1 ? 2.0 : 1.0)", "1.0"),
    Mutation("sums of a cut channel taken from the next one", "cpu_sums.h", "unit.plan.inner - unit.column(a) % unit.plan.inner;", "unit.plan.inner;"),
    Mutation("sums taken from 0, not from near the mean", "cpu_sums.h", "const real m = c < low ? low : (c > high ? high : c);", "const real m = real(0);"),
    Mutation("mean of the backward pass in single precision", "cpu_sums.h", "real(mean - double(high))", "real(0)"),
    Mutation("wrong channel of a parameter", "cpu_memory.h", "in[t * columns + unit.column(i) / inner]", "in[t * columns + unit.column(i) % columns]"),
    Mutation("last, shorter run dropped", "cpu_memory.h", "plan.rows = ceil_div(p.count, plan.run);", "plan.rows = p.count / plan.run > 0 ? p.count / plan.run : 1;"),
    Mutation("short way: mean not summed", "cpu_plain.h", "sums[place] = sums[place] + d;", ""),
    Mutation("short way: the last few left out of a variance", "cpu_plain.h", "square = square_added(d, square);", ""),
    Mutation("short way: statistics dropped from the gradient", "cpu_plain.h", "g, s, slope, extra);", "g, s, slope, zero);"),
    Mutation("short way: reset not detached", "cpu_plain.h", "spike_gradient(reset, detach, direct,", "spike_gradient(reset, false, direct,"),
    Mutation("short way: places of a round share a shift", "cpu_plain.h", "d = z - get<value>(shift + i);", "d = z - get<value>(shift);"),
    Mutation("short way: statistics by place of the wrong place", "cpu_plain.h", "slope_i = get<value>(places.slope + i)", "slope_i = get<value>(places.slope)"),
    Mutation("random numbers of every run those of the first", "cpu_random.h", "lanes[k] = u64(offset + k);", "lanes[k] = u64(k);"),
    Mutation("random numbers: places not counted back", "cpu_random.h", "found -= u64((p.order_size[k] - 1) * p.order_stride[k]);", ""),
    Mutation("sums of a place not added up in double", "cpu_sums.h", "to[i] += double(sums.sum[i]);", ""),
    Mutation("short way: v_reset forgotten", "cpu_plain.h", "next_state(reset, h, s, theta, value(0), r)", "next_state(reset, h, s, theta, value(0), value(0))"),
    Mutation("short way: every second register left out", "cpu_vector.h", "work(i + Vector::lanes, 1, Vector());", ""),
    Mutation("short way: the last few left out", "cpu_vector.h", "    for (; i < length; ++i) work(i, 0, float());\n}", "}"),
    Mutation("cuda: wrong channel of a thread", "cuda_neurons.h", "place.channel = quotient(place.column, p.inner);", "place.channel = place.column % p.channels;", "cuda"),
    Mutation("cuda: half a warp left out of a sum", "cuda_sums.h", "for (int far = 16; far > 0; far /= 2) sum +=", "for (int far = 8; far > 0; far /= 2) sum +=", "cuda"),
    Mutation("cuda: neighbouring channels share a parameter", "cuda_neurons.h", "by_channel ? g.channel_step : 1;", "by_channel ? 0 : 1;", "cuda"),
    Mutation("triton: variance not centred", "lif_triton_kernels.py", "fold(COLUMNS, wide * wide) - inside * mean * mean", "fold(COLUMNS, wide * wide)", "triton"),
    Mutation("triton: gain dropped from the gradient of x", "lif_triton_kernels.py", "g_current = g_current * tl.load(gain + t)", "g_current = g_current", "triton"),
    Mutation("triton: first_step forgotten", "lif_triton_kernels.py", "tl.cast(first_step, tl.int64) + t", "tl.cast(t, tl.int64)", "triton"),
]  # fmt: skip


def copy_sources(to: Path) -> None:
    for name in ("kernels", "fastsnn", "tests"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "pytest.ini", "setup.cfg"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to / name)


def run(command: list[str], where: Path, limit: float = 900) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=limit)
    return done.returncode, done.stdout + done.stderr


def build(where: Path) -> None:
    """The CPU kernels of a copy; raises where they do not compile."""
    code, text = run([os.environ.get("CXX", "g++"), *COMPILE, "kernels/lif_cpu.cpp", "kernels/dispatch.cpp", "-o", LIBRARY], where)
    if code:
        raise RuntimeError(f"does not compile:\n{text}")


def select(where: Path, backend: str, without: list[str], stop: bool) -> tuple[int, list[str], str]:
    """Runs the selection of a backend; the exit status, the tests that failed, and the output."""
    files, expression, cases = SELECTION[backend]
    options = ["-q", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-profile=mutations", f"--cases={cases}", f"--cpu-library={where / LIBRARY}"]
    options += ["-x"] * stop + [f"--deselect={test}" for test in without]
    code, text = run([sys.executable, "-m", "pytest", *files, "-k", expression, *options], where)
    return code, re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M), text


def unmutated(backends: set[str]) -> dict[str, list[str] | None]:
    """What fails of each selection before anything is broken: nothing, or the table proves little. None: all of it."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy_sources(where)
        build(where)
        code, text = run([sys.executable, "-c", "import fastsnn; print(fastsnn.__file__)"], where)
        assert text.strip().startswith(str(where)), f"the copy is not what is imported: {text}"
        failing = {}
        for backend in sorted(backends):
            code, failed, text = select(where, backend, [], stop=False)
            if code not in (0, 1):
                print(f"  the selection for {backend} does not run, status {code}:\n{text[:2000]}", flush=True)
            failing[backend] = failed if code in (0, 1) else None
        return failing


def try_one(mutation: Mutation, without: list[str] | None) -> tuple[bool, str]:
    """Whether the mutation was caught, and by what; without: the tests that fail anyway."""
    if without is None:
        return False, "its tests do not even run on the sources as they are"
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy_sources(where)
        path = where / "kernels" / mutation.file
        text = path.read_text() if path.exists() else ""
        if mutation.old not in text:
            return False, f"its text is not in kernels/{mutation.file}"
        path.write_text(text.replace(mutation.old, mutation.new))
        try:
            if mutation.backend == "cpu":
                build(where)
            else:  # the property tests of others never load it
                (where / LIBRARY).touch()
            code, failed, text = select(where, mutation.backend, without, stop=True)
        except RuntimeError as error:
            return False, str(error)
        except subprocess.TimeoutExpired:
            return True, "a test that never ended"
        if code == 0:
            return False, "survived"
        # A crash of the interpreter counts: nobody would miss it.
        if code not in (1, 2) and code >= 0:
            return False, f"pytest ended with {code}:\n{text[-2000:]}"
        return True, failed[0].removeprefix("tests/") if failed else "a crash"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="try these alone")
    arguments = parser.parse_args()
    chosen = [(n, m) for n, m in enumerate(MUTATIONS) if arguments.only is None or n in arguments.only]
    if arguments.list:
        for n, mutation in chosen:
            print(f"{n:3}  {mutation.file:24} {mutation.what}")
        return 0
    start = time.monotonic()
    print("the sources as they are ...", flush=True)
    failing = unmutated({mutation.backend for _, mutation in chosen})
    broken = [test for tests in failing.values() for test in tests or ()]
    for test in broken:
        print(f"  fails without a mutation, and is left out: {test}")
    results = {}

    def attempt(entry: tuple[int, Mutation]) -> None:
        n, mutation = entry
        results[n] = try_one(mutation, failing[mutation.backend])
        caught, how = results[n]
        print(f"[{len(results)}/{len(chosen)}, {time.monotonic() - start:.0f} s] {n:3} {'caught' if caught else 'NOT CAUGHT'}: {mutation.what}", flush=True)

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(attempt, chosen))
    print(f"\n{'':3}  {'mutation':52} caught by")
    for n, mutation in chosen:
        caught, how = results[n]
        print(f"{n:3}  {mutation.what:52} {how if caught else 'NOTHING: ' + how}")
    survivors = sum(not caught for caught, _ in results.values())
    print(f"{len(chosen) - survivors} of {len(chosen)} caught, {len(broken)} tests failed before, {time.monotonic() - start:.0f} s")
    return 1 if survivors or broken else 0


if __name__ == "__main__":
    sys.exit(main())
