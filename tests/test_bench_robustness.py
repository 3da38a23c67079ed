"""bench/robustness.py: rows are recipes, what was stopped goes on to the same bits, and the table says what the rows hold."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastsnn import checkpoints, recipes, training
from fastsnn.attacks import Ensemble
from fastsnn.defenses import defense_options
from fastsnn.evaluation import wilson
from torch import nn

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    try:
        import robustness

        yield robustness
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def jobs(bench):
    return bench.jobs


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A budget of seconds."""
    out = tmp_path_factory.mktemp("robustness")
    words = ["--defenses", "vanilla", "mpd-sgr", "--seeds", "0", "--epochs", "2", "--train-limit", "160", "--limit", "12", "--members", "ensemble", "--quiet"]
    return [*words, "--out", str(out)]


@pytest.fixture(scope="module")
def measured(bench, options):
    """Both networks of that budget, trained and attacked."""
    planned = bench.plan(bench.checked(options))
    return {job.name: (job, bench.jobs.run(job)) for job in planned}


def weights(job):
    return checkpoints.load(job.run / checkpoints.LAST)[0]


# ---- one network -------------------------------------------------------------------------------------------------------------


def test_a_row_holds_what_the_network_does(measured, jobs):
    job, row = measured["mpd-sgr"]
    model, run = checkpoints.load_run(job.run, "last")
    from fastsnn import data

    found = data.load("digits").limited(test=12)
    x, y = found.x_test.float() / 255, found.y_test
    with torch.no_grad():
        right = model(x).argmax(1) == y
    assert row["correct"]["clean"] == "".join(str(int(flag)) for flag in right)
    worst = [all(row["correct"][name][place] == "1" for name in ("clean", "fgsm", "pgd7", "ensemble-fgsm", "ensemble-pgd7")) for place in range(12)]
    assert row["correct"]["worst"] == "".join(str(int(flag)) for flag in worst)
    assert (row["random"], row["eot"], row["test_images"], run["config"]["epochs"], run["config"]["validation"]) == (False, 1, 12, 2, 0.0)
    assert row["training"]["seconds"] > 0 and row["training"]["clock"] == "CPU"


def test_quantities_against_plain_pytorch(jobs):
    """Singular values, membranes near the threshold and the gradient, of a network with one layer of neurons that are never reset."""
    from fastsnn import models

    torch.manual_seed(0)
    model = models.small_cnn(widths=[4], image=(1, 8, 8), classes=3, steps=1, norm="none").double().eval()
    x, y = torch.rand(130, 1, 8, 8, dtype=torch.float64), torch.randint(3, (130,))
    found = jobs.quantities(model, x, y, 8 / 255)
    conv, classifier = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    h = conv(x)
    assert found["guard"] == pytest.approx(((h - 1).abs() < 0.25).double().mean().item(), abs=1e-9)
    assert found["rate"] == pytest.approx((h >= 1).double().mean().item(), abs=1e-9)
    values = torch.cat([torch.linalg.svdvals(layer.weight.detach().flatten(1)) for layer in (conv, classifier)])
    assert found["singular"] == pytest.approx((values - 1).abs().mean().item(), abs=1e-9)
    leaf = x[:100].clone().requires_grad_()
    h = conv(leaf)
    soft = h - 1 - (h - 1) * (h - 1).abs() / 2  # its derivative within the window is the triangle 1 - |z|
    spikes = (h >= 1).double() + torch.where((h - 1).abs() < 1, soft - soft.detach(), 0.0)
    logits = classifier(spikes.mean((-2, -1)))
    own = logits.gather(1, y[:100, None])[:, 0]
    rival = logits.detach().scatter(1, y[:100, None], -torch.inf).argmax(1)
    p = own.exp() / (own.exp() + logits.gather(1, rival[:, None])[:, 0].exp())
    (gradient,) = torch.autograd.grad(p.sum(), leaf)
    assert found["gradient"] == pytest.approx(gradient.abs().sum((1, 2, 3)).mean().item(), rel=1e-9)
    assert found["sparsity"] == pytest.approx((gradient.abs() < 0.01).double().mean().item(), abs=1e-9)


