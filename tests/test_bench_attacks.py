"""bench/attacks.py: what it writes, what it refuses to time, and that its bound is the one it tells."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from trained import digits, network

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_attacks", BENCH / "attacks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCH))


def test_it_writes_what_it_measured(bench, tmp_path, capsys):
    path = tmp_path / "attacks.json"
    assert bench.main(["--images", "10", "--batch-size", "8", "--repeat", "1", "--suites", "quick", "--json", str(path)]) == 0
    result, text = json.loads(path.read_text()), capsys.readouterr().out
    row = result["ensemble"]
    assert (row["status"], row["images"], row["members"], row["sharing"], row["rounds"]) == ("ok", 8, 19, 18, 1)
    assert row["b"] == row["backward"] / row["forward"] > 0 and row["crafting_ratio"] == row["crafting_shared"] / row["crafting_separate"]
    assert row["bound"] == pytest.approx(1.05 * (1 + 18 * row["b"]) / (18 * (1 + row["b"])))
    assert row["within"] == (row["crafting_ratio"] <= row["bound"])
    assert f"takes {row['crafting_ratio']:.3f}" in text and f"may take {row['bound']:.3f}" in text
    assert 0 < row["crafting_shared"] < row["judged_shared"] and 0 < row["crafting_separate"] < row["judged_separate"]
    (suite,) = result["suites"]
    assert (suite["suite"], suite["images"], suite["attacks"]) == ("quick", 10, 2) and suite["worst"] <= suite["clean"]
    assert suite["seconds_per_1000"] == pytest.approx(100 * suite["seconds"]) and f"| {suite['seconds_per_1000']:.1f} |" in text
    assert {"machine", "versions", "commit", "settings", "cpu_used_by_others"} <= set(result) and "equal bit for bit" in text


def test_images_that_differ_are_not_timed(bench, monkeypatch, capsys):
    real = bench.separate
    monkeypatch.setattr(bench, "separate", lambda eps, members: [*real(eps, members[:-2]), *real(eps / 2, members[-2:])])
    assert bench.main(["--images", "4", "--suites"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: images differ from those of separate attacks: bptr, cba" in text and "shared" not in text


def test_the_check_compares_every_member(bench):
    x, y = digits(6)
    assert bench.check(network("snn"), x, y, 8 / 255) == []


def test_an_untrained_network(bench, capsys):
    assert bench.main(["--model", "small_cnn", "--steps", "1", "--images", "1", "--repeat", "1"]) == 0
    text = capsys.readouterr().out
    assert "untrained, T = 1" in text and "suite" not in text


@pytest.mark.parametrize("arguments, wanted", [(["--images", "0"], "at least 1"), (["--eps", "x"], "--eps"), (["--suites", "quik"], "invalid choice")])
def test_wrong_options_are_told(bench, arguments, wanted, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and wanted in capsys.readouterr().err
