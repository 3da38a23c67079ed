"""Compiles the GPU kernels of drawn cases for a GPU that need not be here.

    python tests/compile_cases.py [--backend triton cuda] [--cases N] [--arch 90] [--jobs N]

The interpreter and the emulation run much that a compiler refuses. Here the cases of the property tests go the way that
they go on a GPU, through Triton's own just-in-time compiler and through NVRTC, up to machine code; only the launch is
left out, and nothing is said about results. Prints what took longest; the exit status is 1 if a case did not compile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Cases of one piece of work: small, so that progress shows and no process ends alone.
PIECE = 5


@dataclass
class Found:
    """What compiling some cases gave."""

    cases: int = 0
    seconds: list[tuple[float, str]] = field(default_factory=list)  # of each kernel, with its case
    failures: list[str] = field(default_factory=list)


def triton_compiler(arch: int, found: Found, name_case):
    """Makes Triton's backend compile where it would launch."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:
        """Stands for the GPU: the compiler asks it for the target alone."""

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())
    from fastsnn.kernels import lif_triton

    def launch(plan, tensors, scratch, device) -> None:
        scratch.update((name, torch.empty(shape, dtype=dtype)) for name, (shape, dtype) in plan.scratch.items())
        values, begin = lif_triton.arguments(plan, tensors, scratch), time.perf_counter()
        plan.kernel.warmup(**values, grid=plan.grid, num_warps=plan.warps, enable_fp_fusion=False)
        found.seconds.append((time.perf_counter() - begin, f"{plan.kernel.fn.__name__}, {name_case()}"))

    lif_triton._launch, lif_triton._place = launch, lambda device: nullcontext()
    lif_triton.missing, lif_triton.refuses = lambda: None, lambda x: None


def cuda_compiler(arch: int, found: Found, name_case):
    """Makes the CUDA backend compile by NVRTC where it would launch; each kernel once."""
    sys.path.insert(0, str(ROOT / "bench"))
    import static_cuda
    from fastsnn import backends, cuda

    library, seen = static_cuda._nvrtc(), set()
    if library is None:
        sys.exit("compile_cases: there is no NVRTC; install it: pip install nvidia-cuda-nvrtc, or leave out --backend cuda.")

    class Compiler:
        def launch(self, tiles, call, problem, stream) -> None:
            name = cuda.kernel_name(tiles, call)
            if name not in seen:
                seen.add(name)
                begin = time.perf_counter()
                static_cuda.ptx_of_nvrtc(library, [name], f"sm_{arch}")
                found.seconds.append((time.perf_counter() - begin, f"{name}, {name_case()}"))

    class Backend(cuda.Launcher):
        def missing(self) -> None:
            return None

        def refuses(self, x) -> None:
            return None

    backends.BACKENDS["cuda"] = Backend(Compiler())


def compile_piece(backend: str, seed: int, wanted: int, arch: int) -> Found:
    """Compile `wanted` cases, drawn from a seed, in this process."""
    import cases
    import hypothesis
    import torch

    torch.set_num_threads(1)
    found, current = Found(), []

    def name_case() -> str:
        c = current[-1]
        return f"T = {c.steps}, {str(c.dtype)[6:]}, {c.charge}, {c.fire}, {c.reset}, {c.surrogate}, decay {c.decay_form}, threshold {c.threshold_form}, adjoint {c.adjoint}"

    {"triton": triton_compiler, "cuda": cuda_compiler}[backend](arch, found, name_case)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=wanted, deadline=None, database=None, phases=(hypothesis.Phase.generate,), suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=cases.cases())
    def compiles(case):
        found.cases += 1
        current.append(case)
        inputs = cases.build(case)
        try:
            cases.gradients(case, inputs, cases.call(case, inputs, backend), 0)
        except Exception as error:
            found.failures.append(f"{backend}: {case}\n    {type(error).__name__}: {str(error)[:2000]}")

    compiles()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=("triton", "cuda"), default=["triton"], help="default triton; cuda needs NVRTC: pip install nvidia-cuda-nvrtc")
    parser.add_argument("--cases", type=int, default=40, metavar="N", help="cases of each backend (default 40; some 4 CPU seconds each)")
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten (default 90)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds draw other cases (default 0)")
    options = parser.parse_args()
    if options.cases < 1 or options.jobs < 1:
        parser.error("--cases and --jobs must be at least 1")
    os.environ.pop("TRITON_INTERPRET", None)  # this is about compiled kernels
    failed = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what another run compiled is compiled again
        for backend in options.backend:
            sizes = [min(PIECE, options.cases - first) for first in range(0, options.cases, PIECE)]
            start, total = time.time(), Found()
            # Spawned, not forked: torch has threads by now.
            with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
                jobs = [pool.submit(compile_piece, backend, options.seed * 10**6 + piece, size, options.arch) for piece, size in enumerate(sizes)]
                for job in as_completed(jobs):
                    found = job.result()
                    total.cases += found.cases
                    total.seconds += found.seconds
                    total.failures += found.failures
                    print(f"\r{backend}: {total.cases} of {options.cases} cases, {len(total.seconds)} kernels, {len(total.failures)} failures, {time.time() - start:.0f} s", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            for failure in total.failures:
                print(f"FAILED {failure}")
            spent = sorted(total.seconds, reverse=True)
            print(f"{backend}, sm_{options.arch}: {total.cases} cases, {len(spent)} kernels compiled, {len(total.failures)} cases failed; {sum(s for s, _ in spent):.0f} s of compilation, the longest:")
            for seconds, what in spent[:5]:
                print(f"  {seconds:6.1f} s  {what}")
            failed += len(total.failures) or total.cases < options.cases
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
