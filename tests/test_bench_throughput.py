"""bench/throughput.py: what it writes, whom it does not time, and what it says to wrong options before any work."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
SMALL = ["--steps", "4", "--neurons", "4096", "--dtypes", "float32", "--repeat", "3"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("measure", "show", "peers", "throughput"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import throughput

    yield throughput
    for name in ("measure", "show", "peers", "throughput"):
        sys.modules.pop(name, None)


def test_a_run_is_checked_timed_and_written(bench, tmp_path, capsys):
    out = tmp_path / "new folder" / "out.json"
    assert bench.main([*SMALL, "--competitors", "fastsnn-cpu", "fastsnn-cpu-statistics", "loop", "--json", str(out)]) == 0
    rows = {row["competitor"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["copy", "fastsnn-cpu", "fastsnn-cpu-statistics", "loop"]
    assert all(row["status"] == "ok" and row["samples"] == 3 for row in rows.values())
    ours, loop = rows["fastsnn-cpu"], rows["loop"]
    assert ours["memory"] == pytest.approx({"inference_peak": 5.0, "live_after_forward": 5.0, "training_peak": 9.0}, abs=0.1)
    assert ours["training"]["best_other_over_this"] == pytest.approx(loop["training"]["seconds"] / ours["training"]["seconds"])
    assert ours["training"]["copies"] == pytest.approx(ours["training"]["seconds"] / rows["copy"]["inference"]["seconds"])
    printed = capsys.readouterr().out
    assert bench.main(["--table", str(out)]) == 0
    assert "| fastsnn-cpu |" in capsys.readouterr().out and "fastsnn-cpu-statistics" in printed


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda out: dataclasses.replace(out, spikes=1 - out.spikes), "neurons spike otherwise than in the reference"),
        (lambda out: dataclasses.replace(out, v=out.v + 1), "the final state differs in 4096 neurons"),
        (lambda out: dataclasses.replace(out, spikes=Half.apply(out.spikes)), "the gradient of x is off"),
    ],
    ids=["spikes", "state", "gradient"],
)
def test_a_wrong_competitor_is_not_timed(bench, monkeypatch, capsys, tmp_path, wrong, reason):
    import peers

    right = peers.lif
    monkeypatch.setattr(peers, "lif", lambda *arguments: wrong(right(*arguments)))
    out = tmp_path / "out.json"
    assert bench.main([*SMALL, "--competitors", "fastsnn-cpu", "loop", "--json", str(out)]) == 1
    row = next(row for row in json.loads(out.read_text())["rows"] if row["competitor"] == "fastsnn-cpu")
    assert row["status"] == "FAILED" and row["training"] is None
    assert reason in row["reason"]
    assert "FAILED the check against the reference: fastsnn-cpu" in capsys.readouterr().err


class Half(torch.autograd.Function):
    """Identity with half the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--json", "/proc/nobody/out.json"], "--json /proc/nobody/out.json: cannot be written"),
        (["--json", "."], "that is a folder"),
        (["--plot", "picture.xyz"], "wanted a file that ends in .png, .pdf, .svg"),
        (["--table", "there/is/none.json"], "cannot be read"),
        (["--table", str(BENCH / "results" / "static-gpu.json")], "is no result of this program"),
        (["--table", str(BENCH / "peers.py")], "is no result of this program"),
        (["--repeat", "0"], "must be at least 1"),
        (["--neurons", "1000"], "wanted a multiple of 4096"),
        (["--competitors", "fastsnn-gpu"], "unknown; there are fastsnn-cpu"),
    ],
)
def test_wrong_options_are_told_before_the_work(bench, capsys, options, text):
    with pytest.raises(SystemExit) as caught:
        bench.main(options)
    assert caught.value.code == 2 and text in capsys.readouterr().err