def test_a_stopped_training_goes_on_to_the_same_weights(measured, jobs, tmp_path):
    job = replace(measured["vanilla"][0], out=str(tmp_path))
    training.train(replace(job.config(), max_steps=4, checkpoint_every=1), progress=False)  # killed after its fourth step
    assert checkpoints.load(job.run / checkpoints.LAST)[1]["step"] == 4
    told = jobs._train(job)
    want = weights(measured["vanilla"][0])
    assert told["steps"] == 10 and all(torch.equal(value, want[name]) for name, value in weights(job).items())
    steps, seconds = json.loads((job.folder / "seconds.json").read_text())["pieces"][0]
    assert steps == 6 and told["seconds"] == pytest.approx(seconds * 10 / 6), "the steps that were killed count at the price of the others"


def test_a_stopped_evaluation_is_not_begun_anew(measured, jobs, monkeypatch):
    job, row = measured["vanilla"]
    job.row.rename(job.folder / "kept.json")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "quantities", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            jobs.run(job)
    assert (job.folder / "attacks.part").exists() and not job.row.exists()
    monkeypatch.setattr(Ensemble, "run", lambda *_: pytest.fail("an attack ran again"))
    again = jobs.run(job)
    assert again["correct"] == row["correct"] and again["quantities"] == row["quantities"] and again["training"] == row["training"]
    assert jobs.read_row(job) == again and jobs.read_row(replace(job, limit=11)) is None
    with pytest.raises(ValueError, match="epochs 2 to 3"):
        jobs.read_row(replace(job, epochs=3))


# ---- rows and budget ---------------------------------------------------------------------------------------------------------


def test_rows_are_recipes(bench):
    rows = bench.rows_of("cpu-*")
    assert set(rows.values()) == {name for name in recipes.names() if name.startswith("cpu-")} and rows["mpd-sgr"] == "cpu-mpd-sgr"
    assert bench.rows_of("*-wrn16-cifar100")["tgo"] == "tgo-wrn16-cifar100"
    planned = bench.plan(bench.checked(["--seeds", "3", "4"]))
    names = [job.name for job in planned if job.seed == 3]
    assert [job.seed for job in planned] == [3] * len(names) + [4] * len(names) and "ann" not in names and "convert-tune" not in names and len(names) > 20
    with pytest.raises(ValueError, match="'mpdsgr' is unknown.*Did you mean 'mpd-sgr'"):
        bench.plan(bench.checked(["--defenses", "mpdsgr"]))


@pytest.mark.parametrize("recipe", [name for name in recipes.names() if name.startswith("cpu-")])
def test_one_radius_for_all(jobs, recipe):
    job = jobs.Job("row", recipe, 0, "nowhere", train_eps="4/255", epochs=3, data="digits")
    config = job.config()
    options = config.of_defenses()
    for part in config.defense.split("+"):
        if "eps" in defense_options(part):
            assert options[part]["eps"] in (4 / 255, "4/255")
            step = options[part].get("step_size")
            assert step is None or step <= 4 / 255
    assert (config.epochs, config.validation, config.seed) == (3, 0.0, 0)


