"""The commands: settings from options and recipes, whole ways from training to a report, and what those who mistype are told."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from fastsnn import __main__ as cli
from fastsnn import attacks, checkpoints, data, evaluation, recipes, runs, training
from fastsnn.commands import attack, train
from fastsnn.recipes import Config

TINY = ["--model", "small_cnn", "--model-options", "widths=[4]", "--steps", "2", "--train-limit", "120", "--batch-size", "32", "--epochs", "2", "--quiet"]


def run(*arguments):
    return cli.main([*map(str, arguments)])


def settings(*arguments):
    return train.settings(cli.parser().parse_args(["train", *map(str, arguments)]))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(data.load("digits").save(tmp_path_factory.mktemp("data") / "digits.npz"))


# ---- settings ----------------------------------------------------------------------------------------------------------------


def test_every_setting_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit) as end:
        run("train", "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    table = recipes.option_table()
    for item in fields(Config):
        assert f"  {recipes.option(item.name)}" in text and f"| `{item.name}` | `{recipes.option(item.name)}` |" in table
        assert len(item.metadata["help"]) > 5 and recipes.describe(item).split(" [")[0] in " ".join(table.split())


def test_defaults_are_valid_and_options_reach_the_config():
    assert settings() == Config()
    found = settings("--lr", "0.5", "--flip", "--no-compile", "--at-eps", "4/255", "--defense", "mpd-sgr+at", "--model-options", "dropout=0.2", "bias=false", "name=x")
    assert (found.lr, found.flip, found.compile, found.model_options) == (0.5, True, False, {"dropout": 0.2, "bias": False, "name": "x"})
    assert found.of_defenses() == {"mpd-sgr": {"eta": 0.05, "gamma": 1.0, "average": "layers"}, "at": {"eps": 4 / 255, "steps": 2, "step_size": 2 / 255}}
    assert Config(**json.loads(json.dumps(found.to_dict()))) == found
    assert str(Config(data="cifar10:x/cifar-10-python.tar.gz", defense="at", seed=3).folder()) == "runs/at-vgg11-cifar-10-python-seed3"


MISTAKES = [
    (["--epoch", "3"], "option '--epoch' is unknown. Did you mean '--epochs'?"),
    (["--learning-rat=3"], "option '--learning-rat' is unknown."),
    (["--norm", "tdbm"], "'tdbm', which is unknown; wanted one of bn, tdbn, tebn, bntt, none. Did you mean 'tdbn'?"),
    (["--defense", "mpd-sgr+att"], "'att', which is unknown; wanted one of .*Did you mean 'at'?"),
    (["--model", "vgg-11"], "Did you mean 'vgg11'?"),
    (["--precision", "bfloat"], "Did you mean 'bfloat16'?"),
    (["--lr", "0"], "argument --lr: 0.0; wanted a value > 0"),
    (["--epochs", "2.5"], "argument --epochs: '2.5'; wanted a whole number"),
    (["--at-eps", "8/0"], "argument --at-eps: '8/0'; wanted a number or a fraction such as 8/255"),
    (["--momentum", "1"], "argument --momentum: 1.0; wanted a value >= 0 and < 1"),
    (["--lr", "nan"], "argument --lr: 'nan'; wanted a number"),
    (["--neuron-options", "decay"], "'decay'; wanted NAME=VALUE"),
    (["surplus"], "argument 'surplus' is not expected"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistyped_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        run("train", *arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.search(re.escape(message).replace(r"\.\*", ".*"), error), error


@pytest.mark.parametrize("changes, message", [({"eta": 0.2}, "eta = 0.2 is a setting of defense mpd-sgr; the defense is vanilla"), ({"warmup": 5, "epochs": 5}, "warmup is 5 of 5 epochs"), ({"steps": True}, "steps is True; wanted a whole number"), ({"flip": 1}, "wanted true or false"), ({"data": 3}, "wanted text"), ({"model_options": 3}, "wanted a table"), ({"model_options": {"neuron": print}}, "wanted options that JSON can hold"), ({"at_step_size": "4/255"}, "at_step_size = 4/255 is a setting of defense at")])
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


# ---- recipes -----------------------------------------------------------------------------------------------------------------


@functools.cache
def built(model, steps, classes, image):
    config = Config(model=model, steps=steps)
    return runs.build_model(config, classes, image, None)


#: Networks and data in the names of recipes.
NETWORKS = {"vgg11": "vgg11", "vgg11_tiny": "vgg11", "wrn16_4": "wrn16", "resnet20": "resnet20"}


@pytest.mark.parametrize("name", recipes.names())
def test_recipe(name):
    """Every recipe is valid, says what it is, and its defense takes its network: here a small one with the same layers."""
    from fastsnn.defenses import make_defense

    values = recipes.load_recipe(name)
    config = Config(**values)
    assert len(recipes.about(name)) > 20 and config.defense == values["defense"]
    small = config.model == "small_cnn"
    if not small and "model" in values:  # those without go on with another run's network
        data = next(word for word in ("cifar100", "cifar10", "svhn", "tiny") if word in config.data.lower().replace("cifar-", "cifar"))
        assert f"{NETWORKS[config.model]}-{data}" in name
    if "steps" in values and name not in ("digits", "small-cnn-cifar10"):
        assert f"T = {config.steps}" in recipes.about(name)
    assert ("reg" in config.defense.split("+")) <= (config.number("weight_decay") == 0)
    shared = {key: value for key, value in config.model_options.items() if small or key in ("bias", "dropout", "dropout_everywhere", "dropout_over_steps")}
    model = runs.build_model(replace(config, model="small_cnn", model_options=shared), 10, (1, 8, 8), runs.choose_normalisation(config, "other", torch.zeros(2, 1, 8, 8, dtype=torch.uint8)) if config.normalise == "auto" else None)
    make_defense(config.defense, config.of_defenses()).prepare(model)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_the_papers_settings_are_there():
    known = recipes.names()
    for defense in ("vanilla", "reg", "at", "at-reg", "mpd-sgr", "mpd-sgr-reg", "mpd-sgr-at"):
        for rest in ("vgg11-cifar10", "vgg11-cifar100", "wrn16-cifar10", "wrn16-cifar100"):
            assert f"{defense}-{rest}" in known
            config = Config(**recipes.load_recipe(f"{defense}-{rest}"))
            # SNN-RAT trains its vanilla at T = 8 for both networks; all others are rows of MPD-SGR, of one budget.
            plain, wide = defense == "vanilla", rest.startswith("wrn16")
            assert (config.steps, config.epochs, config.batch_size) == (8 if plain or not wide else 4, 200 if plain else 300, 64 if plain else 256)
            options = config.of_defenses()
            assert "reg" not in options or options["reg"] == {"beta": 0.004 if wide else 0.001}
            assert "at" not in options or options["at"] == {"eps": 2 / 255, "steps": 2, "step_size": 1 / 255}
            text = recipes.find(f"{defense}-{rest}").read_text()
            assert "validation = 0.1" in text and ("A reading: the paper prints it" in text) == (defense in ("reg", "mpd-sgr", "mpd-sgr-reg"))
    config = Config(**recipes.load_recipe("mpd-sgr-wrn16-cifar100"))
    assert (config.model, config.steps, config.eta, config.gamma, config.epochs, config.lr, config.schedule) == ("wrn16_4", 4, 0.05, 1.0, 300, 0.1, "cosine")


@pytest.mark.parametrize(
    "recipe, options, decay, wanted",
    [
        ("mpd-sgr-wrn16-cifar10", ["--defense", "mpd-sgr+reg"], 0.0, {"reg": {"beta": 0.004}}),
        ("mpd-sgr-vgg11-cifar10", ["--defense", "mpd-sgr+reg"], 0.0, {"reg": {"beta": 0.001}}),
        ("mpd-sgr-wrn16-cifar10", ["--defense", "mpd-sgr+reg", "--beta", "0.002", "--weight-decay", "1e-4"], 1e-4, {"reg": {"beta": 0.002}}),
        ("reg-wrn16-cifar10", ["--defense", "vanilla"], 5e-4, {}),
        ("small-cnn-cifar10", ["--defense", "reg"], 0.0, {"reg": {"beta": 0.001}}),
        ("at-vgg11-cifar10", ["--at-eps", "8/255"], 5e-4, {"at": {"eps": 8 / 255, "steps": 2, "step_size": 4 / 255}}),
        ("at-vgg11-cifar10", ["--at-eps", "8/255", "--at-steps", "5", "--at-step-size", "2/255"], 5e-4, {"at": {"eps": 8 / 255, "steps": 5, "step_size": 2 / 255}}),
        ("at-vgg11-cifar10", [], 5e-4, {"at": {"eps": 2 / 255, "steps": 2, "step_size": 1 / 255}}),
    ],
)
def test_what_auto_stands_for(recipe, options, decay, wanted):
    """Another defense on a recipe brings its own weight decay and strengths; a larger attack takes larger steps."""
    config = settings("--recipe", recipe, *options)
    found = config.of_defenses()
    assert {name: found[name] for name in wanted} == wanted and ("reg" in found) == ("reg" in config.defense)
    parameter = torch.nn.Linear(1, 1)
    assert runs.build_optimizer(config, parameter).param_groups[0]["weight_decay"] == decay


def test_the_measured_recipe_keeps_its_settings():
    config = Config(**recipes.load_recipe("small-cnn-cifar10"))
    assert config.model_options == {"widths": [16, 32, 64]} and (config.epochs, config.batch_size, config.number("weight_decay")) == (12, 64, 5e-4)


def test_recipes_by_name_by_path_and_with_options(tmp_path):
    own = tmp_path / "mine.toml"
    own.write_text('about = "mine"\nlr = 0.3\ndefense = "at"\nat_eps = 0.01\n[model_options]\ndropout = 0.1\n')
    found = settings("--recipe", own, "--model-options", "bias=false", "--lr", "0.2")
    assert (found.lr, found.defense, found.at_eps, found.model_options) == (0.2, "at", "0.01", {"dropout": 0.1, "bias": False})
    assert settings("--recipe", "digits") == settings("--recipe", recipes.names()["digits"]) == settings("--recipe", "recipes/digits.toml") == settings("--recipe", "digits.toml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = 0.1\nepoch = 3\n", "mine.toml, line 2: key 'epoch' is unknown. Did you mean 'epochs'?"),
        ("\n\nnorm = 'tdbm'\n", "mine.toml, line 3: norm is 'tdbm', which is unknown; .*Did you mean 'tdbn'?"),
        ("epochs = 1.5\n", "mine.toml, line 1: epochs is 1.5; wanted a whole number"),
        ("flip = 'yes'\n", "mine.toml, line 1: flip is 'yes'; wanted true or false"),
        ("[defence]\neta = 1\n", "mine.toml, line 1: key 'defence' is unknown. Did you mean 'defense'?"),
        ("lr = \n", "mine.toml: not valid TOML: "),
        ("eta = 0.3\n", "mine.toml: eta = 0.3 is a setting of defense mpd-sgr"),
    ],
)
def test_mistakes_in_recipes(text, message, tmp_path, capsys):
    (tmp_path / "mine.toml").write_text(text)
    assert run("train", "--recipe", tmp_path / "mine.toml") == 1
    error = capsys.readouterr().err
    assert error.startswith("fastsnn train: ") and error.count("\n") == 1 and re.search(re.escape(message).replace(r"\.\*", ".*"), error), error


def test_recipes_are_listed_and_printed(capsys):
    assert run("recipes") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(recipes.names())
    assert run("recipes", "digits") == 0 and "small_cnn" in capsys.readouterr().out
    assert run("recipes", "--keys") == 0 and "`batch_size`" in capsys.readouterr().out
    assert run("train", "--recipe", "mpd-sgr-vgg11-cifar") == 1
    assert "recipe 'mpd-sgr-vgg11-cifar' is neither a file nor the name of a recipe; `fastsnn recipes` lists the names. Did you mean 'mpd-sgr-vgg11-cifar1" in capsys.readouterr().err


# ---- from training to a report -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert run("train", *TINY, "--data", digits, "--defense", "mpd-sgr", "--out", folder) == 0
    return folder


def test_train_attack_report(trained, digits, tmp_path, capsys):
    assert run("attack", trained, "--eps", "8/255", "0.1", "--limit", "50", "--seed", "3", "--batch-size", "20", "--quiet") == 0
    text = capsys.readouterr().out
    record = json.loads((trained / "attacks-quick.json").read_text())
    assert list(record["results"]) == ["clean", "fgsm-8/255", "pgd7-8/255", "fgsm-0.1", "pgd7-0.1"] and not (trained / "attacks-quick.part").exists()
    for name, row in record["results"].items():
        assert f"{name} " in text and f"{row['accuracy']:.2%}" in text and row["total"] == 50
        assert len(row["correct"]) == 12 and attack.unpack(row["correct"], 50).count("1") == round(50 * row["accuracy"])
    # What the file says is enough to run it again.
    model, about = checkpoints.load_run(trained)
    assert record["weights"] == about["weights"] and record["settings"]["data"] == about["data"]["fingerprint"]
    images = data.load(digits).limited(test=record["settings"]["limit"])
    suite = evaluation.make_suite(record["settings"]["suite"], record["settings"]["eps"], record["settings"]["seed"], record["settings"]["eot"])
    again = evaluation.evaluate(model, images.x_test, images.y_test, suite, record["batch_size"]).to_dict()
    for name, row in again["results"].items():
        assert attack.unpack(record["results"][name]["correct"], 50) == row["correct"]

    assert run("attack", trained, "--eps", "8/255", "0.1", "--limit", "50", "--seed", "3", "--quiet") == 0
    assert "holds these results already" in capsys.readouterr().out
    assert run("attack", trained, "--eps", "8/255", "--quiet") == 1
    assert "holds results of other settings (eps ['8/255', '0.1'] there, ['8/255'] here" in capsys.readouterr().err
    assert run("attack", trained, "--eps", "8/255", "--limit", "20", "--again", "--quiet") == 0
    assert run("report", trained, "--out", tmp_path / "report", "--images", "20", "--attacked", "0", "--quiet") == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000


def stopped_in_the_second_batch(monkeypatch) -> list[int]:
    """The second batch of FGSM raises Ctrl-C; returns the sizes of its batches so far."""
    calls = []
    original = attacks.FGSM.run

    def run_once(self, model, images, labels, generator):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, model, images, labels, generator)

    monkeypatch.setattr(evaluation.store, "WRITE_EVERY", 0.0)
    monkeypatch.setattr(attacks.FGSM, "run", run_once)
    return calls


def test_an_attack_goes_on_where_it_was(trained, monkeypatch, capsys):
    """Stopped by Ctrl-C; the second call attacks what is left only, and finds what one call finds."""
    arguments = ("attack", trained, "--eps", "8/255", "--limit", "60", "--batch-size", "20", "--again", "--quiet")
    assert run(*arguments) == 0
    wanted = json.loads((trained / "attacks-quick.json").read_text())["results"]
    (trained / "attacks-quick.json").unlink()
    calls = stopped_in_the_second_batch(monkeypatch)
    arguments = tuple(word for word in arguments if word != "--again")
    assert run(*arguments) == 130 and "stopped" in capsys.readouterr().err
    assert not (trained / "attacks-quick.json").exists() and (trained / "attacks-quick.part").exists()
    assert run(*arguments) == 0 and calls == [20, 20, 20, 20]
    found = json.loads((trained / "attacks-quick.json").read_text())["results"]
    assert {name: row["correct"] for name, row in found.items()} == {name: row["correct"] for name, row in wanted.items()}


def test_results_of_before_stay_until_there_are_new_ones(trained, tmp_path, monkeypatch, capsys):
    """--again that fails, or is stopped, loses nothing, and goes on by the same command without --again."""
    path, part = trained / "attacks-quick.json", trained / "attacks-quick.part"
    first = ("attack", trained, "--eps", "8/255", "--limit", "40", "--batch-size", "20", "--quiet")
    assert run(*first, "--again") == 0
    before = path.read_bytes()
    assert run(*first, "--again", "--data", tmp_path / "none.npz") == 1 and path.read_bytes() == before
    calls = stopped_in_the_second_batch(monkeypatch)
    second = tuple("0.1" if word == "8/255" else word for word in first)
    assert run(*second, "--again") == 130 and path.read_bytes() == before and part.exists()
    capsys.readouterr()
    assert run(*first) == 0 and "holds these results already" in capsys.readouterr().out
    assert run(*second) == 0 and calls == [20, 20, 20] and not part.exists()  # 20 before, 20 when it was stopped
    assert json.loads(path.read_text())["settings"]["eps"] == ["0.1"]


def test_what_another_attack_left_is_refused_with_its_cure(trained, capsys):
    for content in ('{"key": "0", "rows": {}}', "{"):
        (trained / "attacks-quick.json").unlink(missing_ok=True)
        (trained / "attacks-quick.part").write_text(content)
        assert run("attack", trained, "--eps", "8/255", "--limit", "20", "--quiet") == 1
        assert "attacks-quick.part, left by an interrupted attack, is not of these settings, weights and images. Add --again" in capsys.readouterr().err
        assert run("attack", trained, "--eps", "8/255", "--limit", "20", "--quiet", "--again") == 0 and not (trained / "attacks-quick.part").exists()


def test_an_attack_rounds_as_the_training_did(trained, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def arithmetic(precision, device):
        seen.append((precision, str(device)))
        yield

    monkeypatch.setattr(runs, "arithmetic", arithmetic)
    assert run("attack", trained, "--eps", "8/255", "--limit", "20", "--again", "--quiet", "--device", "cpu") == 0
    assert seen == [("float32", "cpu")] and json.loads((trained / "attacks-quick.json").read_text())["precision"] == "float32"


def test_gradients_are_averaged_where_a_network_is_random(trained, digits, tmp_path, capsys):
    noisy = tmp_path / "noisy"
    assert run("train", *TINY, "--epochs", "1", "--data", digits, "--neuron", "noisy", "--out", noisy) == 0
    words = ("--eps", "8/255", "--limit", "20", "--again", "--quiet")
    for folder, options, eot, said in ((noisy, (), 10, "the mean of 10 (EoT)"), (noisy, ("--eot", "3"), 3, "the mean of 3 (EoT)"), (trained, (), 1, "single gradients (EoT 1)")):
        capsys.readouterr()
        assert run("attack", folder, *words, *options) == 0 and said in capsys.readouterr().out
        record = json.loads((folder / "attacks-quick.json").read_text())
        assert record["settings"]["eot"] == eot and {row["attack"]["eot"] for name, row in record["results"].items() if name != "clean"} == {eot}
    assert run("attack", noisy, "--eps", "8/255", "--limit", "20", "--quiet") == 1
    assert "(eot 3 there, 10 here)" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["1", "0", "10110011", "000000001", "1" * 13 + "0"])
def test_packed_flags(flags):
    assert attack.unpack(attack.pack(flags), len(flags)) == flags


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["attack"], 2, "required: RUN"),
        (["attack", "RUN", "--suite", "quik"], 2, "'quik' is unknown; wanted one of .*quick.*Did you mean 'quick'?"),
        (["attack", "RUN", "--eps", "8"], 2, "8; wanted a size in [0, 1]"),
        (["attack", "RUN", "--eot", "0"], 2, "'0'; wanted a whole number >= 1"),
        (["demo", "--eps", "8"], 2, "8; wanted a size in [0, 1]"),
        (["attack", "RUN", "--limit", "0"], 2, "'0'; wanted a whole number >= 1"),
        (["attack", "RUN", "--which", "bset"], 2, "'bset' is unknown; wanted one of best, last. Did you mean 'best'?"),
        (["attack", "RUN", "--ep", "0.1"], 2, "option '--ep' is unknown. Did you mean '--eps'?"),
        (["attack", "none"], 1, "none: there is no such folder. Wanted a folder that `fastsnn train --out` has made."),
        (["attack", "RUN", "--data", "digits", "--eps", "0"], 0, ""),
        (["report", "none"], 1, "does not exist"),
    ],
)
def test_attack_and_report_mistyped(trained, arguments, status, message, capsys):
    (trained / "attacks-quick.json").unlink(missing_ok=True)
    words = [str(trained) if word == "RUN" else word for word in arguments]
    try:
        found = run(*words)
    except SystemExit as end:
        found = end.code
    error = capsys.readouterr().err
    assert found == status and re.search(re.escape(message).replace(r"\.\*", ".*"), error), error


def test_attack_on_other_images(trained, tmp_path, capsys):
    images = data.load("digits")
    other = data.Dataset("digits", images.x_train, images.y_train, images.x_train[:50], images.y_train[:50], images.labels).save(tmp_path / "other.npz")
    assert run("attack", trained, "--data", other, "--which", "last", "--again") == 1
    assert "holds other images than" in capsys.readouterr().err


# ---- ends --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, status, text",
    [
        (FloatingPointError("train: the loss is not finite at step 3"), 1, "fastsnn train: the loss is not finite at step 3\n"),
        (OSError(28, "no space left on the disk while writing x"), 1, "fastsnn train: no space left on the disk while writing x\n"),
        (ImportError("tqdm is not installed"), 1, "fastsnn train: tqdm is not installed\n"),
        (RuntimeError("shapes"), 1, "fastsnn train: RuntimeError: shapes\n"),
        (training.Interrupted("train: stopped by SIGTERM", signal.SIGTERM), 143, "fastsnn train: stopped by SIGTERM\n"),
        (training.Interrupted("train: stopped by SIGINT", signal.SIGINT), 130, "fastsnn train: stopped by SIGINT\n"),
        (KeyboardInterrupt(), 130, "fastsnn train: stopped\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_status_and_one_line(monkeypatch, capsys, error, status, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(training, "train", fail)
    assert run("train") == status and capsys.readouterr().err == text
    with pytest.raises(type(error)):
        run("train", "--traceback")


def test_resume_takes_the_settings_of_the_run(digits, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", *TINY, "--data", digits, "--out", out, "--max-steps", "4") == 0
    assert run("train", *TINY, "--data", digits, "--out", out) == 1
    assert "holds a run already. Go on with it by --resume" in capsys.readouterr().err
    assert run("train", "--resume", "--out", out, "--lr", "0.3") == 1
    assert "cannot change lr 0.1 to 0.3" in capsys.readouterr().err
    capsys.readouterr()
    assert run("train", "--resume", "--out", out) == 0
    assert f"stopped by --max-steps 4 after step 4 of 6. Go on with: fastsnn train --resume --out {out} --max-steps 0" in capsys.readouterr().err
    assert run("train", "--resume", "--out", out, "--max-steps", "0", "--quiet") == 0
    assert checkpoints.read_run(out)["finished"]
    assert run("train", *TINY, "--data", digits, "--out", tmp_path / "whole") == 0
    for name, tensor in checkpoints.load(tmp_path / "whole" / checkpoints.LAST)[0].items():
        assert torch.equal(checkpoints.load(out / checkpoints.LAST)[0][name], tensor), name
    assert run("train", "--resume", "--out", tmp_path / "none") == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_the_program_killed_and_resumed(digits, tmp_path):
    """`kill -9` of the program itself, as soon as it has a checkpoint."""
    common = [*TINY, "--data", digits, "--epochs", "30", "--checkpoint-every", "1"]
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "fastsnn", "train"]
    child = subprocess.Popen([*program, *common, "--out", out], env=environment)
    while child.poll() is None and not (out / checkpoints.LAST).exists():
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert checkpoints.load(out / checkpoints.LAST)[1]["step"] < 90
    assert subprocess.run([*program, "--resume", "--out", out, "--quiet"], env=environment).returncode == 0
    assert checkpoints.read_run(out)["finished"] and checkpoints.load(out / checkpoints.LAST)[1]["step"] == 90
    steps = [line["step"] for line in checkpoints.read_lines(out / checkpoints.LOG) if line["kind"] == "epoch"]
    assert steps == list(range(3, 93, 3))
