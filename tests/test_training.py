"""Training: the same bits whatever interrupts it, the same figures over processes, clear ends to what cannot go on."""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import random
import signal
import socket

import pytest
import torch
from fastsnn import checkpoints, data, defenses, evaluation, graphs, runs, training
from fastsnn.journal import Meter
from fastsnn.training import Config, Interrupted, train
from fastsnn.validation import Validation

TINY = dict(model="small_cnn", model_options={"widths": [4, 6]}, steps=2, train_limit=200, batch_size=32, epochs=4, log_every=3, lr=0.05)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits as a file: children need no scikit-learn."""
    return str(data.load("digits").save(tmp_path_factory.mktemp("data") / "digits.npz"))


@pytest.fixture
def tiny(digits, tmp_path):
    """Settings of a run of 20 steps that takes a moment: tiny(name, **changes)."""
    return lambda name="run", **changes: Config(**{**TINY, "data": digits, "out": str(tmp_path / name), **changes})


def weights(folder, name=checkpoints.LAST):
    return checkpoints.load(os.path.join(folder, name))[0]


def log(folder):
    """The log without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in checkpoints.read_lines(os.path.join(folder, checkpoints.LOG))]


def assert_same_run(folder, wanted):
    """Weights, optimiser, best weights and log, bit for bit."""
    for name in (checkpoints.LAST, checkpoints.BEST):
        found, expected = weights(folder, name), weights(wanted, name)
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)
    assert log(folder) == log(wanted)
    assert checkpoints.read_run(folder)["best"] == checkpoints.read_run(wanted)["best"]


# ---- one run -----------------------------------------------------------------------------------------------------------------


def test_a_run_and_what_it_leaves(tiny):
    config = tiny(defense="mpd-sgr")
    folder = train(config, progress=False)
    assert sorted(os.listdir(folder)) == ["best.safetensors", "last.safetensors", "log.jsonl", "run.json"]
    run = checkpoints.read_run(folder)
    assert run["finished"] and run["steps"] == 20 and run["config"] == config.to_dict() and run["data"]["train"] == 180 and run["data"]["validation"] == 20
    lines = log(folder)
    assert [(line["kind"], line["epoch"], line["step"]) for line in lines] == [(kind, epoch, 5 * epoch + 5) for epoch in range(4) for kind in ("epoch", "validation")]
    for line in lines[::2]:
        assert line["loss"] == pytest.approx(line["task"] + line["mpd-sgr"], rel=1e-6) and line["mpd-sgr"] == pytest.approx(0.05 * line["omega"], rel=1e-5)
    assert lines[-2]["loss"] < lines[0]["loss"]
    validations = lines[1::2]
    best = max(validations, key=lambda line: (line["accuracy"], -line["loss"]))
    assert run["best"] == {key: best[key] for key in ("epoch", "step", "accuracy", "loss")}
    for line in validations:
        assert len(line["layers"]["omega"]) == len(line["layers"]["name"]) == 2 and line["omega"] == pytest.approx(sum(line["layers"]["omega"]) / 2)
        assert 0 < line["rate"] < 1 and 0 < line["omega"] < 1
    model, about = checkpoints.load_run(folder)
    assert not model.training and about["weights"]["step"] == run["best"]["step"]
    images = data.load(config.data)
    _, held_out = data.split(*(lambda limited: (limited.x_train, limited.y_train))(images.limited(train=200)), validation=0.1, seed=0)
    limited = images.limited(train=200)
    right = (model(limited.x_train[held_out] / 255).argmax(1) == limited.y_train[held_out]).double().mean().item()
    assert right == pytest.approx(run["best"]["accuracy"])


