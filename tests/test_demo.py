"""`fastsnn demo` and the bench of a training step: from nothing to a table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastsnn.__main__ import main
from fastsnn.checkpoints import read_run
from fastsnn.commands import demo
from fastsnn.recipes import Config

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_demo_trains_attacks_and_reports(tmp_path):
    command = ("-m", "fastsnn", "demo", "--out", str(tmp_path / "demo"), "--seeds", "1", "--epochs", "1", "--eps", "16/255", "--jobs", "1")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "demo" / "report" / "table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["vanilla-seed0", "mpd-sgr-seed0"]
    for row in rows:
        (single,) = row["runs"]
        results = {(result["attack"], result["eps"]): result for result in single["results"]}
        assert {attack for attack, _ in results} == {"clean", "FGSM", "PGD-7"}
        assert all(0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1 for result in results.values())
        assert 0 < single["omega"] < 1
        assert f"{100 * results['clean', 0.0]['accuracy']:.1f} (" in done.stdout and f"{single['omega']:.3f}" in done.stdout
    assert (tmp_path / "demo" / "report" / "report.html").exists() and list((tmp_path / "demo" / "report").glob("*.png"))


@pytest.fixture
def small(monkeypatch):
    """A network that is trained in a moment."""

    def config_of(job):
        defense, seed, out, epochs, _ = job
        tiny = dict(model="small_cnn", model_options={"widths": [4]}, steps=2, train_limit=120, batch_size=32, device="cpu")
        return Config(**tiny, defense=defense, seed=seed, epochs=epochs or 3, out=f"{out}/{defense}-seed{seed}")

    monkeypatch.setattr(demo, "config_of", config_of)


def test_demo_attacks_anew_for_other_sizes(small, tmp_path):
    for eps in (["8/255"], ["16/255", "32/255"]):
        folder = Path(demo.one(("vanilla", 0, str(tmp_path), 1, eps)))
        assert json.loads((folder / "attacks-quick.json").read_text())["settings"]["eps"] == eps


def test_demo_does_not_pass_old_networks_off_as_new_ones(small, tmp_path, capsys):
    job = ("vanilla", 0, str(tmp_path), 1, ["8/255"])
    folder = Path(demo.one(job))
    with pytest.raises(ValueError, match="cannot change epochs 1 to 2"):
        demo.one((*job[:3], 2, job[4]))
    assert main(["demo", "--out", str(tmp_path), "--seeds", "1"]) == 1
    said = capsys.readouterr().err
    assert f"fastsnn demo: {folder} holds a network of other settings. Give the options of then, or another --out." in said and "epochs 1 to 3" in said
    assert read_run(folder)["config"]["epochs"] == 1


def test_demo_says_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("-m", "fastsnn", "demo", "--out", str(tmp_path / "file" / "demo"), "--seeds", "1", "--epochs", "1", "--jobs", "1")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "file" in done.stderr


def test_training_step_bench(tmp_path):
    path = tmp_path / "step.json"
    done = run("bench/training_step.py", "--model", "small_cnn", "--steps", "2", "--batch", "2", "--repeat", "1", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["competitor"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"fastsnn", "fastsnn mpd-sgr", "fastsnn tgo", "fastsnn noisy", "spikingjelly", "snntorch"}
    for row in rows.values():
        assert row["status"] == "ok" and row["images_per_second"] > 0 and row["peak_bytes"] > 0
        assert row["relative"] == pytest.approx(row["seconds"] / rows["fastsnn"]["seconds"])
    assert rows["fastsnn"]["peak_bytes"] < rows["spikingjelly"]["peak_bytes"]


@pytest.mark.parametrize("arguments", [["--model", "vgg12"], ["--steps", "0"], ["--rows", "snntorch"]])
def test_training_step_bench_refuses(arguments):
    done = run("bench/training_step.py", *arguments)
    assert done.returncode == 2 and arguments[0] in done.stderr
