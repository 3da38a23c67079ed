"""The command line. `fastsnn info` tells what runs here, and why the rest does not; the other commands are in `commands`.

To add a command: a module in `commands` with `add(commands)`, which sets `run`, from parsed arguments to the exit status.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

import torch

from . import __version__, backends
from .commands import Parser, attack, coding, convert, defenses, demo, recipes, report, train

VARIABLES = {
    backends.FORCE: "forces a backend where a call says backend='auto'",
    backends.REQUIRE: "1: 'auto' never falls back to the reference",
}


def versions() -> dict[str, str | None]:
    """Versions by package; None where one is not installed. Nothing optional is imported."""
    found: dict[str, str | None] = {"fastsnn": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found["torch_cuda"] = torch.version.cuda
    for name in ("triton", "cupy"):
        found[name] = None
        if importlib.util.find_spec(name) is None:
            continue
        # CuPy's distributions are named by CUDA version: cupy-cuda12x, cupy-cuda13x.
        owners = {d for d in importlib.metadata.packages_distributions().get(name, ()) if d.startswith(name)} or {name}
        try:
            found[name] = ", ".join(f"{importlib.metadata.version(owner)}" + (f" ({owner})" if owner != name else "") for owner in sorted(owners))
        except importlib.metadata.PackageNotFoundError:
            found[name] = "of unknown version"
    return found


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}" for p in properties]


def build_report() -> dict | None:
    """What setup.py wrote when the kernels were built: in the package, or in the build folder of a checkout."""
    package = Path(__file__).resolve().parent
    for path in (package / "build_report.json", package.parent / "build" / "cmake" / "build_report.json"):
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            continue
    return None


def gather() -> dict:
    """Everything that `info` tells, in the form of its JSON."""
    cpu = backends.BACKENDS["cpu"]
    reasons = backends.reasons()
    return {
        "versions": versions(),
        "package": str(Path(__file__).resolve().parent),
        "cpu": {
            "model": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": cpu.instruction_set if reasons["cpu"] is None else None,
        },
        "gpus": devices(),
        "backends": {name: {"ready": reason is None, "reason": reason} for name, reason in reasons.items()},
        "build": build_report(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def show(found: dict) -> str:
    """`gather()` as text."""
    lines: list[str] = []

    def put(title: str, rows: list[tuple[str, object]]) -> None:
        width = max(len(name) for name, _ in rows)
        lines.extend(["", title, *(f"  {name:{width}}  {value}" for name, value in rows)])

    put("versions", [(name, value or ("none: a CPU build" if name == "torch_cuda" else "not installed")) for name, value in found["versions"].items()])
    cpu = found["cpu"]
    machine = [("CPU", cpu["model"]), ("cores", f"{cpu['cores']} for this process, {cpu['threads']} threads in torch")]
    machine += [(f"GPU {index}", text) for index, text in enumerate(found["gpus"])] or [("GPU", "none that torch can use")]
    put("machine", machine)
    put("backends, in the order in which 'auto' tries them", [(name, state["reason"].removeprefix(f"{name}: ") if state["reason"] else _ready(name, cpu)) for name, state in found["backends"].items()])
    report = found["build"]
    if report is None:
        put("kernels", [("build", "no record of one; a build by `pip install` leaves it")])
    else:
        rows = [("compiler", f"{report['compiler']}, {report['flags']}")] if report["compiler"] else []
        rows += [("instruction sets", ", ".join(report["instruction_sets"]))] if report["instruction_sets"] else []
        rows += [(name, f"not built: {reason}" if reason else "built") for name, reason in report["libraries"].items()]
        put("kernels", rows)
    put("environment", [(name, f"{'not set' if value is None else repr(value)} ({VARIABLES[name]})") for name, value in found["environment"].items()])
    return "\n".join(lines[1:])


def _ready(name: str, cpu: dict) -> str:
    if name == "cpu":
        return f"ready, instruction set {cpu['instruction_set']}"
    return "ready, slow: plain PyTorch" if name == "reference" else "ready"


def info(arguments: argparse.Namespace) -> int:
    found = gather()
    print(json.dumps(found, indent=1) if arguments.json else show(found))
    return 0


def parser() -> Parser:
    top = Parser(prog="fastsnn", description="Fast spiking neurons for PyTorch: train robust networks of them, and attack them.")
    top.add_argument("--version", action="version", version=f"fastsnn {__version__}")
    commands = top.add_subparsers(dest="command", metavar="command", parser_class=Parser)
    command = commands.add_parser("info", help="what runs here, and why the rest does not", description="What runs here, and why the rest does not.")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=info)
    for module in (train, convert, attack, coding, report, recipes, defenses, demo):
        module.add(commands)
    top.subcommands = dict(commands.choices)
    return top


def main(arguments: list[str] | None = None) -> int:
    top = parser()
    options = top.parse_args(arguments)
    if options.command is None:
        top.print_help()
        return 0
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