@pytest.mark.parametrize(
    "arguments, wanted",
    [(["--workers", "0"], "--workers is 0"), (["--eps", "9"], "--eps"), (["--recipes", "cpu"], "one star"), (["--paper", "no.json"], "there is no file")],
)
def test_wrong_options_are_told(bench, arguments, wanted, capsys, monkeypatch):
    monkeypatch.setattr(bench, "work", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and wanted in capsys.readouterr().err


# ---- the whole ---------------------------------------------------------------------------------------------------------------


def test_the_table_is_made_of_what_is_there(bench, measured, options, tmp_path, capsys):
    paper = tmp_path / "paper.json"
    figures = [("clean", None, 92.5), ("fgsm", 8 / 255, 45.25), ("pgd", 8 / 255, 12.5)]
    rows = [{"method": "MPD-SGR", "train": "vanilla(no AT)", "dataset": "CIFAR10", "arch": "VGG11", "T": 8, "attack": a, "eps": e, "acc": v, "source": "Table 9"} for a, e, v in figures]
    paper.write_text(json.dumps({"rows": rows}))
    assert bench.main([*options, "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"), "--paper", str(paper)]) == 0
    text, result = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert "2 of 2 networks" in text and "2 epochs" in text and "through 19 gradient approximations" in text
    assert "| mpd-sgr | " in text and "92.5, 45.25, 12.5 | VGG11, T = 8 | Table 9 |" in text
    assert [one["name"] for one in result["summaries"]] == sorted(measured, key=lambda name: (-measured[name][1]["correct"]["worst"].count("1"), -measured[name][1]["correct"]["clean"].count("1"), name))
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG" and {"machine", "versions", "commit", "settings"} <= set(result)
    out = Path(options[-1])
    assert (out / "robustness.md").read_text().strip() in text and (out / "robustness.json").read_text() == (tmp_path / "r.json").read_text()


def test_a_failure_is_told(bench, options, capsys):
    """A worker of its own process: more images are asked for in a batch than there are."""
    out = Path(options[-1]) / "failing"
    assert bench.main(["--defenses", "vanilla", "--seeds", "0", "--train-limit", "160", "--batch-size", "999", "--quiet", "--out", str(out)]) == 1
    text = capsys.readouterr().out
    assert "- vanilla, seed 0: ValueError: train: batch_size is 999" in text and "Nothing is measured yet" in text


def row_of(name, seed, worst, defense="vanilla", omega=0.5, seconds=10.0, random=False):
    correct = {key: "1" * count + "0" * (20 - count) for key, count in {"clean": 18, "fgsm": 12, "pgd7": 10, "worst": worst, "uniform": 17, "gaussian": 16}.items()}
    quantities = {"omega": omega, "guard": 0.2, "rate": 0.1, "singular": 0.4, "sparsity": 0.3, "gradient": 5.0, "shift": 0.6}
    training = {"seconds": seconds, "clock": "CPU", "steps": 5}
    return dict(name=name, seed=seed, defense=defense, random=random, correct=correct, quantities=quantities, training=training, test_images=20, warnings=[])


def test_ranks_means_and_what_each_is_about(bench):
    tables = bench.tables
    rows = [row_of("vanilla", 0, 3), row_of("vanilla", 1, 5), row_of("mpd-sgr", 0, 9, "mpd-sgr", 0.25, 11.0), row_of("mpd-sgr", 1, 7, "mpd-sgr", 0.25, 13.0), row_of("up", 0, 1, "mpd-sgr", 0.75)]
    found = tables.summarise(rows)
    assert [one.name for one in found] == ["mpd-sgr", "vanilla", "up"]
    assert found[0].accuracies["worst"] == pytest.approx(0.4) and found[0].intervals["worst"] == wilson(8, 20) and found[0].worst_of_each == (0.45, 0.35)
    text = tables.markdown(found, ["Budget: none."], {"sr, seed 0": "ValueError: no"})
    assert "Omega 0.500 → 0.250 |" in text and "Omega 0.500 → 0.750, the other way |" in text and "| 1.20 |" in text and "- sr, seed 0: ValueError: no" in text
    assert tables.about("sr+at") == ["sparsity", "gradient", "pgd7"] and tables.about("feel") == ["shift"] and tables.about("vanilla") == []


def test_every_defense_is_about_something(bench):
    from fastsnn.defenses import DEFENSES

    for name in DEFENSES:
        assert name == "vanilla" or all(key in bench.tables.QUANTITIES for key in bench.tables.about(name)) and bench.tables.about(name)
