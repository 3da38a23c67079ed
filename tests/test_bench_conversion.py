"""bench/conversion.py: one command from an ANN to attacks; what was stopped goes on, and the table says what the runs hold."""

import json
import sys
from pathlib import Path

import pytest
import torch
from fastsnn import checkpoints, data

BENCH = Path(__file__).resolve().parent.parent / "bench"
#: Seconds: one ANN, trained naturally.
SMALL = ["--recipes", "cpu-ann", "--train-limit", "200", "--epochs", "1", "--tune-epochs", "1", "--steps", "3", "--plain-steps", "8",
         "--calibration-steps", "8", "--batches", "2", "--suite", "quick", "--limit", "30", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        import conversion

        yield conversion
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def measured(bench, tmp_path_factory):
    """The folder of that budget, and what was written of it."""
    out = tmp_path_factory.mktemp("conversion")
    assert bench.main([*SMALL, "--out", str(out), "--json", str(out / "copy.json"), "--plot", str(out / "copy.png")]) == 0
    return out, json.loads((out / "copy.json").read_text())


def test_the_row_holds_what_the_networks_do(measured):
    out, found = measured
    (row,) = found["rows"]
    images = data.load("digits").limited(test=30)
    x, y = images.x_test.float() / 255, images.y_test
    for part in ("ann", "snn", "plain", "robust"):
        model, run = checkpoints.load_run(out / f"cpu-ann-{part}")
        with torch.no_grad():
            right = (model.eval()(x).argmax(1) == y).sum().item()
        assert row["accuracy"][part] == right / len(y)
        assert model.steps == {"ann": 1, "snn": 3, "plain": 8, "robust": 3}[part]
        assert run["config"]["readout"] == "sum"
    attacked = json.loads((out / "cpu-ann-robust" / "attacks-quick.json").read_text())
    assert row["attacks"]["clean"]["accuracy"] == row["accuracy"]["robust"]
    assert row["worst"]["accuracy"] <= min(entry["accuracy"] for entry in row["attacks"].values())
    assert row["worst"]["accuracy"] == attacked["worst"]["accuracy"] and row["worst"]["total"] == len(y)
    assert row["peak_memory"] > 0 and row["seconds"]["robust"] > 0 and len(row["thresholds"]) == 3
    assert [steps for steps, _ in found["coding"]["cpu-ann-plain"]["by_steps"]] == [1, 2, 4, 8]


def test_the_table_says_it(measured):
    out, found = measured
    text, (row,) = (out / "conversion.md").read_text(), found["rows"]
    line = next(line for line in text.splitlines() if line.startswith("| `cpu-ann` |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == [f"{100 * row['accuracy'][part]:.1f}" for part in ("ann", "snn", "robust")]
    assert cells[4:6] == [f"{100 * row['attacks'][f'{name}-8/255']['accuracy']:.1f}" for name in ("fgsm", "pgd7")]
    assert cells[6].startswith(f"{100 * row['worst']['accuracy']:.1f} (") and cells[7] == f"{100 * row['accuracy']['plain']:.1f}"
    assert "digits" in text and "1 epochs of the ANN" in text and "T = 3" in text and str(out) not in json.dumps(found)
    assert (out / "copy.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_made_again(bench, measured, monkeypatch):
    out, found = measured
    before = {path: path.read_bytes() for path in out.glob("*/*.safetensors")}
    asked = []
    monkeypatch.setattr(bench, "die_with", lambda parent: None)
    monkeypatch.setattr(bench, "command", lambda words: asked.append(words[0]) or 0)
    (chain,) = bench.chains(bench.checked([*SMALL, "--out", str(out)]))
    assert bench.follow(chain, 0) == 0 and asked == []
    kept = chain.attacked.rename(out / "kept.json")
    try:
        assert bench.follow(chain, 0) == 0 and asked == ["attack"]
    finally:
        kept.rename(chain.attacked)
    run = checkpoints.read_run(chain.run("robust"))
    checkpoints.write_json(chain.run("robust") / checkpoints.RUN, run | {"finished": False})
    stages = {what: words for what, _, words in chain.stages()}
    assert "--resume" in stages["fine-tuning"] and "--recipe" not in stages["fine-tuning"]
    checkpoints.write_json(chain.run("robust") / checkpoints.RUN, run)
    assert {path: path.read_bytes() for path in out.glob("*/*.safetensors")} == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "2"], "was begun with --epochs 1"),
        (["--recipes", "cpu-an"], "'cpu-an' is no recipe"),
        (["--tune", "nothing"], "'nothing' is no recipe"),
    ],
)
def test_what_cannot_be_is_told(bench, measured, capsys, words, told):
    assert bench.main([*SMALL, *words, "--out", str(measured[0])]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "--steps is 0; wanted a whole number >= 1"),
        (["--eps", "far"], "--eps"),
        (["--suite", "all"], "invalid choice"),
        (["--beside", "nowhere"], "nowhere is not the folder of a run"),
        (["--beside", "one/run", "other/run"], "several networks are called run"),
        (["--beside", "runs/cpu-ann-snn"], "several networks are called cpu-ann-snn"),
    ],
)
def test_bad_options_end_it_before_anything_runs(bench, tmp_path, capsys, words, told):
    with pytest.raises(SystemExit) as raised:
        bench.main([*SMALL, *words, "--out", str(tmp_path / "out")])
    assert raised.value.code == 2 and told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_chain_that_fails_is_named_with_its_log(bench, tmp_path, capsys):
    assert bench.main([*SMALL, "--data", str(tmp_path / "none.npz"), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "training the ANN ended with status" in said and "cpu-ann.log" in said
    assert "none.npz" in (tmp_path / "out" / "cpu-ann.log").read_text()
