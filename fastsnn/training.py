"""Training: from settings to a run folder, repeatable to the bit and resumable after any stop.

Everything random at a step is seeded by (seed, epoch, batch, rank), so a checkpoint needs no state of random generators: a
resumed run computes what it would have computed.
"""

from __future__ import annotations

import inspect
import math
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, checkpoints, distributed
from .graphs import CapturedStep
from .interrupts import Interrupted, listening
from .journal import Journal, Meter
from .recipes import Config
from .runs import (
    arithmetic,
    autocast,
    build_model,
    build_optimizer,
    check_same,
    choose_device,
    choose_normalisation,
    current,
    determinism,
    learning_rate,
    optimizer_tensors,
    restore_optimizer,
    seed_of,
)
from .starts import Start, read_start
from .validation import Validation

__all__ = ["Config", "Interrupted", "train"]

#: Which images are kept for validation does not depend on a run's seed: runs that differ in it are chosen on the same ones.
SPLIT_SEED = 0

#: What of the membranes stands beside the bar, measured on held-out images.
SHOWN = ("omega", "rate")


def train(config: Config, resume: bool = False, progress: bool = True) -> Path:
    """Train a network and return its run folder; under torchrun, as one process of several.

    The folder gets run.json (settings, network, data, versions), log.jsonl (a line for each epoch and each validation),
    last.safetensors (weights, optimiser, position) and best.safetensors (the weights with the best validation accuracy, at
    equal accuracy with the smaller loss). Test images are not touched.

    resume: go on from the last checkpoint; settings must be those of the run, but for those that `Config` marks.
    progress: show a bar on a terminal, and a line for each epoch.

    Raises ValueError for settings that do not fit, FileExistsError where the folder holds a run already,
    FloatingPointError where the loss is not finite, OSError where a file cannot be written (earlier ones stay whole), and
    Interrupted, a KeyboardInterrupt, after Ctrl-C or SIGTERM.

    >>> folder = train(Config(model="small_cnn", data="digits", epochs=2, out="runs/digits"))
    """
    device = choose_device(config)
    rank, world, local = distributed.start(device)
    try:
        if config.batch_size % world:
            raise ValueError(f"train: batch_size is {config.batch_size}, of all {world} processes together; wanted a multiple of {world}.")
        if world > 1 and config.cuda_graphs:
            raise ValueError("train: cuda_graphs works with one process. Leave --cuda-graphs out, or start without torchrun.")
        if world > 1 and device.type == "cuda":
            device = torch.device("cuda", local)
        with current(device), arithmetic(config.precision, device), determinism(config, device):
            return Trainer(config, device, rank, world, resume, progress).run()
    finally:
        distributed.finish()


