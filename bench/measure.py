"""Clocks, memory and the description of the machine, for the benchmarks of this folder."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
#: A sample runs its function at least this long, so that the clock's own cost does not count.
SAMPLE_SECONDS = 0.005


class Progress:
    """One updating line on a terminal, plain lines otherwise; on stderr, so that the tables can be piped."""

    def __init__(self) -> None:
        self._terminal, self._width, self._last = sys.stderr.isatty(), 0, ""

    def __call__(self, text: str, detail: str = "") -> None:
        """detail changes too often to be worth a plain line."""
        if self._terminal:
            line = f"{text} {detail}".rstrip()
            print("\r" + line.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(line)
        elif text != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = text

    def clear(self) -> None:
        if self._terminal:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)
            self._width = 0


class Clock:
    """Seconds per call.

    CPU: wall time. CUDA: events around the calls, while the queue is kept full, so that this is the device's time and
    the time that Python takes to launch is hidden wherever the queue is deep enough.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once(self, function: Callable[[], object]) -> float:
        """Wall time of one call, launch included."""
        self.sync()
        start = time.perf_counter()
        function()
        self.sync()
        return time.perf_counter() - start

    def calls(self, function: Callable[[], object]) -> int:
        """How many calls make a sample."""
        return max(1, min(200, round(SAMPLE_SECONDS / max(self.once(function), 1e-7))))

    def sample(self, function: Callable[[], object], calls: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls
        launch = self.once(function) * calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(2 * launch, 0.05) * 2e9))  # cycles: the device waits while the queue fills
        start.record()
        for _ in range(calls):
            function()
        end.record()
        self.sync()
        return start.elapsed_time(end) / 1e3 / calls


def spread(samples: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], statistics.median(samples), cuts[7]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes to the process's stderr; drop that."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def memory(function: Callable[[], object], device: str) -> tuple[int, int]:
    """Bytes that `function` allocated and still holds through its result, and the most it held at once.

    CUDA: the caching allocator's own counters. CPU: every allocation of torch's allocator, as the profiler records it,
    in any thread; exact to the byte. Memory that a library takes from elsewhere is not seen. Call `function` once before,
    so that nothing is compiled here.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = function()
        torch.cuda.synchronize()
        live, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del held
        return live, peak
    with tempfile.TemporaryDirectory() as folder, _quiet():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            held = function()
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    del held
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return live, peak


class Others:
    """The share of the machine's CPU time that went to other processes, or to other guests of the host, since `start`."""

    def __init__(self) -> None:
        self.start()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        try:
            user, nice, system, idle, wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):  # not Linux
            return 0.0, 0.0, time.process_time()
        busy = user + nice + system + irq + soft + steal
        tick = os.sysconf("SC_CLK_TCK")
        return busy / tick, (busy + idle + wait) / tick, time.process_time()

    def start(self) -> None:
        self._before = self._read()

    def share(self) -> float:
        busy, total, own = (now - before for now, before in zip(self._read(), self._before))
        return max(0.0, busy - own) / total if total else 0.0


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": cpu_name(), "cores": cores, "threads": torch.get_num_threads(), "gpu": None}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "gpu_memory": gpu.total_memory, "gpu_l2": gpu.L2_cache_size}
    return found


def versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    names = ("fastsnn", "numpy", "triton", "cupy", "spikingjelly", "snntorch")
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda} | {name: version(name) for name in names}


def commit() -> dict[str, object]:
    """The checked-out commit and whether files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain")
    return {"commit": git("rev-parse", "--verify", "HEAD"), "dirty": None if changes is None else bool(changes)}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once it is written in full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


#: What matplotlib is asked to draw.
PICTURES = (".png", ".pdf", ".svg")


def check_outputs(parser: argparse.ArgumentParser, json: Path | None = None, plot: Path | None = None) -> None:
    """Ends the program now, and not after an hour's work, where a result could not be written."""
    for option, path in (("--json", json), ("--plot", plot)):
        if path is None:
            continue
        if option == "--plot" and path.suffix.lower() not in PICTURES:
            parser.error(f"--plot {path}: wanted a file that ends in {', '.join(PICTURES)}")
        if path.is_dir():
            parser.error(f"{option} {path}: that is a folder; wanted a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            parser.error(f"{option} {path}: cannot be written ({error.strerror or error})")
