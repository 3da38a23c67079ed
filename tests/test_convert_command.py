"""`fastsnn convert`, `fastsnn coding` and trainings that start from another run: from an ANN's run to a spiking network's that is tuned and attacked."""

import json
import re
import shutil
from pathlib import Path

import fastsnn
import pytest
import torch
from fastsnn import __main__ as cli
from fastsnn import checkpoints, coding, data, models, recipes, runs, starts
from fastsnn.commands import convert as command
from fastsnn.commands import train
from fastsnn.recipes import Config
from torch import nn

from trained import FOLDER, network

ANN, SNN = FOLDER / "ann", FOLDER / "snn"
SMALL = ["--steps", "3", "--batches", "2", "--batch-size", "48", "--calibration-steps", "12", "--rho", "0.98", "--kappa", "0.5", "--limit", "60", "--images", "30", "--data", "digits"]
TUNE = ["train", "--recipe", "cpu-convert-tune", "--train-limit", "200", "--batch-size", "64", "--epochs", "2", "--quiet"]


def run(*arguments):
    return cli.main([*map(str, arguments)])


def settings(*arguments):
    return train.settings(cli.parser().parse_args(["train", *map(str, arguments)]))


def weights(folder, file=checkpoints.LAST):
    return checkpoints.part(checkpoints.load(Path(folder) / file)[0], checkpoints.MODEL)


def assert_same_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def snn(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "snn"
    assert run("convert", ANN, "--out", out, *SMALL, "--curve-steps", "1", "2", "--quiet") == 0
    return out


# ---- conversion --------------------------------------------------------------------------------------------------------------


def test_the_first_threshold_is_that_of_a_plain_computation(snn):
    """The input of the first neurons is the same at every step: conv, then batch norm by the batch's own statistics."""
    model, about = checkpoints.load_run(snn)
    state, found = weights(ANN, checkpoints.BEST), data.load("digits")
    chosen, _ = data.split(found.x_train, found.y_train, validation=about["config"]["validation"], seed=0)
    images = command.calibration_images(found.x_train[chosen], 96, 0).double() / 255
    assert len({image.numpy().tobytes() for image in images}) > 90
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in about["model"]["normalise"])
    values = []
    for batch in images.split(48):
        x = nn.functional.conv2d((batch - mean) / std, state["features.0.conv.weight"].double(), state["features.0.conv.bias"].double(), padding=1)
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        x = x * state["features.0.norm.weight"].double()[:, None, None] + state["features.0.norm.bias"].double()[:, None, None]
        values.append(x.flatten().sort().values[round(0.98 * (x.numel() - 1))].item())
    first = about["converted"]["report"]["layers"][0]
    assert first["batch_values"] == pytest.approx(values, rel=1e-5)
    assert model.features[0].neuron.threshold.item() == pytest.approx(0.5 * max(values), rel=1e-5)


def test_what_a_converted_run_says_holds(snn):
    model, about = checkpoints.load_run(snn)
    ann, _ = checkpoints.load_run(ANN)
    assert model.steps == 3 and about["model"] == model.spec and about["converted"]["weights"]["fingerprint"] == checkpoints.fingerprint(ANN / checkpoints.BEST)
    for name, value in ann.named_parameters():
        if "norm" not in name:
            assert torch.equal(model.get_parameter(name), value), name
    report = about["converted"]["report"]
    assert [layer["threshold"] for layer in report["layers"]] == [layer.threshold.item() for _, layer in model.spiking_layers()]
    test = data.load("digits").limited(test=60)
    for name, network in (("ANN", ann), ("converted", model)):
        with torch.no_grad():
            right = network(test.x_test.float() / 255).argmax(1) == test.y_test
        row = about["converted"]["measured"][name]
        assert row["accuracy"] == right.double().mean() and row["total"] == 60
    assert [count for count, _ in row["by_steps"]] == [1, 2, 3] and row["by_steps"][-1][1] == row["accuracy"]
    assert all((snn / name).read_bytes().startswith(b"\x89PNG") for name in ("steps.png", "spikes.png"))
    # The settings make the same network, also where normalisation is the data's own.
    config = Config(**about["config"])
    assert runs.build_model(config, 10, (1, 8, 8), about["model"]["normalise"]).spec == model.spec
    assert report["seconds_per_batch"] > 0 and report["peak_memory"] > 2**20