class Trainer:
    """One run in one process: everything that `train` needs, and the loop."""

    def __init__(self, config: Config, device: torch.device, rank: int, world: int, resume: bool, progress: bool) -> None:
        from . import data as images_in_memory
        from .defenses import make_defense

        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.main, self.folder = rank == 0, config.folder()
        self.group = torch.distributed.group.WORLD if world > 1 else None
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        saved = checkpoints.read_run(self.folder) if resume else None
        if saved is not None:
            if "converted" in saved:
                raise ValueError(
                    f"train: {self.folder} was made by `fastsnn convert`, there is no training to go on with. Fine-tune it: fastsnn train --init {self.folder} --out ANOTHER."
                )
            check_same(saved["config"], config, self.folder)
        elif (self.folder / checkpoints.RUN).exists():
            raise FileExistsError(f"train: {self.folder} holds a run already. Go on with it by --resume, or start another with another --out.")

        data = images_in_memory.load(config.data)
        fingerprint = data.fingerprint()
        data = data.limited(train=config.train_limit or None)
        if saved is not None and saved["data"]["fingerprint"] != fingerprint:
            raise ValueError(
                f"train: {config.data} holds other images than {self.folder} was trained on (fingerprint {fingerprint}, wanted {saved['data']['fingerprint']}). "
                "Resume with the data of before, --data PATH, or start a new run with another --out."
            )
        chosen, held_out = images_in_memory.split(data.x_train, data.y_train, validation=config.validation, seed=SPLIT_SEED)
        if len(chosen) < config.batch_size:
            raise ValueError(f"train: batch_size is {config.batch_size}, and there are {len(chosen)} training images (after {len(held_out)} for validation); wanted at most as many.")
        augment = images_in_memory.Augment(crop=config.crop, flip=config.flip, cutout=config.cutout) if config.crop or config.flip or config.cutout else None
        common = dict(seed=config.seed, rank=rank, world=world, device=device, channels_last=config.channels_last)
        parts = [(data.x_train[places].to(device), data.y_train[places].to(device)) for places in (chosen, held_out)]
        self.batches = images_in_memory.Batches(*parts[0], config.batch_size, augment=augment, **common)

        start = read_start(config, saved) if config.init else None
        normalise = choose_normalisation(config, data.name, data.x_train[chosen]) if start is None or config.normalise != "auto" else start.normalise
        self.model = build_model(config, data.classes, data.image, normalise)
        if start is not None:
            start.load_into(self.model)
        self.defense = make_defense(config.defense, config.of_defenses())
        self.defense.prepare(self.model)
        self.model.to(device, self.dtype)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config, self.model, self.defense.groups(self.model))
        self.forward = self._wrapped()
        self.validation = None
        if len(held_out):
            batches = images_in_memory.Batches(*parts[1], config.batch_size, shuffle=False, drop_last=False, **common)
            self.validation = Validation(self.model, batches, config, self.dtype, self.group)
        self.captured: CapturedStep | None = None

        self.epoch = self.batch = self.step = self.read_at = 0
        self.total = config.epochs * len(self.batches)
        self.seconds = self.epoch_seconds = 0.0
        self.best: dict | None = None
        self.meter = Meter(self.group)
        if saved is not None:
            self._restore(saved)
        self.run_record = saved or self._describe(data, fingerprint, len(chosen), len(held_out), start)
        self.run_record["config"] = config.to_dict()
        if world > 1:  # every process has looked before the first one writes
            torch.distributed.barrier()
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoints.write_json(self.folder / checkpoints.RUN, self.run_record)
            Journal.rewind(self.folder, self.step, self.epoch + 1 if self._ended() else self.epoch)
        ends = min(self.total, config.max_steps or self.total)
        self.journal = Journal(
            self.folder, main=self.main, progress=progress, tensorboard=config.tensorboard, step=self.step, total_steps=ends, batch_size=config.batch_size
        )
        if start is not None and saved is None:
            self.journal.say(f"train: starts from {start.folder}, its {start.weights['file']}{start.changes(self.model)}")
        if saved is not None and saved["versions"] != versions():
            self.journal.say(f"train: the run was made with {saved['versions']}, and goes on with {versions()}; last digits may differ.", always=True)

    # ---- set up ----------------------------------------------------------------------------------------------------------

    def _wrapped(self):
        """What training forwards run through: the network, or its distributed or compiled wrapper."""
        forward = self.model
        if self.world > 1:
            distributed.synchronise(self.model, self.group)
            ids = [self.device.index] if self.device.type == "cuda" else None
            ddp = torch.nn.parallel.DistributedDataParallel
            # Buffers are equal already: running statistics come from synchronised moments.
            sync = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(ddp).parameters else "broadcast_buffers"
            forward = ddp(self.model, device_ids=ids, **{sync: False})
        return torch.compile(forward) if self.config.compile else forward

    def _describe(self, data, fingerprint: str, train: int, validation: int, start: Start | None) -> dict:
        from .models import count_neurons, count_parameters

        if self.model.spec is None:
            raise ValueError("train: this network has no spec, since an option of it is a function or a tensor; wanted names and numbers only, so that the run can be loaded.")
        return {
            "format": checkpoints.FORMAT,
            "config": self.config.to_dict(),
            "model": self.model.spec,
            **({"init": start.to_dict()} if start is not None else {}),
            "parameters": count_parameters(self.model),
            "neurons": count_neurons(self.model),
            "defense": repr(self.defense),
            "defense_options": self.config.of_defenses(),
            "data": {
                "name": data.name,
                "fingerprint": fingerprint,
                "image": list(data.image),
                "classes": data.classes,
                "labels": list(data.labels),
                "train": train,
                "validation": validation,
                "test": len(data.y_test),
            },
            "versions": versions(),
            "tf32": self.device.type == "cuda" and torch.backends.cudnn.allow_tf32,
            "processes": self.world,
            "finished": False,
            "best": None,
        }

    def _restore(self, saved: dict) -> None:
        """Go back to the last checkpoint; a run stopped before its first one begins again."""
        path = self.folder / checkpoints.LAST
        if not path.exists():
            return
        tensors, state = checkpoints.load(path)
        self.model.load_state_dict(checkpoints.part(tensors, checkpoints.MODEL))
        restore_optimizer(self.optimizer, checkpoints.part(tensors, "optimizer."))
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.read_at, self.seconds, self.epoch_seconds = self.step, state["seconds"], state["epoch_seconds"]
        self.best = state["best"]
        self.meter.restart(state["sums"], state["steps"])
        best = self.folder / checkpoints.BEST
        if best.exists():
            _, about = checkpoints.load(best)
            # Written after the last checkpoint: these weights are what has to be surpassed.
            if about["step"] > self.step and not about.get("provisional"):
                self.best = about

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        config = self.config
        try:
            with listening(lambda text: self.journal.say(text, always=True)) as self.signals:
                if self._ended():
                    self._finish()  # a process killed after its last checkpoint has not
                    if self.epoch >= config.epochs:
                        self.journal.say(f"train: {self.folder} is trained already: {self.step} steps. Nothing to do.")
                    return self.folder
                if self.validation is not None:
                    start = self.validation.first_batch()
                    self.journal.show(self.epoch, config.epochs, {name: start[name] for name in SHOWN if name in start})
                while not self._ended():
                    self._run_epoch()
                self._finish()
        finally:
            self.journal.close()
        return self.folder

    def _ended(self) -> bool:
        """Whether no step is left, of the training or up to the limit."""
        return self.epoch >= self.config.epochs or 0 < self.config.max_steps <= self.step

    def _run_epoch(self) -> None:
        config, batches = self.config, len(self.batches)
        self.model.train()
        self.captured = None  # what a captured step reads, such as the progress, is constant within an epoch
        self.clock = time.perf_counter()
        stop = False
        for images, labels, _ in self.batches.epoch(self.epoch, start=self.batch):
            rate = learning_rate(config, self.epoch, self.batch, batches)
            for group in self.optimizer.param_groups:
                if not group["own_rate"]:
                    group["lr"] = rate
            try:
                self._step(images.to(self.dtype), labels)
            except FloatingPointError as error:  # an attack's, which looks at what it differentiates
                self._not_finite(f"step {self.step + 1} met numbers that are not finite: {error}")
            self.batch += 1
            self.step += 1
            self.journal.advance()
            last, limit = self.batch == batches, self.step == config.max_steps
            due = config.checkpoint_every > 0 and self.step % config.checkpoint_every == 0
            # Several processes stop at the same reading; one alone need not wait for it.
            if last or limit or due or self.step % config.log_every == 0 or (self.signals and self.world == 1):
                stop = self._read()
                if not last:
                    if due or stop:
                        self._save()
                    if stop:
                        raise self._interrupted()
                    if limit:
                        self._log_epoch(rate)
                        self._validate(choose=False)
                        self._save()
                        return
        self._log_epoch(rate)
        due = (self.epoch + 1) % config.validate_every == 0 or self.epoch + 1 == config.epochs
        if due or self.step == config.max_steps:
            self._validate(choose=due)
        self.epoch, self.batch, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.meter.restart()
        self._save()
        if stop and self.epoch < config.epochs:
            raise self._interrupted()

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One batch: the defense's loss, backward, the optimiser, what the defense does after it."""
        seed = self.config.seed
        torch.manual_seed(seed_of(seed, self.epoch, self.batch, self.rank))
        for outcome in self._outcomes(images, labels):
            self.defense.before_step(self.model, self._progress())
            self.optimizer.step()
            torch.manual_seed(seed_of(seed, self.epoch, self.batch, "after"))  # the same on every process, as the weights are
            self.defense.after_step(self.model)
        accuracy = (outcome.logits.argmax(1) == labels).double().mean()
        self.meter.add({"loss": outcome.loss, "accuracy": accuracy, **outcome.terms})

    def _progress(self) -> float:
        # Within a captured step the progress stays what it was at its capture, at the start of the epoch.
        return (self.epoch if self.config.cuda_graphs else self.step / len(self.batches)) / self.config.epochs

    def _outcomes(self, images: Tensor, labels: Tensor) -> Iterator:
        """The outcomes of a batch (one, but for defenses with several updates), the gradients filled."""
        options = dict(progress=self._progress(), smoothing=self.config.smoothing, forward=self.forward, group=self.group)
        if self.config.cuda_graphs:
            if self.captured is None:

                def compute(images: Tensor, labels: Tensor):
                    with autocast(self.config, self.device):
                        outcome = self.defense.step(self.model, images, labels, **options)
                    outcome.loss.backward()
                    return outcome

                self.captured = CapturedStep(compute, self.model, images, labels)
                torch.manual_seed(seed_of(self.config.seed, self.epoch, self.batch, self.rank))
            yield self.captured(images, labels)
            return
        updates = self.defense.updates(self.model, images, labels, **options)
        while True:
            with autocast(self.config, self.device):
                outcome = next(updates, None)
            if outcome is None:
                return
            self.optimizer.zero_grad(set_to_none=True)
            outcome.loss.backward()
            yield outcome

    def _read(self) -> bool:
        """Wait for the device, add up what came; whether to stop. FloatingPointError at a value that is not finite."""
        bad, stop = self.meter.read(bool(self.signals))
        seconds = time.perf_counter() - self.clock
        self.clock += seconds
        self.seconds, self.epoch_seconds = self.seconds + seconds, self.epoch_seconds + seconds
        if bad is not None:
            self._not_finite(f"the loss is not finite at step {self.read_at + bad + 1}")
        self.read_at = self.step
        self.journal.show(self.epoch, self.config.epochs, self.meter.latest)
        self.journal.scalars("step", self.step, self.meter.latest)
        return stop

    def _not_finite(self, what: str) -> None:
        path = self.folder / checkpoints.LAST
        kept = f"{path} holds step {checkpoints.load(path)[1]['step']}, before it" if path.exists() else "no checkpoint had been written"
        raise FloatingPointError(
            f"train: {what} (epoch {self.epoch + 1} of {self.config.epochs}, lr {self.optimizer.param_groups[0]['lr']:g}); {kept}. "
            "A resumed run meets the same again: start another, with a smaller --lr, with --warmup, or in another --precision."
        )

    def _interrupted(self) -> Interrupted:
        number = self.signals[0] if self.signals else signal.SIGTERM
        return Interrupted(
            f"train: stopped by {signal.Signals(number).name} after step {self.step} of {self.total}; a checkpoint is written. "
            f"Go on with: fastsnn train --resume --out {self.folder}",
            number,
        )

    def _finish(self) -> None:
        finished = self.epoch >= self.config.epochs
        self.run_record |= {"finished": finished, "steps": self.step, "seconds": round(self.seconds, 3), "best": self.best}
        if self.main:
            checkpoints.write_json(self.folder / checkpoints.RUN, self.run_record)
        if not finished:
            self.journal.say(
                f"train: stopped by --max-steps {self.config.max_steps} after step {self.step} of {self.total}. "
                f"Go on with: fastsnn train --resume --out {self.folder} --max-steps 0"
            )

    # ---- what is written -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if not self.main:
            return
        tensors = {f"{checkpoints.MODEL}{name}": tensor for name, tensor in self.model.state_dict().items()}
        if not torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all():
            self._not_finite(f"weights are not finite after step {self.step}")
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        state = {"epoch": self.epoch, "batch": self.batch, "step": self.step, "seconds": self.seconds, "epoch_seconds": self.epoch_seconds}
        state |= {"sums": self.meter.sums, "steps": self.meter.steps, "best": self.best}
        checkpoints.save(self.folder / checkpoints.LAST, tensors, state)

    def _log_epoch(self, rate: float) -> None:
        means = self.meter.means()
        speed = self.meter.steps * self.config.batch_size / max(self.epoch_seconds, 1e-9)
        record = {"kind": "epoch", "epoch": self.epoch, "step": self.step, **means, "lr": rate, "images_per_second": round(speed, 1), "seconds": round(self.seconds, 3)}
        self.journal.record(record)
        values = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.journal.say(f"epoch {self.epoch + 1}/{self.config.epochs}: {values}, {speed:.0f} images/s")

    # ---- validation ------------------------------------------------------------------------------------------------------

    def _validate(self, choose: bool = True) -> None:
        """Loss, accuracy and membranes on the held-out images; the best weights so far are kept.

        choose: False where a run that went on would not validate: the weights then stand in only while none are chosen,
        so that a resumed run ends with the best weights of one that was never stopped.
        """
        if self.validation is None:
            return
        torch.manual_seed(seed_of(self.config.seed, self.epoch, "validation", self.rank))
        result = self.validation()
        if not math.isfinite(result["loss"]):
            self._not_finite(f"the validation loss is not finite after step {self.step}")
        self.journal.record({"kind": "validation", "epoch": self.epoch, "step": self.step, **result})
        values = {name: result[name] for name in ("loss", "accuracy", *SHOWN) if name in result}
        self.journal.say("  validation: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.journal.show(self.epoch, self.config.epochs, {"validation": values.pop("accuracy"), **{name: values[name] for name in SHOWN if name in values}})
        if self.best is None or (choose and (result["accuracy"], -result["loss"]) > (self.best["accuracy"], -self.best["loss"])):
            about = {"epoch": self.epoch, "step": self.step, "accuracy": result["accuracy"], "loss": result["loss"]}
            if choose:
                self.best = about
            else:
                about |= {"provisional": True}
            if self.main:
                checkpoints.save(self.folder / checkpoints.BEST, {f"{checkpoints.MODEL}{name}": tensor for name, tensor in self.model.state_dict().items()}, about)


def versions() -> dict[str, str]:
    return {"fastsnn": __version__, "torch": torch.__version__, "python": platform.python_version()}
