"""The command line: `fastsnn info` and what is said to those who mistype."""

import json
import os
import subprocess
import sys

import fastsnn
import pytest
from fastsnn import __main__ as cli
from fastsnn import backends


def test_info_tells_every_backend(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert fastsnn.__version__ in text
    section = text.split("\nbackends", 1)[1].split("\n\n", 1)[0]
    lines = dict(line.split(maxsplit=1) for line in section.splitlines()[1:])
    assert list(lines) == list(backends.BACKENDS)
    for name, reason in backends.reasons().items():
        assert lines[name] == reason.removeprefix(f"{name}: ") if reason else lines[name].startswith("ready")


def test_info_in_json(capsys, monkeypatch):
    monkeypatch.setenv("FASTSNN_REQUIRE_KERNELS", "1")
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["fastsnn"] == fastsnn.__version__
    assert {name: state["reason"] for name, state in found["backends"].items()} == backends.reasons()
    assert found["environment"]["FASTSNN_REQUIRE_KERNELS"] == "1"
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["model"]
    if found["backends"]["cpu"]["ready"]:
        assert found["cpu"]["instruction_set"] in ("baseline", "v3", "v4")


def test_info_without_optional_packages(tmp_path):
    """As a program, where neither Triton nor CuPy can be imported."""
    for name in ("triton", "cupy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('made to be missing')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", "fastsnn", "info", "--json"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    triton = json.loads(done.stdout)["backends"]["triton"]
    assert not triton["ready"] and "made to be missing" in triton["reason"] and "pip install" in triton["reason"]


def test_info_shows_what_was_not_built(monkeypatch, capsys):
    libraries = {"_fastsnn_cpu.so": "CMake was not found. Install it.", "_fastsnn_cuda.so": "nvcc was not found."}
    monkeypatch.setattr(cli, "build_report", lambda: {"cmake": None, "compiler": None, "flags": None, "instruction_sets": [], "libraries": libraries})
    cli.main(["info"])
    text = capsys.readouterr().out
    assert "_fastsnn_cpu.so   not built: CMake was not found. Install it." in text and "_fastsnn_cuda.so  not built: nvcc was not found." in text


def test_info_without_a_record_of_the_build(monkeypatch, capsys):
    monkeypatch.setattr(cli, "build_report", lambda: None)
    assert cli.main(["info"]) == 0
    assert "no record" in capsys.readouterr().out


def test_help_and_version(capsys):
    assert cli.main([]) == 0
    assert "info" in capsys.readouterr().out
    for argument, wanted in (("--help", "info"), ("--version", fastsnn.__version__)):
        with pytest.raises(SystemExit) as end:
            cli.main([argument])
        assert end.value.code == 0 and wanted in capsys.readouterr().out


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["inof"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "'inof' is unknown; wanted one of info" in error and "Did you mean 'info'?" in error
