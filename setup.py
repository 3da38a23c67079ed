"""Builds the package: CMake compiles the kernels; where it cannot, the package installs without them and keeps the reason.

Nothing here imports torch or fastsnn: the libraries have a plain C ABI, so one wheel serves every Python and torch.
`CMAKE_ARGS` in the environment is passed on to CMake, for example CMAKE_ARGS=-DFASTSNN_CUDA=OFF.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"
REPORT = "build_report.json"  # read by `fastsnn info`
AGAIN = "then install again: pip install --force-reinstall --no-deps ."


class Failure(Exception):
    """A library cannot be built, for the reason in the message."""


def run(*command):
    """Runs a command, shows its output (pip does with -v), and returns it."""
    print("+", shlex.join(map(str, command)), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout, flush=True)
    if done.returncode:
        raise Failure(done.stdout)
    return done.stdout


def essence(log):
    """The lines of a compiler's or CMake's output that say what went wrong."""
    noise = re.compile(r"\[\d+/\d+\]|FAILED:|Call Stack|ninja: |\S*make(\[\d+\])?: ")
    lines = [line.strip()[:200] for line in log.splitlines() if line.strip() and " -o " not in line and not noise.match(line.strip())]
    marked = [place for place, line in enumerate(lines) if re.search(r"\b[Ee]rror\b", line)]
    return " | ".join(dict.fromkeys(lines[marked[0] : marked[0] + 3] if marked else lines[-3:]))


def forget():
    """Makes CMake look for its programs anew; objects that are still right are kept."""
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
    for folder in BUILD.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(folder)


def configure(cmake):
    """Writes the build files; a cache of another place or of programs that are gone is thrown away."""
    command = [cmake, "-S", ROOT, "-B", BUILD, "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    command += ["-UFASTSNN_*", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]  # no option of an earlier build is kept
    had_cache = (BUILD / "CMakeCache.txt").exists()
    fresh = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"] if shutil.which("ninja") else []
    try:
        run(*command, *([] if had_cache else fresh))
    except Failure:
        if not had_cache:
            raise
        forget()
        run(*command, *fresh)


def compilation():
    """Which compiler was used, with which flags, for which instruction sets."""
    commands = [shlex.split(entry["command"]) for entry in json.loads((BUILD / "compile_commands.json").read_text()) if entry["file"].endswith("lif_cpu.cpp")]
    version = subprocess.run([commands[0][0], "--version"], capture_output=True, text=True).stdout
    sets = [match.group(1) for command in commands if (match := re.search(r"-DLIF_ISA=(\w+)", " ".join(command)))]
    flags = [word for word in commands[0] if re.match(r"-(O|f|m|std|g)", word)]
    return {"compiler": (version.splitlines() or [commands[0][0]])[0], "flags": " ".join(flags), "instruction_sets": sets}


def has_cuda(cmake):
    """Whether CMake found nvcc and was not told to leave CUDA out."""
    return re.search(r"\bfastsnn_cuda\b", run(cmake, "--build", BUILD, "--target", "help")) is not None


def build_cpu(cmake, report):
    if cmake is None:
        raise Failure(f"CMake was not found. Install it (Debian: apt install cmake; anywhere: pip install cmake), {AGAIN}")
    report["cmake"] = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    try:
        configure(cmake)
    except Failure as failure:
        log = str(failure)
        if re.search(r"No CMAKE_CXX_COMPILER|CMAKE_CXX_COMPILER not set|not a full path to an existing compiler|is not able to compile|could not find compiler", log, re.I):
            raise Failure(f"no working C++ compiler was found. Install one for C++17 (Debian: apt install g++), {AGAIN} CMake says: {essence(log)}") from None
        raise Failure(f"CMake cannot set the build up: {essence(log)}. Mend that, {AGAIN}") from None
    report.update(compilation())
    if has_cuda(cmake):
        try:  # both libraries side by side; which of them failed, and why, the builds one by one tell
            run(cmake, "--build", BUILD, "--parallel", str(os.cpu_count() or 1))
        except Failure:
            pass
    try:
        run(cmake, "--build", BUILD, "--target", "fastsnn_cpu", "--parallel", str(os.cpu_count() or 1))
    except Failure as failure:
        raise Failure(f"the CPU kernels do not compile with {report['compiler']}: {essence(str(failure))}. Try another compiler, {AGAIN}") from None


def build_cuda(cmake, report):
    if report["compiler"] is None:
        raise Failure("CMake has not set the build up; see the reason for _fastsnn_cpu.so.")
    if not has_cuda(cmake):
        raise Failure(f"nvcc was not found, or the build was told to leave CUDA out. CuPy's NVRTC serves instead (pip install 'fastsnn[cupy]'); or install the CUDA toolkit, {AGAIN}")
    try:
        run(cmake, "--build", BUILD, "--target", "fastsnn_cuda", "--parallel", str(os.cpu_count() or 1))
    except Failure as failure:
        raise Failure(f"the CUDA kernels do not compile: {essence(str(failure))}. CuPy's NVRTC serves instead: pip install 'fastsnn[cupy]'.") from None


class BuildKernels(build_ext):
    """Runs CMake in build/cmake, and copies what it made beside the package's modules."""

    def run(self):
        cmake, report = shutil.which("cmake"), {"cmake": None, "compiler": None, "flags": None, "instruction_sets": [], "libraries": {}}
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = None if in_place else Path(self.build_lib) / "fastsnn"
        for name, build in {"_fastsnn_cpu.so": build_cpu, "_fastsnn_cuda.so": build_cuda}.items():
            try:
                build(cmake, report)
                report["libraries"][name] = None
                if package:
                    package.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(BUILD / "lib" / name, package / name)
            except Exception as failure:  # whatever happens, the package installs, and tells it
                report["libraries"][name] = str(failure) if isinstance(failure, Failure) else f"{type(failure).__name__}: {failure}"
                for stale in (BUILD / "lib" / name, package and package / name):  # made from other sources
                    if stale:
                        stale.unlink(missing_ok=True)
        if reason := report["libraries"]["_fastsnn_cpu.so"]:
            forget()  # the next try may have another compiler
            print(f"\nfastsnn: WARNING: installed without its CPU kernels; every call runs on the slow reference.\n{reason}\n", file=sys.stderr, flush=True)
        target = package or BUILD
        target.mkdir(parents=True, exist_ok=True)
        (target / REPORT).write_text(json.dumps(report, indent=1) + "\n")

    def get_outputs(self):
        package = Path(self.build_lib) / "fastsnn"
        return [] if self.inplace else [str(path) for path in (*package.glob("_fastsnn_*.so"), *package.glob(REPORT))]

    def get_output_mapping(self):
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for one platform, and for every Python 3."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class WithLibraries(Distribution):
    def has_ext_modules(self):
        return True


setup(
    distclass=WithLibraries,
    packages=[*find_packages(include=["fastsnn", "fastsnn.*"]), "fastsnn.kernels", "fastsnn.recipe_files"],
    package_dir={"fastsnn": "fastsnn", "fastsnn.kernels": "kernels", "fastsnn.recipe_files": "recipes"},
    package_data={"fastsnn.kernels": ["*.def", "*.h", "*.cpp", "*.cu"], "fastsnn.recipe_files": ["*.toml"]},
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