def test_repeats_and_depends_on_the_seed(tiny):
    first, again, other = (train(tiny(name, seed=seed, max_steps=6), progress=False) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert_same_run(again, first)
    assert not torch.equal(weights(other)["model.classifier.weight"], weights(first)["model.classifier.weight"])


def test_test_images_do_not_matter(tiny, tmp_path):
    """Weights are chosen on held-out training images: other test images change nothing but the fingerprint."""
    config = tiny("a")
    images = data.load(config.data)
    other = dataclasses.replace(images, x_test=255 - images.x_test, y_test=images.y_test.flip(0)).save(tmp_path / "other.npz")
    assert_same_run(train(dataclasses.replace(config, data=str(other), out=str(tmp_path / "b")), progress=False), train(config, progress=False))


class Shaken(defenses.Defense):
    """Random numbers after each step."""

    name = "shaken"

    def after_step(self, model):
        with torch.no_grad():
            model.classifier.bias.add_(torch.rand(10, dtype=torch.float64).float(), alpha=0.01)


def test_the_step_is_the_documented_one(tiny, monkeypatch):
    """The first three steps, written out."""
    monkeypatch.setitem(defenses.DEFENSES, "shaken", Shaken)
    config = tiny(max_steps=3, crop=1, flip=True, defense="mpd-sgr+at+reg+shaken", warmup=1, validation=0.0)
    folder = train(config, progress=False)
    images = data.load(config.data).limited(train=200)
    model = runs.build_model(config, 10, (1, 8, 8), runs.choose_normalisation(config, images.name, images.x_train))
    defense = defenses.MPDSGR(eta=0.05) + defenses.AT() + defenses.REG(beta=0.001) + Shaken()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.0)
    batches = data.Batches(images.x_train, images.y_train, 32, seed=0, augment=data.Augment(crop=1, flip=True))
    for step, (x, y, _) in zip(range(3), batches.epoch(0)):
        optimizer.param_groups[0]["lr"] = 0.05 * (step + 1) / 6
        optimizer.zero_grad()
        torch.manual_seed(runs.seed_of(0, 0, step, 0))
        defense.loss(model, x, y).backward()
        optimizer.step()
        torch.manual_seed(runs.seed_of(0, 0, step, "after"))
        defense.after_step(model)
    found = checkpoints.part(weights(folder), "model.")
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert not (folder / checkpoints.BEST).exists() and checkpoints.load_run(folder)[1]["weights"]["file"] == checkpoints.LAST


def test_learning_rate_is_that_of_torch():
    config = Config(epochs=7, lr=0.3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for epoch in range(7):
        assert runs.learning_rate(config, epoch, 3, 10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()
    warm = Config(epochs=6, lr=0.3, warmup=2, schedule="constant")
    assert [runs.learning_rate(warm, epoch, batch, 2) for epoch in range(3) for batch in range(2)] == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3, 0.3])


def test_meter_does_not_depend_on_when_it_is_read():
    values = torch.randn(11, generator=torch.Generator().manual_seed(0))
    means = set()
    for every in (1, 3, 11):
        meter = Meter()
        for step, value in enumerate(values, 1):
            meter.add({"loss": value, "accuracy": value * 2})
            if step % every == 0 or step == len(values):
                assert meter.read() == (None, False)
        means.add(tuple(meter.means().values()))
    assert len(means) == 1 and next(iter(means))[0] == pytest.approx(values.mean().item())
    meter.add({"loss": torch.tensor(1.0), "accuracy": torch.tensor(1.0)})
    meter.add({"loss": torch.tensor(math.inf), "accuracy": torch.tensor(1.0)})
    assert meter.read(stop=True) == (1, True)


def test_no_step_waits_for_the_device(tiny, monkeypatch):
    """Values cross to Python at readings only: their number does not grow with the steps between."""
    counts = {}

    def counted(name):
        original = getattr(torch.Tensor, name)

        @functools.wraps(original)
        def call(self, *arguments):
            if stage:
                counts[name] = counts.get(name, 0) + 1
            return original(self, *arguments)

        return call

    stage: list = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    step = training.Trainer._step

    def watched(trainer, images, labels):
        stage.append(1)
        try:
            step(trainer, images, labels)
        finally:
            stage.pop()

    monkeypatch.setattr(training.Trainer, "_step", watched)
    train(tiny(defense="mpd-sgr", max_steps=6, log_every=100), progress=False)
    assert counts == {}


