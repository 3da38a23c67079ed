"""What every defense shares: one final step that runs the training forward and adds up the loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import STATISTICS, Statistics
from ..neurons import record, spiking_layers

__all__ = ["Defense", "Outcome", "Run", "Sum", "forward_with_statistics"]


@dataclass
class Run:
    """One training forward, as a defense sees it.

    clean: the batch as it came, [N, C, H, W]; images: what the model was run on (adversarial, where a defense made them
    so). statistics: one entry for each spiking layer, those that `Defense.statistics` names. progress: of the training,
    from 0 to 1. smoothing: of the labels. group: the processes over which statistics are taken; None: all that were started.
    forward: runs the training forward again (`run.forward(images)` -> logits). notes: where penalty leaves values for report.
    """

    model: nn.Module
    clean: Tensor
    images: Tensor
    labels: Tensor
    logits: Tensor
    statistics: list[Statistics]
    progress: float = 0.0
    smoothing: float = 0.0
    group: object = None
    forward: Callable[..., Tensor] | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)


class Outcome(NamedTuple):
    """What a training step returns: the loss to differentiate, logits and named terms, both detached.

    terms: "task", each penalty as it was added, and what defenses report, by name.
    """

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


class Defense:
    """A way to train a robust model: `loss = defense.loss(model, images, labels)`, and `defense.after_step(model)` once the optimiser has moved.

    Defenses add up: `MPDSGR(eta=0.05) + REG(beta=0.001)`. Sums are flat; statistics are united, penalties added, and at
    most one part replaces the task loss. Parts that change the batch do so in the order of the sum, and nothing else
    depends on the order.

    To write one: `name`, and those of the methods below that it is about. `step` and `loss` are final.
    """

    name: str
    #: Which channel statistics of each spiking layer the loss needs, as in `fastsnn.lif`; with "guard" also guard=(delta, power).
    statistics: tuple[str, ...] = ()
    guard: tuple[float, int] | None = None
    #: Whether objective or penalty differentiates with respect to `run.images`.
    input_gradient = False
    #: The weight decay that the defense is defined with; None: whichever the training uses.
    weight_decay: float | None = None
    #: Whether it makes adversarial images of its own, in `batch`, `objective` or `updates`; at most one part of a sum does.
    crafts = False

    #: Options of `fastsnn.models` that its network is made with, where the defense is about a certain network; `prepare` asks for them.
    needs: Mapping[str, object] = {}

    # ---- to override -------------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> None:
        """Change the model before the first step, for example its neurons; in place, once, before the optimiser is made."""

    def groups(self, model: nn.Module) -> list[dict]:
        """Parameters that the optimiser treats apart, as torch.optim takes them: `[{"params": [...], "lr": 0.1, "weight_decay": 0.0}]`.

        Asked once, after `prepare`. A group with an "lr" keeps it: the schedule moves the others only.
        """
        return []

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        """The images to train on, like `images`, made with the plain model (not its distributed or compiled wrapper).

        progress: of the training, in [0, 1].
        """
        return images

    def watch(self, model: nn.Module) -> AbstractContextManager:
        """A block around the training forward and the loss, for example with hooks on layers."""
        return nullcontext()

    def objective(self, run: Run) -> Tensor:
        """The task loss, a scalar: cross-entropy with `run.smoothing`. At most one part of a sum replaces it."""
        return F.cross_entropy(wide(run.logits), run.labels, label_smoothing=run.smoothing)

    def penalty(self, run: Run) -> dict[str, Tensor]:
        """Scalar terms to add to the loss, weighted already, by name."""
        return {}

    def report(self, run: Run) -> dict[str, Tensor]:
        """Values for the log, by name."""
        return {}

    def before_step(self, model: nn.Module, progress: float) -> None:
        """Change the gradients, which are filled, before the optimiser's step, in place."""

    def after_step(self, model: nn.Module) -> None:
        """Change the parameters after the optimiser's step, in place."""

    def updates(self, model: nn.Module, images: Tensor, labels: Tensor, **options) -> Iterator[Outcome]:
        """The steps of one batch: the training differentiates, calls `before_step`, steps and calls `after_step` after each outcome, then goes on.

        One step, but for defenses that update several times in a batch. options: as in `step`.
        """
        yield self.step(model, images, labels, **options)

    # ---- final -------------------------------------------------------------------------------------------------------------

    @final
    def step(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        progress: float = 0.0,
        smoothing: float = 0.0,
        forward: Callable | None = None,
        group=None,
    ) -> Outcome:
        """One training step up to its loss.

        model: from images [N, C, H, W] to logits [N, classes]; a fastsnn model, or any module with fastsnn layers in it.
        labels: [N] int64. progress: of the training, in [0, 1]. smoothing: of the labels, in [0, 1).
        forward: what to run the training forward through, for example the model's distributed or compiled wrapper.
        group: the processes over which statistics are taken; None: all that `fastsnn.distributed.start` joined.
        """
        self._check(images, labels, progress, smoothing)
        call, clean = model if forward is None else forward, images
        images = self.batch(model, clean, labels, progress)
        if self.input_gradient:
            images = images.detach().requires_grad_()
        with self.watch(model):
            if self.statistics:
                logits, statistics = forward_with_statistics(model, images, self.statistics, self.guard, call)
            else:
                logits, statistics = call(images), []
            if logits.dim() != 2 or len(logits) != len(labels):
                raise ValueError(f"{self}: the model returned logits of shape {list(logits.shape)}; wanted [{len(labels)}, classes].")
            run = Run(model, clean, images, labels, logits, statistics, progress, smoothing, group, call)
            loss = self.objective(run)
            terms = {"task": loss.detach()}
            for name, value in self.penalty(run).items():
                loss = loss + value
                terms[name] = value.detach()
            for name, value in self.report(run).items():
                terms[name] = value.detach()
        return Outcome(loss, logits.detach(), terms)

    @final
    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of one batch, a scalar to differentiate: `step(...).loss`.

        >>> loss = fastsnn.defenses.MPDSGR(eta=0.05).loss(model, images, labels)
        """
        return self.step(model, images, labels).loss

    @final
    def __add__(self, other: Defense) -> Sum:
        if not isinstance(other, Defense):
            return NotImplemented
        return Sum((*self._parts(), *other._parts()))

    def _parts(self) -> tuple[Defense, ...]:
        return (self,)

    def _check(self, images, labels, progress: float, smoothing: float) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{self}: images is {got}; wanted float [N, C, H, W] with pixels in [0, 1]. For bytes: images.float() / 255.")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"{self}: labels is {got}; wanted int64 [{len(images)}], one class number for each image. Cast it: labels.long().")
        if not 0 <= progress <= 1:
            raise ValueError(f"{self}: progress is {progress}; wanted a number in [0, 1], the part of the training that is done.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"{self}: smoothing is {smoothing}; wanted a number in [0, 1).")

    def options(self) -> dict[str, object]:
        """The defense's options by name, as JSON can hold them."""
        return {key: value for key, value in vars(self).items() if isinstance(value, (str, int, float, bool))}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.options().items())})"


