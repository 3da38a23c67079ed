"""What a training run tells while it runs: running means, the log, the progress bar, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoints
from .extras import need

__all__ = ["Journal", "Meter"]

#: What stands first beside the bar, where a narrow terminal still shows it.
FIRST = ("loss", "accuracy", "omega", "rate", "validation")


class Meter:
    """Means over an epoch of values that lie on the device, read in one transfer every few steps.

    The sums are added step by step in float64, so they do not depend on when they are read.
    """

    def __init__(self, group=None) -> None:
        self.group = group
        self.world = torch.distributed.get_world_size(group) if group is not None else 1
        self.restart()

    def restart(self, sums: dict[str, float] | None = None, steps: int = 0) -> None:
        self.sums, self.steps = dict(sums or {}), steps
        self.names: tuple[str, ...] = ()
        self.rows: list[Tensor] = []
        self.latest: dict[str, float] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """The scalars of one step; nothing is waited for."""
        if tuple(values) != self.names:
            if self.rows:
                raise ValueError(f"Meter: a step has the values {', '.join(values)}, after {', '.join(self.names)}; wanted the same at each step until `read`.")
            self.names = tuple(values)
        self.rows.append(torch.stack([value.detach().double() for value in values.values()]))

    def read(self, stop: bool = False) -> tuple[int | None, bool]:
        """Add up what has come since the last reading, over all processes.

        Returns which step since then has the first value that is not finite, or None; and whether any process wants to stop.
        """
        if not self.rows and self.world == 1:
            return None, stop
        rows = torch.stack(self.rows)
        self.rows = []
        if self.world > 1:
            flag = torch.full((1, rows.shape[1]), float(stop), dtype=rows.dtype, device=rows.device)
            rows = torch.cat([rows / self.world, flag])
            torch.distributed.all_reduce(rows, group=self.group)
            stop = bool(rows[-1, 0].item() > 0)
            rows = rows[:-1]
        bad = None
        for place, row in enumerate(rows.tolist()):
            if bad is None and not all(map(math.isfinite, row)):
                bad = place
            for name, value in zip(self.names, row):
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.steps += 1
            self.latest = dict(zip(self.names, row))
        return bad, stop

    def means(self) -> dict[str, float]:
        return {name: total / self.steps for name, total in self.sums.items()}


class Journal:
    """Log, bar and TensorBoard of one run; all silent on every process but the first."""

    def __init__(self, folder: Path, *, main: bool, progress: bool, tensorboard: bool, step: int, total_steps: int, batch_size: int) -> None:
        self.path, self.main, self.progress, self.batch_size = folder / checkpoints.LOG, main, progress, batch_size
        self.bar = self.writer = None
        self.kept: dict[str, float] = {}
        if main and progress and sys.stderr.isatty():
            options = dict(total=total_steps * batch_size, initial=step * batch_size, unit="img", unit_scale=True, dynamic_ncols=True, mininterval=0.5)
            self.bar = need("tqdm", "train").tqdm(**options)
        if main and tensorboard:
            need("tensorboard", "tensorboard")
            self.writer = need("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    @staticmethod
    def rewind(folder: Path, step: int, epoch: int) -> None:
        """Drop what the log says about steps after a checkpoint, and about an epoch whose rest will run."""
        path = folder / checkpoints.LOG
        lines = [record for record in checkpoints.read_lines(path) if record.get("step", 0) <= step and record.get("epoch", 0) < epoch]
        checkpoints.write(path, "".join(f"{json.dumps(record)}\n" for record in lines).encode())

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update(self.batch_size)

    def show(self, epoch: int, epochs: int, values: dict[str, float]) -> None:
        """Values beside the bar: loss, accuracy, Omega, firing rate, whichever are there."""
        self.kept.update(values)
        if self.bar is not None:
            self.bar.set_description_str(f"epoch {epoch + 1}/{epochs}", refresh=False)
            ordered = sorted(self.kept, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
            self.bar.set_postfix({name: f"{self.kept[name]:.4g}" for name in ordered}, refresh=False)

    def scalars(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def record(self, record: dict) -> None:
        """One line of the log."""
        if self.main:
            checkpoints.append_line(self.path, record)
            self.scalars(record["kind"], record["step"], {name: value for name, value in record.items() if isinstance(value, float)})

    def say(self, text: str, always: bool = False) -> None:
        """A line for whoever watches; with `always`, also where no progress is wanted."""
        if self.main and (self.progress or always):
            if self.bar is not None:
                self.bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()