@pytest.mark.parametrize("changes", [{"channels_last": True}, {"precision": "float64"}, {"optimizer": "adamw", "lr": 0.003}, {"neuron": "relu"}, {"encoding": "poisson"}, {"validation": 0.0, "schedule": "constant", "smoothing": 0.1, "cutout": 3}], ids=str)
def test_settings_stop_and_resume(tiny, changes):
    """Each setting trains; stopped in the middle of an epoch and resumed, to the bits of a run that was not."""
    whole = train(tiny("whole", **{**changes, "epochs": 2}), progress=False)
    part = tiny("part", **{**changes, "epochs": 2, "max_steps": 7, "validate_every": 2})
    whole_line = log(whole)[-1]
    train(part, progress=False)
    assert checkpoints.load(os.path.join(part.out, checkpoints.LAST))[1]["step"] == 7
    again = dataclasses.replace(part, max_steps=0)
    train(again, resume=True, progress=False)
    for key, tensor in weights(whole).items():
        assert torch.equal(weights(part.out)[key], tensor), key
    assert log(part.out)[-1] == whole_line
    assert train(again, resume=True, progress=False) == again.folder()  # trained already: nothing to do


@pytest.mark.parametrize("limit, validate_every", [(3, 1), (13, 2), (5, 2)])
def test_where_a_limit_stops_does_not_change_the_best_weights(tiny, monkeypatch, limit, validate_every):
    """Stopped within an epoch, or after one that is not validated, with a validation better than all that follow."""
    common = dict(validate_every=validate_every, lr=0.2)
    whole = train(tiny("whole", **common), progress=False)
    part = tiny("part", **common, max_steps=limit)
    with monkeypatch.context() as patch:
        call = Validation.__call__
        patch.setattr(Validation, "__call__", lambda self: {**call(self), **({} if self.due() else {"accuracy": 1.0, "loss": 0.0})})
        trainer = training.Trainer.__init__

        def init(self, *arguments):
            trainer(self, *arguments)
            self.validation.due = lambda: self.step % (5 * validate_every) == 0

        patch.setattr(training.Trainer, "__init__", init)
        train(part, progress=False)
    assert checkpoints.load_run(part.out)[1]["weights"]["step"] <= limit  # there are weights to attack, whichever
    assert not checkpoints.read_run(part.out)["finished"]
    train(dataclasses.replace(part, max_steps=0), resume=True, progress=False)
    for key, tensor in weights(whole, checkpoints.BEST).items():
        assert torch.equal(weights(part.out, checkpoints.BEST)[key], tensor), key
    assert checkpoints.load(os.path.join(part.out, checkpoints.BEST))[1] == checkpoints.load(whole / checkpoints.BEST)[1]
    if limit % 5:
        assert_same_run(part.out, whole)


def test_killed_before_a_run_is_marked_as_finished(tiny, monkeypatch, capsys):
    config = tiny(epochs=1)

    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_finish", die)
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False)
    assert not checkpoints.read_run(config.out)["finished"]
    lines = log(config.out)
    train(config, resume=True)
    assert "is trained already: 5 steps" in capsys.readouterr().err
    run = checkpoints.read_run(config.out)
    assert run["finished"] and run["steps"] == 5 and run["best"]["step"] == 5 and log(config.out) == lines


def test_a_limit_says_how_to_go_on(tiny, capsys):
    config = tiny(max_steps=3)
    for resume in (False, True):
        train(config, resume=resume)
        assert f"stopped by --max-steps 3 after step 3 of 20. Go on with: fastsnn train --resume --out {config.out} --max-steps 0" in capsys.readouterr().err
    assert [line["step"] for line in log(config.out)] == [3, 3] and not checkpoints.read_run(config.out)["finished"]


def test_options_given_as_tuples_resume(tiny):
    config = tiny(model_options={"widths": (4, 6)}, max_steps=1)
    train(config, progress=False)
    train(dataclasses.replace(config, model_options={"widths": (4, 6)}, max_steps=2), resume=True, progress=False)
    with pytest.raises(ValueError, match="cannot change model_options"):
        train(dataclasses.replace(config, model_options={"widths": (4, 7)}), resume=True, progress=False)