def test_what_is_printed(tmp_path, capsys):
    assert run("convert", ANN, "--out", tmp_path / "snn", *SMALL, "--method", "plain", "--decay", "0.9", "--surrogate", "atan:2.0", "--curve-steps", "4") == 0
    text = capsys.readouterr()
    for words in ("plain conversion to T = 3", "features.4.neuron", "s a mini-batch", "peak memory", "ANN", "converted", "95 % interval", "spikes/image", "accuracy, T =", "error of rates, T =", str(tmp_path / "snn")):
        assert words in text.out, words
    assert "convert: features.0.neuron" in text.err
    spec = checkpoints.load_run(tmp_path / "snn")[0].spec
    assert spec["neuron"] == "lif" and spec["neuron_options"] == {"reset": "soft", "decay": 0.9, "surrogate": "atan:2.0", "threshold": 1.0, "learn": ["threshold"]}


@pytest.mark.parametrize("name, kappa", [("cifar100", 0.1), ("tiny", 0.1), ("cifar10", None), ("digits", None)])
def test_kappa_is_that_of_the_data(name, kappa):
    arguments = cli.parser().parse_args(["convert", "RUN"])
    assert command.options_of(arguments, name)["kappa"] == kappa
    arguments.kappa = 0.7
    assert command.options_of(arguments, name)["kappa"] == 0.7
    arguments.kappa, arguments.method = None, "plain"
    assert command.options_of(arguments, name)["kappa"] is None


MISTAKES = [
    (["convert", SNN], 1, "is a network of neurons 'if'; wanted an ANN, of 'relu'. Train one: fastsnn train --ann"),
    (["convert", ANN, "--out", SNN], 1, "holds a run already; wanted a new folder"),
    (["convert", ANN, "--steps", "0", "--data", "digits"], 1, "steps is 0; wanted an int >= 1"),
    (["convert", ANN, "--rho", "99.7", "--data", "digits"], 1, "rho is 99.7; wanted a share in (0, 1]"),
    (["convert", ANN, "--method", "robus"], 2, "'robus' is unknown; wanted one of robust, plain. Did you mean 'robust'?"),
    (["convert", ANN, "--surrogate", "atam", "--data", "digits"], 1, "Did you mean 'atan'?"),
    (["convert", "none"], 1, "there is no such folder"),
    (["coding", "none"], 1, "there is no such folder"),
    ([*TUNE, "--init", "none"], 1, "none: there is no such folder. Wanted a folder that `fastsnn train --out` has made."),
    ([*TUNE, "--init", ANN, "--neuron", "if"], 1, "an ANN, and the network of these settings is spiking: its thresholds would not fit the weights. Convert it: fastsnn convert"),
    ([*TUNE, "--init", SNN, "--model-options", "widths=[8,16]"], 1, "whose small_cnn has classifier.weight [10, 32]; the network of these settings has classifier.weight [10, 16]. Leave the settings of the network out"),
    ([*TUNE, "--init", SNN, "--model-options", "widths=[8,16,24]"], 1, "has features.4.conv.weight [32, 16, 3, 3]; the network of these settings has features.4.conv.weight [24, 16, 3, 3]"),
    ([*TUNE, "--init", SNN, "--model", "vgg11"], 1, "the model is vgg11, and init is"),
    (["train", "--ann", "--neuron", "lif"], 1, "--ann trains ReLU in place of neurons, and --neuron is given too"),
    (["train", "--ann", "--surrogate", "atan"], 1, "and --surrogate is given too"),
]


