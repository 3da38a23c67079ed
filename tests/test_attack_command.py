"""`fastsnn attack` on trained networks: over processes, killed and resumed, from other runs, beside a twin."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import trained
from fastsnn import activity, checkpoints, corruptions, data, evaluation
from fastsnn.__main__ import main
from fastsnn.commands import attack

SUITE = ("--suite", "ensemble", "--eps", "24/255", "--steps", "1", "--limit", "16", "--batch-size", "4", "--check-images", "6", "--quiet")
#: The program, writing what it has found after each batch.
PROGRAM = "import sys; from fastsnn.evaluation import store; store.WRITE_EVERY = 0.0; from fastsnn.__main__ import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """The digits as a file, which is read sooner than the package that has them."""
    return str(data.load("digits").save(tmp_path_factory.mktemp("data") / "digits.npz"))


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory) -> str:
    """CIFAR-C's folder for the digits: darker by severity, and at random."""
    folder, test = tmp_path_factory.mktemp("digits-C"), data.load("digits")
    images = test.x_test.permute(0, 2, 3, 1).numpy()
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    for name, made in (("brightness", [images // (1 + severity) for severity in range(1, 6)]), ("shot_noise", [noise] * 5)):
        np.save(folder / f"{name}.npy", np.concatenate(made))
    np.save(folder / "labels.npy", test.y_test.numpy())
    return str(folder)


def copy_of(name: str, folder) -> str:
    return str(shutil.copytree(trained.FOLDER / name, folder / name))


def run(*arguments) -> int:
    return main([*map(str, arguments)])


def record(folder, suite: str = "quick") -> dict:
    return json.loads(open(f"{folder}/attacks-{suite}.json").read())


def timeless(found: dict) -> dict:
    """A record without what differs between runs of the same: times, and by how many processes."""
    rows = {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in found["results"].items()}
    worst = {key: value for key, value in found["worst"].items() if key != "seconds"}
    return {key: value for key, value in found.items() if key not in ("seconds", "processes")} | {"results": rows, "worst": worst}


class Two:
    """Two processes of the program, as torchrun starts them."""

    def __init__(self, *arguments: str) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, "attack", *arguments]
        environments = [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        self.processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for env in environments]

    def kill(self) -> list[int]:
        for process in self.processes:
            process.kill()
        return [process.wait() for process in self.processes]

    def wait(self) -> list[str]:
        try:
            texts = [process.communicate(timeout=240)[0] for process in self.processes]
        finally:
            self.kill()
        assert [process.returncode for process in self.processes] == [0, 0], "\n".join(texts)
        return texts


def test_two_processes_killed_and_resumed_find_what_one_finds(tmp_path, digits, corrupted, capsys):
    one, two = copy_of("snn", tmp_path / "one"), copy_of("snn", tmp_path / "two")
    options = (*SUITE, "--data", digits, "--corruptions", corrupted, "--severities", "5", "1")
    first = Two(two, *options)
    parts = [tmp_path / "two" / "snn" / f"attacks-ensemble.part{end}" for end in ("", ".1")]
    try:
        while all(process.poll() is None for process in first.processes) and not all(part.exists() and "pgd1" in part.read_text() for part in parts):
            time.sleep(0.01)
    finally:
        assert first.kill() == [-signal.SIGKILL] * 2
    held = [json.loads(part.read_text())["rows"] for part in parts]
    own = held[1]["clean"]["correct"]
    assert own.count("-") >= 8 and own.strip("-"), "the second process writes what it has found itself"
    assert not (tmp_path / "two" / "snn" / "attacks-ensemble.json").exists()

    (tmp_path / "two" / "snn" / "attacks-ensemble.part.1.4711.part").write_text('{"key"')  # killed while it wrote
    texts = Two(two, *options).wait()
    assert "worst of all" in texts[0] and not texts[1].strip(), "one process prints"
    assert sorted(path.name for path in (tmp_path / "two" / "snn").iterdir()) == ["attacks-ensemble.json", "best.safetensors", "run.json"]
    assert run("attack", one, *options) == 0
    found, want = record(two, "ensemble"), record(one, "ensemble")
    assert (found["processes"], want["processes"]) == (2, 1) and timeless(found) == timeless(want)
    assert [(row["corruption"], row["severity"], row["total"]) for row in want["corruptions"]["rows"]] == [(name, severity, 16) for name in ("shot_noise", "brightness") for severity in (1, 5)]
    assert want["activity"]["images"] == 6 and want["activity"]["attacked"]["attack"] == "pgd1-24/255"
    said = capsys.readouterr().out
    for text in ("ensemble-pgd1-24/255, member by member", "attacked: where a number stands", "checks\n", "plain-gradient"):
        assert text in said
    assert 0 < want["results"]["ensemble-pgd1-24/255"]["tried"] < 16 and want["results"]["ensemble-fgsm-24/255"]["tried"] == 16
    assert [check["name"] for check in want["checks"]] == list(evaluation.CHECKS)
    assert {check["verdict"] for check in want["checks"]} <= {"ok", "suspicious", "not tested"}
    # What the file says is enough to run it again.
    asked = {name: want["settings"][name] for name in ("eps", "seed", "eot", "norm", "steps", "restarts", "curve_steps")}
    suite = evaluation.make_suite(want["settings"]["suite"], **asked)
    for name, row in want["results"].items():
        assert row["attack"] == (None if name == "clean" else json.loads(json.dumps(evaluation.running.describe(suite[name]))))


def test_transfer_and_a_twin(tmp_path, capsys):
    snn, ann = copy_of("snn", tmp_path), copy_of("ann", tmp_path)
    words = ("--eps", "16/255", "32/255", "--limit", "60", "--check-images", "0", "--curve-steps", "1", "3", "--quiet")
    assert run("attack", snn, *words, "--transfer-from", ann, "--compare", ann) == 0
    said, found, twin = capsys.readouterr().out, record(snn), record(ann)
    assert list(found["results"]) == [name for name in ("clean", *(f"{label}-{size}" for size in ("16/255", "32/255") for label in ("fgsm", "pgd7", "transfer-ann")))]
    row = found["results"]["transfer-ann-32/255"]
    assert row["attack"]["attack"] == "pgd" and row["attack"]["source_weights"] == found["settings"]["transfer_from"][0]["weights"]["fingerprint"] == twin["weights"]["fingerprint"]
    assert found["results"]["pgd7-32/255"]["accuracy"] < row["accuracy"] < found["results"]["clean"]["accuracy"]
    verdicts = {check["name"]: check["verdict"] for check in found["checks"]}
    assert verdicts["white-box"] == "ok" and verdicts["twin"] == "ok" and verdicts["unbounded"] == "not tested" and list(verdicts)[-1] == "twin"
    compared = found["compare"]
    assert compared["run"] == "ann" and compared["weights"] == twin["weights"] and compared["results"]["pgd7-16/255"]["accuracy"] == twin["results"]["pgd7-16/255"]["accuracy"]
    (line,) = [line for line in said.splitlines() if line.startswith("pgd7-32/255 ")]
    assert line.endswith(f"  {twin['results']['pgd7-32/255']['accuracy']:.2%}") and "worst at linf 16/255" in said
    assert [point[0] for point in found["curves"]["steps"]["pgd-32/255"]] == [1, 3] and [point[0] for point in found["curves"]["eps"]["transfer-ann"]] == [0, 16 / 255, 32 / 255]
    assert twin["settings"]["compare"] is None
    assert run("attack", snn, *words, "--transfer-from", ann, "--compare", ann) == 0 and "holds these results already" in capsys.readouterr().out
    assert run("attack", snn, *words) == 1 and "transfer_from [{'run': 'ann'" in capsys.readouterr().err


def test_corruptions_beside_attacks_of_before(tmp_path, digits, corrupted, capsys, monkeypatch):
    """A file of before gets them; its attacks are not run again, an interrupted one goes on, and other corruptions are refused."""
    ann = copy_of("ann", tmp_path)
    words = ("attack", ann, "--data", digits, "--eps", "8/255", "--limit", "40", "--batch-size", "16", "--check-images", "4", "--quiet")
    more = (*words, "--corruptions", corrupted, "--severities", "3")
    assert run(*words) == 0
    before, said = record(ann), capsys.readouterr().out
    assert not {"corruptions", "activity"} & set(before) and "activity" not in said, "an ANN has no spikes"

    take, taken = corruptions.sets.__globals__["_reading"], []

    def stops(*given):
        read = take(*given)

        def once(places):
            taken.append(len(places))
            if len(taken) == 5:
                raise KeyboardInterrupt
            return read(places)

        return once

    monkeypatch.setitem(corruptions.sets.__globals__, "_reading", stops)
    assert run(*more) == 130 and taken == [16, 16, 8, 16, 16] and record(ann) == before and os.path.exists(f"{ann}/attacks-quick+corruptions.part")
    assert run(*more) == 0 and taken[5:] == [16, 8] and not os.path.exists(f"{ann}/attacks-quick+corruptions.part")
    said, found = capsys.readouterr().out, record(ann)
    assert "corruptions, digits-C" in said and "mean of all" in said
    rows = found.pop("corruptions")
    assert found | {"settings": before["settings"]} == before
    assert rows["source"] == found["settings"]["corruptions"]["source"] == os.path.basename(corrupted) and rows["severities"] == [3]

    model, test = trained.network("ann"), data.load("digits").limited(test=40)
    for row, x in zip(rows["rows"], (None, test.x_test // 4), strict=True):
        if x is not None:  # the same images of each class as of the clean ones
            assert row["accuracy"] == evaluation.accuracy(model, x, test.y_test)
        low, high = evaluation.wilson(round(40 * row["accuracy"]), 40)
        assert row["interval"] == [low, high] and row["total"] == 40
    assert rows["mean"] == sum(row["accuracy"] for row in rows["rows"]) / 2
    for asked in (words, more):
        assert run(*asked) == 0 and "holds these results already" in capsys.readouterr().out
    assert run(*more[:-1], "4") == 1 and "results of other settings (corruptions" in capsys.readouterr().err


def test_activity_is_that_of_the_images_of_the_checks(tmp_path, digits, capsys):
    snn = copy_of("snn", tmp_path)
    words = ("attack", snn, "--data", digits, "--eps", "16/255", "--limit", "30", "--quiet", "--check-images")
    assert run(*words, "5", "--corruptions", "generated", "--severities", "2") == 0
    said, found = capsys.readouterr().out, record(snn)
    model, test = trained.network("snn"), data.load("digits").limited(test=30)
    places = torch.tensor(evaluation.checks.chosen(30, 5))
    x, y = test.x_test[places], test.y_test[places]
    moved = evaluation.make_suite("quick", "16/255")["pgd7-16/255"](model, x / 255, y, places)
    for kind, images in (("clean", x), ("attacked", moved)):
        layers = activity.activity(model, images)
        assert found["activity"][kind]["layers"] == [layer.to_dict() for layer in layers] and found["activity"][kind]["totals"] == activity.totals(layers)
    assert found["activity"]["attacked"]["distance"] == [layer.to_dict() for layer in activity.spike_distance(model, x, moved)]
    (line,) = [line for line in said.splitlines() if line.startswith("activity on 5 images: ")]
    assert f"{found['activity']['clean']['totals']['per_neuron']:.3f} spikes per neuron and image" in line and "; under pgd7-16/255: " in line
    rows = found["corruptions"]["rows"]
    assert [row["corruption"] for row in rows] == [name for name in corruptions.GENERATED if name != "saturate"]
    noisy = corruptions.corrupt(test.x_test, "gaussian_noise", 2, seed=0)
    assert rows[0]["accuracy"] == evaluation.accuracy(model, noisy, test.y_test)
    assert run(*words, "0", "--again") == 0 and not {"activity", "corruptions"} & set(record(snn))


@pytest.mark.parametrize("words, message", [
    (["--corruptions", "nowhere"], "nowhere is not a folder; wanted CIFAR-10-C's"),
    (["--severities", "3"], "--severities is given without --corruptions"),
    (["--corruptions", "generated", "--severities", "6"], "argument --severities: '6'; wanted a severity from 1 to 5"),
])  # fmt: skip
def test_corruptions_that_cannot_be(tmp_path, words, message, capsys):
    try:
        status = run("attack", copy_of("ann", tmp_path), *words, "--quiet")
    except SystemExit as exit:
        status = exit.code
    assert status in (1, 2) and message in capsys.readouterr().err


def test_everything_holds_the_strongest_single_attack():
    suite = evaluation.make_suite("everything", "8/255", restarts=2)
    attack = suite["apgd-ce-assg100-8/255"]
    assert (attack.name, attack.adjoint, attack.steps, attack.restarts) == ("apgd-ce", "assg", 100, 2) and "apgd-ce-assg100-8/255" in suite.skips
    assert suite["apgd-ce100-8/255"].adjoint != "assg"


def test_options_reach_the_attacks(tmp_path, capsys):
    snn = copy_of("snn", tmp_path)
    words = ("--eps", "0.5", "--norm", "l2", "--steps", "3", "--restarts", "2", "--limit", "20", "--check-images", "5", "--predictions", "2", "--eot", "2")
    assert run("attack", snn, *words) == 0
    said = capsys.readouterr()
    found = record(snn)
    options = found["results"]["pgd3-0.5"]["attack"]
    assert (options["norm"], options["steps"], options["restarts"], options["eot"]) == ("l2", 3, 2, 2) and found["settings"]["predictions"] == 2
    assert "each prediction the mean of 2 passes" in said.out and "of the work is done" in said.err


def test_files_of_before_lack_new_settings(tmp_path, capsys):
    """A file that says nothing of a setting was made with what the option is by default."""
    snn = copy_of("snn", tmp_path)
    words = ("attack", snn, "--eps", "8/255", "--limit", "20", "--check-images", "0", "--quiet")
    assert run(*words) == 0
    found = record(snn)
    for name in ("norm", "steps", "restarts", "curve_steps", "predictions", "transfer_from", "compare"):
        del found["settings"][name]
    for name in ("checks", "curves", "worst_cases"):
        del found[name]
    checkpoints.write_json(f"{snn}/attacks-quick.json", found)
    capsys.readouterr()
    assert run(*words) == 0 and "holds these results already" in capsys.readouterr().out


def test_a_twin_that_withstands_as_well_tells_nothing():
    rows = {"clean": {"accuracy": 0.9, "interval": [0.8, 0.95]}}
    twin = {"weights": {}, "results": rows, "worst_cases": {"linf 1/255": {"accuracy": 0.85}}}
    (check,) = attack.compared({"checks": []}, twin, "runs/twin")["checks"]
    assert check["verdict"] == "suspicious" and "85.0 % of the twin twin at linf 1/255, of 90.0 % clean: too weak, or too small" in check["text"]
    twin["worst_cases"]["linf 8/255"] = {"accuracy": 0.1}
    assert attack.compared({"checks": []}, twin, "runs/twin")["checks"][0]["verdict"] == "ok"


@pytest.mark.parametrize("words, message", [
    (["--compare", "none"], "none: there is no such folder"),
    (["--transfer-from", "none"], "none: there is no such folder"),
])  # fmt: skip
def test_runs_that_are_not_there(tmp_path, words, message, capsys):
    assert run("attack", copy_of("snn", tmp_path), *words, "--quiet") == 1 and message in capsys.readouterr().err