def test_a_run_of_before_goes_on(tiny):
    """run.json with the numbers that are called `auto` now."""
    config = tiny(max_steps=3)
    train(config, progress=False)
    path = os.path.join(config.out, checkpoints.RUN)
    with open(path) as file:
        document = json.load(file)
    document["config"] |= {"at_step_size": "1/255", "beta": 0.001, "weight_decay": "0.0005"}
    checkpoints.write_json(path, document)
    assert checkpoints.load_run(config.out)[1]["config"] == config.to_dict()
    train(dataclasses.replace(config, max_steps=0), resume=True, progress=False)
    assert_same_run(config.out, train(tiny("whole"), progress=False))


def test_validation_does_not_depend_on_batches(tiny):
    """Omega is not linear in the moments: these are pooled over all images before it is taken."""
    config = tiny(gamma=0.7, defense="mpd-sgr", precision="float64")
    images = data.load(config.data)
    model = runs.build_model(config, 10, (1, 8, 8), None).double()
    x, y = images.x_train[:50], images.y_train[:50]
    found = [Validation(model, data.Batches(x, y, size, seed=0, shuffle=False, drop_last=False), config, torch.float64)() for size in (7, 16, 50)]
    wanted = evaluation.diagnose(model, (x.float() / 255).double(), gamma=0.7)
    for record in found:
        for key in ("loss", "accuracy", "omega", "rate"):
            assert record[key] == pytest.approx(found[-1][key], rel=1e-12), key
        for key in ("omega", "mean", "deviation", "rate"):
            assert record["layers"][key] == pytest.approx([getattr(layer, key) for layer in wanted], rel=1e-9), key
    assert found[0]["omega"] == pytest.approx(sum(layer.omega for layer in wanted) / len(wanted))


def test_bfloat16_keeps_weights_in_float32(tiny):
    folder = train(tiny(precision="bfloat16", defense="mpd-sgr+reg", max_steps=5), progress=False)
    found, reference = weights(folder), weights(train(tiny("b", defense="mpd-sgr+reg", max_steps=5), progress=False))
    for name, tensor in found.items():
        assert tensor.dtype == reference[name].dtype
    name = "model.features.0.conv.weight"
    assert not torch.equal(found[name], reference[name])
    assert (found[name] - reference[name]).abs().max() < 0.1 * reference[name].abs().max()


def test_compiled_is_the_same_network(tiny, monkeypatch):
    compiled = []

    def compile(module):
        compiled.append(module)
        return real(module, backend="eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    found = train(tiny("a", compile=True, defense="mpd-sgr", max_steps=3), progress=False)
    assert len(compiled) == 1
    wanted = train(tiny("b", defense="mpd-sgr", max_steps=3), progress=False)
    for key, tensor in weights(wanted).items():
        torch.testing.assert_close(weights(found)[key], tensor, rtol=1e-5, atol=1e-6)


def test_several_updates_in_a_batch(tiny, monkeypatch):
    class Twice(defenses.Defense):
        name = "twice"
        moved = 0

        def updates(self, model, images, labels, **options):
            yield self.step(model, images, labels, **options)
            yield self.step(model, images.flip(-1), labels, **options)

        def after_step(self, model):
            Twice.moved += 1

    monkeypatch.setitem(defenses.DEFENSES, "twice", Twice)
    train(tiny(defense="twice", max_steps=3), progress=False)
    assert Twice.moved == 6


class ReplayedByRunning:
    """Stands for torch.cuda on a machine without a GPU: a captured graph is replayed by running the step again."""

    class Stream:
        def wait_stream(self, other):
            pass

    class CUDAGraph:
        def replay(self):
            self.step()

    current_stream = Stream
    model, captures = None, 0

    @staticmethod
    def stream(_):
        return contextlib.nullcontext()

    @staticmethod
    @contextlib.contextmanager
    def graph(graph):
        ReplayedByRunning.captures += 1
        buffers = [(buffer, buffer.clone()) for buffer in ReplayedByRunning.model.buffers()]
        yield
        for buffer, before in buffers:  # a capture runs nothing
            buffer.copy_(before)


def test_captured_steps(tiny, monkeypatch):
    """The logic around CUDA graphs: warm-up leaves no trace, replays see their batch, each epoch captures anew."""

    class Captured(graphs.CapturedStep):
        def __init__(self, compute, model, images, labels):
            ReplayedByRunning.model = model
            super().__init__(compute, model, images, labels)

            def step():
                model.zero_grad(set_to_none=True)
                for old, new in zip((self.results.loss, self.results.logits, *self.results.terms.values()), flat(compute(self.images, self.labels))):
                    old.data.copy_(new)

            self.graph.step = step

    def flat(outcome):
        return (outcome.loss.detach(), outcome.logits, *outcome.terms.values())

    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(ReplayedByRunning, name))
    monkeypatch.setattr(training, "CapturedStep", Captured)
    monkeypatch.setattr(training, "choose_device", lambda config: torch.device("cpu"))
    changes = dict(defense="mpd-sgr+at", at_steps=1, max_steps=8)
    found = train(tiny("captured", cuda_graphs=True, **changes), progress=False)
    assert ReplayedByRunning.captures == 2
    assert_same_run(found, train(tiny("plain", **changes), progress=False))