@pytest.mark.parametrize("arguments, status, message", MISTAKES)
def test_mistakes(arguments, status, message, tmp_path, capsys):
    words = [*map(str, arguments)]
    if "--out" not in words and words[0] != "coding":
        words += ["--out", str(tmp_path / "out")]
    try:
        found = cli.main(words)
    except SystemExit as end:
        found = end.code
    error = capsys.readouterr().err
    assert found == status and re.search(re.escape(message), error), error
    assert not (tmp_path / "out" / checkpoints.RUN).exists()


def test_other_images_are_refused(tmp_path, capsys):
    found = data.load("digits")
    other = data.Dataset("digits", found.x_train[:200], found.y_train[:200], found.x_test[:50], found.y_test[:50], found.labels).save(tmp_path / "other.npz")
    for arguments in (("convert", ANN, "--out", tmp_path / "out"), ("coding", SNN)):
        assert run(*arguments, "--data", other) == 1 and "holds other images than" in capsys.readouterr().err


# ---- trainings that start from another run -------------------------------------------------------------------------------------


def test_tuning_starts_from_the_converted_weights(snn, tmp_path, capsys):
    out = tmp_path / "tuned"
    assert run(*[word for word in TUNE if word != "--quiet"], "--init", snn, "--out", out, "--max-steps", "1", "--lr", "1e-20") == 0
    assert f"starts from {snn}, its best.safetensors" in capsys.readouterr().err
    found, wanted = weights(out), weights(snn, checkpoints.BEST)
    assert found.keys() == wanted.keys()
    for name, _ in checkpoints.load_run(snn)[0].named_parameters():
        assert torch.equal(found[name], wanted[name]), name
    about = checkpoints.read_run(out)
    # So few training images have other means; the weights were made for those of the ANN.
    assert about["model"] == checkpoints.read_run(snn)["model"]
    assert about["init"]["run"] == str(snn) and about["init"]["weights"]["fingerprint"] == checkpoints.fingerprint(snn / checkpoints.BEST)
    assert run("train", "--resume", "--out", snn) == 1 and "was made by `fastsnn convert`" in capsys.readouterr().err


