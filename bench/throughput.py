"""How fast the LIF layer is, against SpikingJelly, snnTorch, a plain PyTorch loop, and a copy of its input.

    python bench/throughput.py --quick
    python bench/throughput.py --json bench/results/throughput.json --plot throughput.png
    python bench/throughput.py --table bench/results/throughput.json

Every competitor is first checked against the reference, spikes, state and gradient; one that fails is not timed, and
the exit status is 1. Then all are timed in turns within one run, beside a copy of x into a tensor that exists already.
Times include what a user pays: the allocation of the results, the launches, autograd.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import measure
import show

if importlib.util.find_spec("fastsnn") is None:  # a checkout that is not installed
    sys.path.insert(0, str(measure.ROOT))

import fastsnn
import peers

CHANNELS = BATCH = 64
#: |gradient - reference| / |reference|; low precision rounds the result itself.
GRADIENT_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
#: A spike that differs must have its membrane within this many ulp of the threshold.
BAND_ULP = 8
#: Above this many competitor-seconds a competitor gets no further samples, once it has three.
SECONDS_EACH = 20.0
QUICK_SECONDS_EACH = 3.0
LEAST_SAMPLES = 3
QUICK_COMPILE_STEPS = 4
KEEPS = """Memory: every allocation of torch's CPU allocator, from the profiler. fastsnn keeps the blocks of large results for its next ones, so
no page is mapped twice: the rows `fresh` allocate anew each time, as all the others do."""


@dataclass
class Case:
    """One configuration and its inputs; more than one copy of them where a cache would hold one."""

    steps: int
    neurons: int
    dtype: str
    device: str

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inner = self.neurons // (BATCH * CHANNELS)
        shape = (self.steps, BATCH, CHANNELS, inner)
        dtype = getattr(torch, self.dtype)

        def draw(shift: float) -> Tensor:
            # One step at a time: the float32 draw of a large low-precision x would not fit beside it.
            out = torch.empty(shape, dtype=dtype, device=self.device)
            for step in out:
                step.copy_(torch.randn(shape[1:], generator=generator) + shift)
            return out

        x, g = draw(0.5), draw(0.0)
        copies = 1
        if self.device == "cuda":
            # Together they exceed the cache four times, so that none is found in it again.
            copies = min(1024, max(1, -(-4 * torch.cuda.get_device_properties(0).L2_cache_size // (x.numel() * x.element_size()))))
        self.x = [x.clone() for _ in range(copies)] if copies > 1 else [x]
        self.g = [g.clone() for _ in range(copies)] if copies > 1 else [g]
        self.leaves = [x.detach().requires_grad_() for x in self.x]
        self.turn = 0
        # Statistics average over this many elements; gradients of that size make their part of the result visible.
        each = BATCH * inner
        self.g_statistics = tuple(0.1 * each * torch.randn(self.steps, CHANNELS, generator=generator).to(self.device) for _ in range(2))

    @property
    def elements(self) -> int:
        return self.x[0].numel()

    def next(self) -> int:
        self.turn = (self.turn + 1) % len(self.x)
        return self.turn

    def __str__(self) -> str:
        return f"T = {self.steps}, {self.neurons:,} neurons, {self.dtype}"


def run_inference(forward: peers.Forward, case: Case) -> peers.Output:
    with torch.no_grad():
        return forward(case.x[case.next()])


def run_forward(forward: peers.Forward, case: Case) -> peers.Output:
    return forward(case.leaves[case.next()])


def run_training(forward: peers.Forward, case: Case) -> tuple[peers.Output, Tensor]:
    turn = case.next()
    x = case.leaves[turn]
    out = forward(x)
    outputs, grads = [out.spikes], [case.g[turn].to(out.spikes.dtype)]
    for value, grad in zip(out.statistics, case.g_statistics):
        outputs.append(value)
        grads.append(grad.to(value.dtype))
    (g_x,) = torch.autograd.grad(outputs, [x], grads)
    return out, g_x


RUNS = {"inference": run_inference, "training": run_training}


@dataclass
class Expected:
    """What the reference computes for a case."""

    spikes: Tensor
    v: Tensor
    z: Tensor  # membrane minus threshold
    g_x: dict[bool, Tensor]  # without and with a gradient into the statistics
    statistics: tuple[Tensor, Tensor]


def expect(case: Case) -> Expected:
    """The reference, a few channels at a time: its graph takes some fifteen times the memory of x."""
    width = max(1, min(CHANNELS, 2**26 // max(1, case.elements // CHANNELS)))
    parts = []
    for start in range(0, CHANNELS, width):
        at = slice(start, start + width)
        x = case.x[0][:, :, at].contiguous().requires_grad_()
        out = fastsnn.lif(
            x, decay=peers.DECAY, threshold=peers.THRESHOLD, reset="hard", surrogate=fastsnn.surrogates.ATan(peers.ALPHA),
            statistics=("mean", "var"), keep=("membrane",), backend="reference",
        )
        g = case.g[0][:, :, at].to(out.spikes.dtype)
        moments = (out.statistics.mean, out.statistics.var)
        (plain,) = torch.autograd.grad(out.spikes, x, g, retain_graph=True)
        (both,) = torch.autograd.grad([out.spikes, *moments], x, [g, *(s[:, at].to(m.dtype) for s, m in zip(case.g_statistics, moments))])
        parts.append((out.spikes.detach(), out.v.detach(), out.membrane.detach() - peers.THRESHOLD, plain, both, *(m.detach() for m in moments)))
    dims = (2, 1, 2, 2, 2, 1, 1)
    spikes, v, z, plain, both, mean, var = (torch.cat(values, dim) for values, dim in zip(zip(*parts), dims))
    return Expected(spikes, v, z, {False: plain, True: both}, (mean, var))


def check(competitor: peers.Competitor, forward: peers.Forward, case: Case, expected: Expected) -> tuple[str, int, float]:
    """(what is wrong, or nothing; neurons whose spikes differ; the band they had to be in)."""
    case.turn = len(case.x) - 1  # the next is the first
    out, g_x = run_training(forward, case)
    with torch.no_grad():
        case.turn = len(case.x) - 1
        plain = run_inference(forward, case)
        if not torch.equal(plain.spikes, out.spikes):
            return "spikes under no_grad differ from those with gradients", 0, 0.0
        spikes = out.spikes.to(expected.spikes.dtype)
        wrong = spikes != expected.spikes
        flips = int(wrong.any(0).sum())
        eps = torch.finfo(torch.float32 if case.dtype != "float64" else torch.float64).eps
        band = BAND_ULP * eps * max(1.0, peers.THRESHOLD)
        if competitor.ours:
            if flips:
                return f"{flips} neurons spike otherwise than in the reference", flips, 0.0
            if not torch.equal(out.v, expected.v):
                return f"the final state differs in {int((out.v != expected.v).sum())} neurons", 0, 0.0
        elif flips:
            # After its first wrong spike a neuron rightly goes another way.
            first = wrong & (wrong.cumsum(0) == 1)
            far = expected.z[first].abs().max().item()
            if far > band:
                return f"a spike differs {far:.1e} from the threshold; allowed are {band:.1e}", flips, band
        same = ~wrong.any(0)
        apart = (out.v - expected.v).abs()[same].max().item()
        if not apart <= 1e3 * eps:
            return f"the final state is off by {apart:.1e}", flips, band
        wanted = expected.g_x[competitor.statistics]
        error = (((g_x - wanted).float() * same).norm() / (wanted.float() * same).norm()).item()
        if not error <= GRADIENT_TOLERANCE[case.dtype]:
            return f"the gradient of x is off by {error:.1e} of its norm; allowed are {GRADIENT_TOLERANCE[case.dtype]:.0e}", flips, band
        for name, value, want in zip(("mean", "var"), out.statistics, expected.statistics):
            error = ((value - want).abs() / expected.statistics[1].sqrt()).max().item()
            if not error <= 1e-5:
                return f"the {name} is off by {error:.1e} standard deviations", flips, band
    return "", flips, band


def fewest_bytes(case: Case) -> dict[str, float]:
    """Bytes per neuron-step that no implementation can avoid, by mode; the copy moves 2 elements."""
    element = case.x[0].element_size()
    state = 8 if case.dtype == "float64" else 4
    forward = 2 * element + state / case.steps
    return {"inference": forward, "training": forward + 3 * element}


def derive(case: Case, samples: list[float], copy: float, floor: float) -> dict[str, float]:
    per = 1e9 / case.elements
    p20, median, p80 = measure.spread(samples)
    return {
        "seconds": median,
        "ns": median * per,
        "ns_p20": p20 * per,
        "ns_p80": p80 * per,
        "copies": median / copy,
        "gb_per_s": floor / (median * per),
        "percent_of_copy": 100 * floor / (median * per) / (2 * case.x[0].element_size() / (copy * per)),
        "best_other_over_this": None,
    }


def time_all(ready: dict[str, peers.Forward], fresh: set[str], case: Case, clock: measure.Clock, repeat: int, quick: bool, progress) -> dict[tuple[str, str], list[float]]:
    """Seconds per call by (competitor, mode): in each round every competitor runs once, from another start."""
    target = torch.empty_like(case.x[0])
    jobs = {("copy", "inference"): lambda: target.copy_(case.x[case.next()])}
    for name, forward in ready.items():
        for mode, run in RUNS.items():
            jobs[name, mode] = lambda run=run, forward=forward: run(forward, case)
            if name in fresh:
                jobs[name, mode] = peers.fresh_memory()(jobs[name, mode])
    calls = {key: clock.calls(job) for key, job in jobs.items()}
    allowed = (QUICK_SECONDS_EACH if quick else SECONDS_EACH) / len(RUNS)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    spent = dict.fromkeys(jobs, 0.0)
    keys = list(jobs)
    for turn in range(repeat):
        gc.collect()
        start = turn % len(keys)
        for key in keys[start:] + keys[:start]:
            if len(samples[key]) >= LEAST_SAMPLES and spent[key] > allowed:
                continue
            progress(f"{case}: timing", f"round {turn + 1} of {repeat}, {key[0]} {key[1]}")
            begin = time.perf_counter()
            samples[key].append(clock.sample(jobs[key], calls[key]))
            spent[key] += time.perf_counter() - begin
    return samples


@peers.fresh_memory()  # the profiler sees torch's allocator only; what is live, and when, is the same
def per_neuron_step(forward: peers.Forward, case: Case) -> dict[str, float]:
    live, _ = measure.memory(lambda: run_forward(forward, case), case.device)
    _, peak = measure.memory(lambda: run_training(forward, case), case.device)
    _, inference = measure.memory(lambda: run_inference(forward, case), case.device)
    return {"inference_peak": inference / case.elements, "live_after_forward": live / case.elements, "training_peak": peak / case.elements}


def measure_case(case: Case, chosen: list[peers.Competitor], options, progress) -> list[dict]:
    """The rows of one configuration."""
    clock = measure.Clock(case.device)
    torch.compiler.reset()  # past eight shapes a function would silently stop being compiled
    rows, ready = {}, {}
    progress(f"{case}: reference")
    expected = expect(case)
    for competitor in chosen:
        row = {"competitor": competitor.name, "steps": case.steps, "neurons": case.neurons, "dtype": case.dtype, "status": "ok", "reason": ""}
        row |= {"flips": 0, "band": 0.0, "compile_seconds": None, "memory": None, "samples": 0, "inference": None, "training": None}
        rows[competitor.name] = row
        progress(f"{case}: checking {competitor.name}")
        try:
            if case.dtype not in competitor.dtypes:
                raise peers.NotHere(f"does not compute in {case.dtype}")
            if competitor.compiled and options.quick and case.steps > QUICK_COMPILE_STEPS:
                raise peers.NotHere(f"--quick compiles at T = {QUICK_COMPILE_STEPS} only")
            forward = competitor.build()
            if competitor.compiled:
                row["compile_seconds"] = {mode: clock.once(lambda run=run: run(forward, case)) for mode, run in RUNS.items()}
            problem, row["flips"], row["band"] = check(competitor, forward, case, expected)
        except peers.NotHere as reason:
            row |= {"status": "not run", "reason": str(reason)}
            continue
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".split("\n")[0]
        if problem:
            row |= {"status": "FAILED", "reason": problem}
            continue
        progress(f"{case}: memory of {competitor.name}")
        row["memory"] = per_neuron_step(forward, case)
        ready[competitor.name] = forward
    del expected
    gc.collect()
    others = measure.Others()
    samples = time_all(ready, {c.name for c in chosen if c.fresh}, case, clock, options.repeat, options.quick, progress)
    share = others.share()
    copy = measure.spread(samples["copy", "inference"])[1]
    floors = fewest_bytes(case)
    for name in ready:
        rows[name]["samples"] = min(len(samples[name, mode]) for mode in RUNS)
        for mode in RUNS:
            rows[name][mode] = derive(case, samples[name, mode], copy, floors[mode])
    for mode in RUNS:
        rivals = [row[mode]["seconds"] for row in rows.values() if row[mode] and not row["competitor"].startswith("fastsnn")]
        for row in rows.values():
            if row[mode] and rivals:
                row[mode]["best_other_over_this"] = min(rivals) / row[mode]["seconds"]
    yardstick = {"competitor": "copy", "steps": case.steps, "neurons": case.neurons, "dtype": case.dtype, "status": "ok", "reason": "", "flips": 0, "band": 0.0}
    yardstick |= {"compile_seconds": None, "memory": None, "samples": len(samples["copy", "inference"]), "training": None}
    yardstick["inference"] = derive(case, samples["copy", "inference"], copy, 2 * case.x[0].element_size())
    found = [yardstick, *rows.values()]
    for row in found:
        row["cpu_used_by_others"] = share
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="T 4 and 16, 1,048,576 neurons, float32, 5 rounds, compiled competitors at T = 4 only: under 90 s on two cores")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where x lives (default cpu)")
    add("--steps", type=int, nargs="+", metavar="T", help="time steps (default 4 8 16 32)")
    add("--neurons", type=int, nargs="+", metavar="N", help=f"neurons per step, multiples of {BATCH * CHANNELS} (default 16384 1048576 4194304)")
    add("--dtypes", nargs="+", choices=list(GRADIENT_TOLERANCE), metavar="DTYPE", help=f"of x: {', '.join(GRADIENT_TOLERANCE)} (default float32 bfloat16)")
    add("--competitors", nargs="+", metavar="NAME", help="default: all but fastsnn-reference, whose numbers are those of `loop` or worse; --competitors list shows them")
    add("--repeat", type=int, metavar="R", help=f"rounds (default 15); a competitor that has used {SECONDS_EACH:.0f} s stops after {LEAST_SAMPLES}")
    add("--threads", type=int, metavar="K", help="CPU threads (default: torch's)")
    add("--json", type=Path, metavar="FILE", help="write every number, the machine and the versions")
    add("--plot", type=Path, metavar="FILE.png", help="draw copies of x against T (needs matplotlib)")
    add("--table", type=Path, metavar="FILE", help="measure nothing: print the Markdown tables of a JSON file (with --plot: draw them too)")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.steps = options.steps or ([4, 16] if quick else [4, 8, 16, 32])
    options.neurons = options.neurons or ([1 << 20] if quick else [1 << 14, 1 << 20, 1 << 22])
    options.dtypes = options.dtypes or (["float32"] if quick else ["float32", "bfloat16"])
    if options.repeat is None:
        options.repeat = 5 if quick else 15
    for n in options.neurons:
        if n < 1 or n % (BATCH * CHANNELS):
            parser.error(f"--neurons {n}: wanted a multiple of {BATCH * CHANNELS} (batch {BATCH}, {CHANNELS} channels)")
    if min(options.steps) < 1 or options.repeat < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--steps, --repeat and --threads must be at least 1")
    if options.device == "cuda" and not options.table and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    known = {competitor.name: competitor for competitor in peers.competitors(options.device)}
    if options.competitors == ["list"]:
        print("\n".join(known))
        parser.exit()
    unknown = set(options.competitors or ()) - set(known)
    if unknown:
        parser.error(f"--competitors {' '.join(sorted(unknown))}: unknown; there are {', '.join(known)}")
    measure.check_outputs(parser, options.json, options.plot)
    if options.table:
        try:
            options.data = json.loads(options.table.read_text())
            show.markdown(options.data)
        except OSError as error:
            parser.error(f"--table {options.table}: cannot be read ({error.strerror or error})")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"--table {options.table}: is no result of this program ({type(error).__name__}: {error})")
    options.chosen = [c for c in known.values() if (c.name in options.competitors if options.competitors else c.name != "fastsnn-reference")]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.plot:
        try:
            show.pyplot()
        except ImportError as error:
            print(f"throughput.py: {error}", file=sys.stderr)
            return 2
    if options.table:
        data = options.data
        print(show.markdown(data))
    else:
        data = measure_all(options)
    if options.plot:
        show.plot(data, options.plot)
    failed = sorted({row["competitor"] for row in data["rows"] if row["status"] == "FAILED"})
    if failed and not options.table:
        print(f"\nFAILED the check against the reference: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed and not options.table else 0


def measure_all(options) -> dict:
    if options.threads:
        torch.set_num_threads(options.threads)
    progress = measure.Progress()
    settings = {"device": options.device, "steps": options.steps, "neurons": options.neurons, "dtypes": options.dtypes, "repeat": options.repeat, "quick": options.quick}
    settings["layer"] = f"decay {peers.DECAY}, threshold {peers.THRESHOLD}, hard reset to 0 (attached), ATan({peers.ALPHA})"
    data = {"machine": measure.machine(), "versions": measure.versions() | {"fastsnn": fastsnn.__version__}, "commit": measure.commit(), "settings": settings, "rows": []}
    print(show.headline(data))
    print(
        f"Layer: {settings['layer']}. GB/s counts the fewest bytes the layer must move; % copy is that over the copy's bandwidth; best/this is the\n"
        "fastest non-fastsnn competitor's time over this one's. Bytes are beyond x and the incoming gradient; live: after the forward pass of training.\n"
        + ("Memory: CUDA's caching allocator. Times: events, the queue kept full." if options.device == "cuda" else KEEPS)
    )
    for dtype in options.dtypes:
        for neurons in options.neurons:
            for steps in options.steps:
                case = Case(steps, neurons, dtype, options.device)
                rows = measure_case(case, options.chosen, options, progress)
                progress.clear()
                size = case.elements * case.x[0].element_size()
                print(show.text(f"{case}, x is {show.byte_size(size)}" + (f" in {len(case.x)} copies" if len(case.x) > 1 else ""), rows), flush=True)
                data["rows"] += rows
                if options.json:  # after each configuration: an interrupted run keeps what it has
                    with measure.replacing(options.json) as temporary:
                        temporary.write_text(json.dumps(data, indent=1) + "\n")
                del case
    return data


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