def test_tensorboard(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(tiny(tensorboard=True, max_steps=5), progress=False)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {"epoch/loss", "validation/accuracy", "step/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("step/loss")] == [3, 5]


# ---- killed and resumed ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def children():
    """Processes that are forked from one that has imported fastsnn and started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastsnn.training", "fastsnn.models", "fastsnn.data", "fastsnn.defenses", "safetensors.torch", "torch._dynamo", "torch.distributed.fsdp", "pytest", "hypothesis"])

    def start(target, *arguments):
        child = context.Process(target=target, args=arguments)
        child.start()
        return child

    return start


KILLED = dict(defense="mpd-sgr+at", at_steps=1, crop=1, flip=True, checkpoint_every=2)


def killed(config, moment, number):
    """Train, and die at the numbered time that `moment` comes."""
    torch.set_num_threads(1)
    left = [number]

    def die_before(owner, name, half=False):
        original = getattr(owner, name)

        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    original(arguments[0]).write(b"{" * 1000)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, call)

    places = {
        "step": (training.Trainer, "_step"),
        "writing": (checkpoints, "_open", True),
        "renaming": (os, "replace"),
        "renamed": (checkpoints, "_flush_folder"),
        "validation": (training.Trainer, "_validate"),
        "line": (checkpoints, "append_line"),
    }
    die_before(*places[moment])
    train(config, progress=False)


def resumed(config):
    torch.set_num_threads(1)
    train(config, resume=True, progress=False)


MOMENTS = [("step", 1), ("step", 9), ("writing", 4), ("writing", 6), ("renaming", 6), ("renamed", 5), ("validation", 2), ("line", 4)]


def test_killed_anywhere_and_resumed(tiny, children, tmp_path):
    """kill -9 in chosen moments: the resumed run ends with the bits of a run that was left alone."""
    wanted = tiny("wanted", **KILLED)
    all_children = [children(first_run, wanted)]
    configs = [tiny(f"{moment}{number}", **KILLED) for moment, number in MOMENTS]
    all_children += [children(killed, config, *moment) for config, moment in zip(configs, MOMENTS)]
    for child in all_children:
        child.join()
    assert [child.exitcode for child in all_children] == [0] + [-signal.SIGKILL] * len(MOMENTS)
    all_children = [children(resumed, config) for config in configs]
    for child, config in zip(all_children, configs):
        child.join()
        assert child.exitcode == 0
        assert_same_run(config.out, wanted.out)


def first_run(config):
    torch.set_num_threads(1)
    train(config, progress=False)


def test_killed_at_random_again_and_again(tiny, children):
    wanted = tiny("wanted", **KILLED)
    children(first_run, wanted).join()
    config, draw = tiny("killed", **{**KILLED, "checkpoint_every": 1}), random.Random(0)
    child, kills = children(first_run, config), 0
    while True:
        child.join(draw.uniform(0, 0.1 + 0.05 * kills))
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        child = children(resumed if os.path.exists(os.path.join(config.out, checkpoints.RUN)) else first_run, config)
    assert kills >= 3
    assert_same_run(config.out, wanted.out)


# ---- several processes -------------------------------------------------------------------------------------------------------


def one_of(rank, world, port, config):
    """What torchrun starts, with the gradients of the last step written beside the run."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with_gradients(config)


def with_gradients(config):
    step = training.Trainer._step

    def kept(trainer, images, labels):
        step(trainer, images, labels)
        if trainer.main:
            torch.save({name: parameter.grad for name, parameter in trainer.model.named_parameters()}, config.out + ".gradients")

    training.Trainer._step = kept
    try:
        train(config, progress=False)
    finally:
        training.Trainer._step = step


@pytest.mark.parametrize("defense, precision, steps, tolerance", [("mpd-sgr", "float64", 20, 1e-9), ("reg", "float64", 20, 1e-9), ("mpd-sgr", "float32", 1, 1e-5)])
def test_two_processes_are_one(tiny, children, defense, precision, steps, tolerance):
    common = dict(defense=defense, precision=precision, max_steps=steps, epochs=5, crop=1, flip=True)
    alone, together = tiny("alone", **common), tiny("together", **common)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [children(one_of, rank, 2, port, together) for rank in range(2)]
    with_gradients(alone)
    for child in both:
        child.join()
    assert [child.exitcode for child in both] == [0, 0]
    found, wanted = (torch.load(config.out + ".gradients") for config in (together, alone))
    largest = max(gradient.abs().max().item() for gradient in wanted.values())  # a bias before a norm has rounding errors only
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * largest, msg=name)
    for name, tensor in weights(alone.out).items():
        torch.testing.assert_close(weights(together.out)[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    for line, expected in zip(log(together.out), log(alone.out), strict=True):
        assert line.get("layers", {}).get("name") == expected.get("layers", {}).get("name")
        for key in ("omega", "mean", "deviation", "rate") if "layers" in line else ():
            assert line["layers"][key] == pytest.approx(expected["layers"][key], rel=tolerance, abs=tolerance), key
        assert {key: line[key] for key in ("loss", "accuracy")} == pytest.approx({key: expected[key] for key in ("loss", "accuracy")}, rel=tolerance)
    assert checkpoints.read_run(together.out)["processes"] == 2


# ---- what ends a run ---------------------------------------------------------------------------------------------------------


def at_step(monkeypatch, number, action):
    """Do something before the step of that number, counted from 1."""
    step = training.Trainer._step

    def watched(trainer, images, labels):
        if trainer.step + 1 == number:
            action(trainer)
        step(trainer, images, labels)

    monkeypatch.setattr(training.Trainer, "_step", watched)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint(tiny, monkeypatch, capsys, number):
    config = tiny("stopped", log_every=100)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda trainer: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=rf"stopped by {number.name} after step 7 of 20; a checkpoint is written. Go on with: fastsnn train --resume --out .*stopped") as stop:
            train(config, progress=False)
    assert stop.value.number == number and signal.getsignal(number) is before
    assert "once more stops at once" in capsys.readouterr().err
    assert checkpoints.load(os.path.join(config.out, checkpoints.LAST))[1]["step"] == 7
    train(config, resume=True, progress=False)
    assert_same_run(config.out, train(tiny("whole"), progress=False))


def test_a_second_signal_stops_at_once(tiny, monkeypatch):
    def twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 8, twice)
    config = tiny()
    with pytest.raises(KeyboardInterrupt) as stop:
        train(config, progress=False)
    assert not isinstance(stop.value, Interrupted)
    assert checkpoints.load(os.path.join(config.out, checkpoints.LAST))[1]["step"] == 5


def spoil(trainer, value=math.nan):
    with torch.no_grad():
        trainer.model.classifier.weight[0, 0] = value


def test_a_loss_that_is_not_finite(tiny, monkeypatch):
    at_step(monkeypatch, 8, spoil)
    config = tiny(log_every=100)
    with pytest.raises(FloatingPointError, match=r"the loss is not finite at step 8 \(epoch 2 of 4, lr .*last.safetensors holds step 5, before it.*smaller --lr") as error:
        train(config, progress=False)
    assert all(tensor.isfinite().all() for tensor in weights(config.out).values()), error
    assert log(config.out)[-1]["step"] == 5


def test_an_attack_in_training_that_meets_nan(tiny, monkeypatch):
    at_step(monkeypatch, 7, spoil)
    with pytest.raises(FloatingPointError, match="step 7 met numbers that are not finite: PGD: .*last.safetensors holds step 5"):
        train(tiny(defense="at", log_every=100), progress=False)


def test_weights_that_are_not_finite_are_not_saved(tiny, monkeypatch):
    """A loss that is finite at the last step, and weights that are not after it."""
    config = tiny(checkpoint_every=2)
    optimizer_step = torch.optim.SGD.step
    taken = []

    def step(self, *arguments):
        optimizer_step(self, *arguments)
        taken.append(1)
        if len(taken) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] = math.inf

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(FloatingPointError, match="weights are not finite after step 4.*holds step 2"):
        train(config, progress=False)
    assert all(tensor.isfinite().all() for tensor in weights(config.out).values())