def test_tuned_resumed_attacked(snn, tmp_path, capsys):
    """Stopped and resumed is what was never stopped, with and without a checkpoint; then the usual attacks and the coding of both runs."""
    start = shutil.copytree(snn, tmp_path / "snn")
    assert run(*TUNE, "--init", start, "--out", tmp_path / "whole") == 0
    assert run(*TUNE, "--init", start, "--out", tmp_path / "stopped", "--max-steps", "1") == 0
    lost = shutil.copytree(tmp_path / "stopped", tmp_path / "lost")
    (lost / checkpoints.LAST).unlink()
    assert run("train", "--resume", "--out", lost, "--max-steps", "0", "--quiet") == 0
    assert_same_weights(weights(lost), weights(tmp_path / "whole"))
    assert max((weights(lost)[name] - value).abs().max() for name, value in weights(start).items() if name.endswith("threshold")) > 0
    # Other weights in the folder of then: refused where they are needed, of no account where there is a checkpoint.
    other = shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    (other / checkpoints.LAST).unlink()
    shutil.copy(SNN / checkpoints.BEST, start / checkpoints.BEST)
    capsys.readouterr()
    assert run("train", "--resume", "--out", other, "--quiet") == 1 and "holds other weights than the run started from" in capsys.readouterr().err
    shutil.rmtree(start)
    assert run("train", "--resume", "--out", other, "--quiet") == 1 and "there is no such folder" in capsys.readouterr().err
    assert run("train", "--resume", "--out", tmp_path / "stopped", "--max-steps", "0", "--quiet") == 0
    assert_same_weights(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert run("train", "--resume", "--out", tmp_path / "stopped", "--init", snn, "--quiet") == 1 and "cannot change init" in capsys.readouterr().err

    assert run("attack", tmp_path / "whole", "--eps", "8/255", "--limit", "20", "--check-images", "0", "--quiet") == 0
    assert "pgd7-8/255" in capsys.readouterr().out
    assert run("coding", tmp_path / "whole", snn, ANN, "--data", "digits", "--steps", "1", "2", "--limit", "60", "--out", tmp_path / "coding") == 0
    rows = json.loads((tmp_path / "coding" / "coding.json").read_text())
    assert list(rows) == ["whole", "snn", "ann"] and rows["ann"]["coding"] is None and (tmp_path / "coding" / "steps.png").exists()
    assert rows["snn"]["accuracy"] == checkpoints.read_run(snn)["converted"]["measured"]["converted"]["accuracy"]


def test_changes_to_the_network_are_said():
    model, spec = network("snn"), checkpoints.read_run(SNN)["model"]
    start = starts.Start(SNN, {}, spec)
    assert start.changes(model) == "" and start.changes(coding.with_steps(model, 6)) == ", with changes: steps 4 to 6"


def test_a_training_of_its_own_seed_takes_no_start_later(tmp_path, capsys):
    plain = tmp_path / "plain"
    assert run("train", "--recipe", "digits", "--model-options", "widths=[4]", "--train-limit", "120", "--epochs", "1", "--out", plain, "--quiet") == 0
    assert run("train", "--resume", "--out", plain, "--init", SNN, "--quiet") == 1
    assert "cannot change init" in capsys.readouterr().err
    saved = json.loads((plain / checkpoints.RUN).read_text())
    del saved["config"]["init"]  # as a run of before has it
    (plain / checkpoints.RUN).write_text(json.dumps(saved))
    assert run("train", "--resume", "--out", plain, "--init", SNN, "--quiet") == 1 and "started from weights of its own seed" in capsys.readouterr().err


# ---- settings ----------------------------------------------------------------------------------------------------------------


def test_ann_stands_for_relu_over_any_recipe():
    found = settings("--ann", "--recipe", "vanilla-vgg11-cifar10")
    assert (found.neuron, found.norm, found.surrogate, found.neuron_options, found.model) == ("relu", "bn", "auto", {}, "vgg11")
    assert settings("--ann", "--model", "small_cnn", "--norm", "tdbn").norm == "tdbn"
    assert settings("--ann", "--recipe", "cpu-ann-at") == settings("--recipe", "cpu-ann-at")
    assert settings("--ann", "--defense", "trades", "--defense-options", "trades.weight=3").of_defenses() == {"trades": {"weight": 3}}


def test_settings_come_from_the_run_then_the_recipe_then_the_options(snn):
    saved = checkpoints.read_run(snn)["config"]
    found = settings("--recipe", "cpu-convert-tune", "--init", snn, "--neuron-options", "detach_reset=true", "--seed", "5")
    assert (found.model, found.steps, found.norm, found.data, found.validation) == (saved["model"], 3, saved["norm"], saved["data"], saved["validation"])
    assert found.neuron_options == {**saved["neuron_options"], "detach_reset": True} and found.defense == "robust-tuning" and (found.lr, found.seed) == (0.001, 5)
    assert recipes.inherited(snn).keys() == {item for item in list(recipes.by_name())[: list(recipes.by_name()).index("defense")] if item != "init"}


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith(("ann-", "convert-", "cpu-ann", "cpu-convert"))])
def test_recipes_of_conversion(name):
    """The settings of the paper, and command lines in comments that name what there is."""
    config, text = Config(**recipes.load_recipe(name)), recipes.find(name).read_text()
    lines = [line.removeprefix("#   ").split()[1:] for line in text.splitlines() if line.startswith("#   fastsnn")]
    if "convert-" not in name:
        assert (config.neuron, config.norm, config.number("weight_decay")) == ("relu", "bn", 5e-4) and not lines
        options = next(iter(config.of_defenses().values()), {})
        if name.startswith("ann-") and options:
            assert (options["eps"], options["steps"], options["step_size"]) == (2 / 255, 10, 0.5 / 255) or options == options | {"eps": "2/255", "steps": 10, "step_size": "0.5/255"}
        return
    made, converted, tuned = (cli.parser().parse_args(words) for words in lines)
    assert made.recipe in recipes.names() and tuned.recipe == name and tuned.init == converted.out and made.out == converted.folder
    if name.startswith("convert-"):
        assert Config(**recipes.load_recipe(made.recipe)).data != "digits"
        assert (config.lr, config.number("weight_decay"), config.epochs) == (0.001, 1e-4 if "cifar100" in name else 1e-3, 80 if "cifar100" in name else 60)
        assert config.of_defenses()["robust-tuning"]["beta"] == (2 if "cifar10" == name.rpartition("-")[2] else 4)
        assert config.of_defenses()["robust-tuning"]["alpha_share"] == (0.2 if "cifar100" in name or "tiny" in name else 0.5)
        assert converted.kappa == (0.1 if "cifar100" in name or "tiny" in name else 0.3) and f"T = {converted.steps}" in recipes.about(name)
        assert (converted.steps, converted.decay, converted.reset) == ((30, 0.99, "soft") if name.endswith("lif") else (8, None, None))