class Sum(Defense):
    """Several defenses at once; made by `+`."""

    def __init__(self, parts: tuple[Defense, ...]) -> None:
        self.parts = tuple(parts)
        names = [part.name for part in self.parts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"defenses: {name} is in the sum {' + '.join(names)} twice; wanted each defense once.")
        for method, what in (("objective", "the task loss"), ("updates", "the training step")):
            own = [part.name for part in self.parts if getattr(type(part), method) is not getattr(Defense, method)]
            if len(own) > 1 or (own and method == "updates" and len(names) > 1):
                raise ValueError(f"defenses: {' and '.join(own)} replace {what}; wanted at most one that does in the sum {' + '.join(names)}.")
        crafting = [part.name for part in self.parts if part.crafts]
        if len(crafting) > 1:
            raise ValueError(
                f"defenses: {' and '.join(crafting)} each make adversarial images, which of them to train on is not defined; "
                f"wanted at most one that does in the sum {' + '.join(names)}."
            )
        for what in ("guard", "weight_decay"):
            wanted = {part.name: getattr(part, what) for part in self.parts if getattr(part, what) is not None}
            if len(set(wanted.values())) > 1:
                raise ValueError(f"defenses: {' and '.join(f'{name} ({value})' for name, value in wanted.items())} want different values of {what}.")
            setattr(self, what, next(iter(wanted.values()), None))
        self.name = "+".join(names)
        self.statistics = tuple(name for name in STATISTICS if any(name in part.statistics for part in self.parts))
        self.input_gradient = any(part.input_gradient for part in self.parts)
        self.crafts = bool(crafting)

    def _parts(self) -> tuple[Defense, ...]:
        return self.parts

    def prepare(self, model: nn.Module) -> None:
        for part in self.parts:
            part.prepare(model)

    def groups(self, model: nn.Module) -> list[dict]:
        return [group for part in self.parts for group in part.groups(model)]

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        for part in self.parts:
            images = part.batch(model, images, labels, progress)
        return images

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.watch(model))
            yield

    def objective(self, run: Run) -> Tensor:
        for part in self.parts:
            if type(part).objective is not Defense.objective:
                return part.objective(run)
        return super().objective(run)

    def penalty(self, run: Run) -> dict[str, Tensor]:
        return self._united("penalty", run)

    def report(self, run: Run) -> dict[str, Tensor]:
        return self._united("report", run)

    def before_step(self, model: nn.Module, progress: float) -> None:
        for part in self.parts:
            part.before_step(model, progress)

    def after_step(self, model: nn.Module) -> None:
        for part in self.parts:
            part.after_step(model)

    def _united(self, method: str, run: Run) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            for name, value in getattr(part, method)(run).items():
                if name in found:
                    raise ValueError(f"defenses: two parts of {self.name} give a {method} named {name!r}; wanted different names.")
                found[name] = value
        return found

    def options(self) -> dict[str, object]:
        return {part.name: part.options() for part in self.parts}

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least: a loss in half precision loses what the model computed."""
    return logits if logits.dtype == torch.float64 else logits.float()


def forward_with_statistics(
    model: nn.Module, images: Tensor, statistics: tuple[str, ...], guard: tuple[float, int] | None = None, forward: Callable | None = None
) -> tuple[Tensor, list[Statistics]]:
    """Logits, and one entry of statistics for each spiking layer, of a fastsnn model or any module with fastsnn layers in it.

    forward: what to call in place of the model, its distributed or compiled wrapper.
    """
    logits, named = named_statistics(model, images, statistics, guard, forward)
    return logits, [entry for _, entry in named]


def named_statistics(model, images, statistics, guard=None, forward=None) -> tuple[Tensor, list[tuple[str, Statistics]]]:
    """What `forward_with_statistics` returns, each entry with the name of its layer in the model."""
    forward = model if forward is None else forward
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    spiking = spiking_layers(model).items()
    if "statistics" in inspect.signature(model.forward).parameters:
        logits, found = forward(images, statistics=statistics, guard=guard)
        return logits, list(zip((name for name, _ in spiking), found, strict=True))
    with ExitStack() as stack:
        calls = [(name, stack.enter_context(record(layer, *statistics, guard=guard))) for name, layer in spiking]
        logits = forward(images)
    return logits, [(name, entry) for name, entries in calls for entry in entries.get("", [])]