def test_no_space_left(tiny, monkeypatch):
    config, opened = tiny(checkpoint_every=1), []
    real = checkpoints._open

    def full(part):
        opened.append(part)
        return open("/dev/full", "wb", buffering=0) if len(opened) > 4 else real(part)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_open", full)
        with pytest.raises(OSError, match="no space left on the disk while writing .*safetensors of before is untouched"):
            train(config, progress=False)
    train(config, resume=True, progress=False)
    assert_same_run(config.out, train(tiny("whole", checkpoint_every=1), progress=False))


def test_a_folder_that_holds_a_run(tiny):
    train(tiny(max_steps=1), progress=False)
    with pytest.raises(FileExistsError, match="holds a run already. Go on with it by --resume, or start another with another --out"):
        train(tiny(), progress=False)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        train(tiny("none"), resume=True, progress=False)


def test_resuming_with_other_settings(tiny, tmp_path):
    config = tiny(max_steps=3)
    train(config, progress=False)
    with pytest.raises(ValueError, match="cannot change lr 0.05 to 0.2, epochs 4 to 9; a resumed run may change data, device, out, checkpoint_every"):
        train(dataclasses.replace(config, epochs=9, lr=0.2), resume=True, progress=False)
    images = data.load(config.data)
    other = dataclasses.replace(images, x_train=images.x_train.flip(-1)).save(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="holds other images than .* was trained on"):
        train(dataclasses.replace(config, data=str(other)), resume=True, progress=False)
    moved = images.save(tmp_path / "moved.npz")
    train(dataclasses.replace(config, data=str(moved), max_steps=0, log_every=7, checkpoint_every=4), resume=True, progress=False)
    for key, tensor in weights(train(tiny("whole"), progress=False)).items():
        assert torch.equal(weights(config.out)[key], tensor), key