# ---- coding ------------------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """One layer whose spikes can be counted on paper: per step 1 fires at each of four, 0.5 at the second and the fourth, 0.25 at the fourth."""

    def __init__(self):
        super().__init__()
        self.layer = fastsnn.IF(threshold=1.0)

    def forward(self, images):
        return self.layer(images.flatten(1).expand(4, *images.flatten(1).shape)).sum(0)


def test_the_histogram_is_that_on_paper():
    found = coding.coding(Counted(), torch.tensor([[1.0, 0.5, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0]])[:, None, None], batch_size=1)
    assert found["histogram"] == [3 / 8, 1 / 8, 3 / 8, 0, 1 / 8]
    assert (found["neurons"], found["steps"], found["spikes"], found["active"], found["rate"]) == (4, 4, 11 / 2, 5 / 8, 11 / 32)


def test_coding_agrees_with_activity():
    from fastsnn import activity

    model, x = network("snn"), data.load("digits").x_test[:40]
    found, totals = coding.coding(model, x, batch_size=16), activity.totals(activity.activity(model, x))
    assert {key: found[key] for key in ("neurons", "spikes", "per_neuron", "rate", "active")} == pytest.approx({key: totals[key] for key in ("neurons", "spikes", "per_neuron", "rate", "active")})


def test_accuracy_by_steps_is_that_of_running_means():
    """A causal network with a constant current: its first t steps are those of the network with T = t."""
    model, found = network("snn"), data.load("digits").limited(test=80)
    long = coding.with_steps(model, 6)
    with torch.no_grad():
        outputs = long.currents(long.encode(found.x_test.float() / 255), models.Pass())
    means = outputs.cumsum(0) / torch.arange(1, 7)[:, None, None]
    wanted = {t: (means[t - 1].argmax(1) == found.y_test).double().mean().item() for t in (1, 3, 6)}
    assert coding.accuracy_by_steps(model, found.x_test, found.y_test, (1, 3, 6)) == wanted
    assert model.steps == 4 and len(set(wanted.values())) > 1


def test_what_has_no_other_number_of_steps():
    with pytest.raises(TypeError, match="model is a Linear; wanted a network of fastsnn.models"):
        coding.with_steps(nn.Linear(1, 1), 2)
    with pytest.raises(ValueError, match="norm tebn has weights for each of 4 steps"):
        coding.with_steps(models.small_cnn(widths=(2,), image=(1, 4, 4), norm="tebn"), 2)
