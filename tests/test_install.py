"""The package as it installs: the wheel, with and without a compiler, and the README's code."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fastsnn
import pytest
from fastsnn import surrogates, tables

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("fastsnn", "kernels", "recipes", "cmake", "setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE")

#: The layer of the installed package equals its reference, on the backend that `auto` takes.
USE = """
import torch, fastsnn
from fastsnn.backends import resolve
x = torch.randn(4, 3, 5, 7)
assert torch.equal(fastsnn.lif(x).spikes, fastsnn.lif(x, backend="reference").spikes)
print(resolve("auto", x).name, fastsnn.__file__)
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def build_wheel(tmp_path: Path, **environment: str) -> Path:
    """The wheel that pip builds from a copy of the sources."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info"))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(source)]
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CXXFLAGS", "CMAKE_ARGS", "CMAKE_GENERATOR")}
    done = subprocess.run(command, env={**clean, "CMAKE_ARGS": "-DFASTSNN_CUDA=OFF", **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    return wheel


class Installed:
    """A wheel unpacked by pip into a folder of its own, used from an empty working directory."""

    def __init__(self, wheel: Path, tmp_path: Path) -> None:
        self.target, self.empty = tmp_path / "target", tmp_path / "empty"
        self.empty.mkdir()
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(self.target), str(wheel)], check=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTSNN_", "TRITON_"))}
        self.environment = {**kept, "PYTHONPATH": str(self.target)}

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.empty, env={**self.environment, "CUDA_VISIBLE_DEVICES": "", **environment}, capture_output=True, text=True
        )

    def output(self, *arguments: str) -> str:
        done = self.python(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def report(wheel: Path) -> dict:
    return json.loads(zipfile.ZipFile(wheel).read("fastsnn/build_report.json"))


def test_wheel(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    # Hardly optimised, and as for a processor that is not x86-64: what is in the wheel counts here, not its speed.
    plain = f"-DFASTSNN_CUDA=OFF -DCMAKE_SYSTEM_NAME={platform.system()} -DCMAKE_SYSTEM_PROCESSOR=generic"
    wheel = build_wheel(tmp_path, CXX=str(script(tmp_path / "c++", f'exec {compiler} "$@" -O1 -DLIF_FEW')), CMAKE_ARGS=plain)
    assert re.fullmatch(rf"fastsnn-{re.escape(fastsnn.__version__)}-py3-none-(?!any)\w+\.whl", wheel.name)
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    for folder, pattern in (("fastsnn", "*.py"), ("kernels", "*"), ("recipes", "*.toml")):
        files = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob(pattern) if path.is_file() and "__pycache__" not in path.parts}
        prefix = {"fastsnn": "fastsnn/", "kernels": "fastsnn/kernels/", "recipes": "fastsnn/recipe_files/"}[folder]
        assert {prefix + file for file in files} <= names
    assert not any(name.split("/")[0] in ("kernels", "tests", "bench") for name in names)
    metadata = archive.read(f"fastsnn-{fastsnn.__version__}.dist-info/METADATA").decode()
    assert "Requires-Python: >=3.11" in metadata and "Requires-Dist: torch>=2.8" in metadata and "License-Expression: MIT" in metadata
    assert "fastsnn = fastsnn.__main__:main" in archive.read(f"fastsnn-{fastsnn.__version__}.dist-info/entry_points.txt").decode()

    built = report(wheel)
    assert built["libraries"]["_fastsnn_cpu.so"] is None, built
    assert built["instruction_sets"] == ["baseline"] and "-ffp-contract=off" in built["flags"] and built["compiler"]

    installed = Installed(wheel, tmp_path)
    name, file = installed.output("-c", USE).split()
    assert name == "cpu" and Path(file).is_relative_to(installed.target)
    assert "mpd-sgr-vgg11-cifar10" in installed.output("-m", "fastsnn", "recipes")


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [("cmake", "CMake was not found"), ("compiler", "no working C++ compiler"), ("c++17", "kernels do not compile")],
)
def test_install_without_kernels(lacks, reason, tmp_path):
    broken = script(tmp_path / "c++", 'case "$*" in *lif_cpu.cpp*) echo "lif_cpu.cpp:1:1: error: unknown type name" >&2; exit 1;; esac\nexec c++ "$@"')
    environment = {
        "cmake": {"PATH": str(tmp_path)},
        "compiler": {"CXX": str(tmp_path / "nothing" / "c++")},
        "c++17": {"CXX": str(broken)},
    }[lacks]
    wheel = build_wheel(tmp_path, **environment)
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    recorded = report(wheel)["libraries"]["_fastsnn_cpu.so"]
    assert reason in recorded and "install again: pip install" in recorded
    if lacks == "c++17":
        assert "unknown type name" in recorded
    if lacks != "cmake":
        return  # it is the same package but for the reason

    installed = Installed(wheel, tmp_path)
    assert recorded in installed.output("-m", "fastsnn", "info")
    assert installed.output("-c", USE).split()[0] == "reference"
    refused = installed.python("-c", USE, FASTSNN_REQUIRE_KERNELS="1")
    assert refused.returncode and "FASTSNN_REQUIRE_KERNELS=1 and no compiled backend" in refused.stderr and "CMake" in refused.stderr


README = (ROOT / "README.md").read_text()


def test_readme_code_runs():
    """The blocks in their order, as one program."""
    blocks = list(re.finditer(r"^```python\n(.*?)^```", README, re.M | re.S))
    assert len(blocks) >= 4
    names: dict = {"__name__": "readme"}
    for block in blocks:
        line = README[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), "README.md", "exec"), names)


def test_readme_layers_of_other_libraries():
    rows = re.findall(r"^\| (?:SpikingJelly|snnTorch|`IFNode).*?\| (.*) \|$", README, re.M)
    calls = [call for row in rows for call in re.findall(r"`([^`]*\)+)`", row)]
    assert len(calls) >= 4
    for call in calls:
        eval(call, {**vars(fastsnn), "surrogates": surrogates})


def test_readme_names_every_row():
    for name in (*tables.CHARGES, *tables.FIRES, *tables.RESETS, *(f"{kind.__name__}(" for kind in surrogates.BY_NAME.values())):
        assert f"`{name}" in README, f"the README's tables lack {name}"


def test_readme_names_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.M)) <= targets