def test_best_weights_written_after_the_last_checkpoint_stand(tiny):
    config = tiny(max_steps=7, validate_every=2)
    train(config, progress=False)
    path = os.path.join(config.out, checkpoints.BEST)
    checkpoints.save(path, weights(config.out, checkpoints.BEST), {"epoch": 1, "step": 10, "accuracy": 1.0, "loss": 0.0})
    kept = checkpoints.fingerprint(path)
    train(dataclasses.replace(config, max_steps=0), resume=True, progress=False)
    assert checkpoints.fingerprint(path) == kept and checkpoints.read_run(config.out)["best"]["step"] == 10


def test_half_a_line_of_the_log_is_dropped(tiny):
    config = tiny(max_steps=5)
    train(config, progress=False)
    with open(os.path.join(config.out, checkpoints.LOG), "a") as file:
        file.write(json.dumps({"kind": "epoch", "epoch": 1, "step": 10}) + '\n{"kind": "va')
    train(dataclasses.replace(config, max_steps=0), resume=True, progress=False)
    assert log(config.out) == log(train(tiny("whole"), progress=False))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "none.npz"}, "none.npz does not exist"),
        ({"batch_size": 500}, "batch_size is 500, and there are 180 training images"),
        ({"cuda_graphs": True, "device": "cpu"}, "cuda_graphs works on a GPU; the device is cpu"),
        ({"precision": "tf32", "device": "cpu"}, "precision tf32 is arithmetic of GPUs; the device is cpu"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"model_options": {"width": 3}}, "width"),
        ({"surrogate": "triangel:1"}, "'triangel' is unknown.*Did you mean 'triangle'"),
        ({"neuron_options": {"decy": 0.5}}, "decy"),
        ({"normalise": "cifar10"}, "wanted 1 of each"),
        ({"neuron": "relu", "defense": "mpd-sgr"}, "no spiking layer|statistics are of spiking layers"),
    ],
)
def test_settings_that_do_not_fit(tiny, changes, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        train(tiny(**changes), progress=False)


def test_images_of_a_wrong_shape(tiny, tmp_path):
    import numpy as np

    path = tmp_path / "flat.npz"
    np.savez(path, x_train=np.zeros((8, 8, 8), np.uint8), y_train=np.zeros(8, int), x_test=np.zeros((8, 8, 8), np.uint8), y_test=np.zeros(8, int))
    with pytest.raises(ValueError, match=r"wanted \[N, C, H, W\]"):
        train(tiny(data=str(path)), progress=False)
    assert not os.path.exists(tiny().out)


def test_the_gpu_of_the_settings_is_current(tiny, monkeypatch):
    """Streams and graphs are made on the current device; the caller's comes back."""
    chosen, seen = [0], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(training, "choose_device", lambda config: torch.device(config.device))

    class Looking:
        def __init__(self, config, device, *_):
            seen.append((device, torch.cuda.current_device(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

        def run(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "Trainer", Looking)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for device, precision in (("cuda:1", "float32"), ("cuda:1", "tf32"), ("cuda", "bfloat16"), ("cpu", "float32")):
        with pytest.raises(KeyboardInterrupt):
            train(tiny(device=device, precision=precision), progress=False)
        assert chosen[-1] == 0 and (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    assert seen == [
        (torch.device("cuda:1"), 1, False, False),
        (torch.device("cuda:1"), 1, True, True),
        (torch.device("cuda"), 0, False, False),
        (torch.device("cpu"), 0, *before),
    ]


def test_deterministic_on_a_gpu(monkeypatch):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
    for deterministic in (True, False):
        with runs.determinism(Config(deterministic=deterministic), torch.device("cuda")):
            assert os.environ.get(name) == (":4096:8" if deterministic else None)
            assert torch.are_deterministic_algorithms_enabled() is (deterministic or before[0]) and torch.backends.cudnn.benchmark is not deterministic
        assert name not in os.environ
        assert (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark) == before
    monkeypatch.setenv(name, ":16:8")  # repeats too
    with runs.determinism(Config(deterministic=True), torch.device("cuda")):
        assert os.environ[name] == ":16:8"
    assert os.environ[name] == ":16:8"


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.choose_device(Config()) == torch.device("cpu")
    with pytest.raises(ValueError, match="device is cuda, but PyTorch sees no GPU.*--device cpu"):
        runs.choose_device(Config(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runs.choose_device(Config(cuda_graphs=True)) == torch.device("cuda")
    with pytest.raises(ValueError, match="device is cuda:2; PyTorch sees 2 GPUs, cuda:0 to cuda:1"):
        runs.choose_device(Config(device="cuda:2"))
