"""What every attack shares: one final call that owns the checks, the model's modes and the ball; `run` is the attack."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from ..adjoints import nearest
from ..surrogates import Surrogate
from .adaptive import Pass
from .approximations import Approximation, passes, resolve
from .checks import check_logits, check_task, parse_eps, whole
from .expectation import RANDOM_EOT, is_random
from .losses import LOSSES, Loss, chosen
from .streams import Streams

__all__ = ["LOSSES", "Attack", "Gradient", "parse_eps"]

NORMS = ("linf", "l2")


class Gradient(NamedTuple):
    """What `Attack.gradient` returns."""

    gradient: Tensor  # like images: of the objective, which the attack ascends
    logits: Tensor  # [N, classes]
    loss: Tensor  # [N]


class Attack(ABC):
    """An attack on a classifier: `attack(model, images, labels)` returns adversarial images.

    eps: the largest perturbation of a sample, in pixels of [0, 1], in `norm`: "linf" (the largest pixel) or "l2" (the
        root of the sum of squares). targeted: labels are the classes to reach, not the true ones.
    adjoint: how gradients pass spiking layers: a name of `fastsnn.attacks.APPROXIMATIONS`, or as `fastsnn.adjoint` takes it (a
        name, a surrogate, a callable, or a tuple (name, surrogate)); None: as the model was trained.
    seed: of the random numbers, keyed by it and the index of each sample: the same numbers in every call and whatever
        the batch. None draws a seed from torch's generator at each call.
    loss: a name of LOSSES, or a function (logits, labels) -> [N]. eot: the mean of this many gradients, each with fresh
        random numbers of the model (expectation over transformation), for models that are random at inference.

    To write one: `name`, and `run(model, images, labels, generator)`, which returns images; what it returns is then
    moved into the ball and the range. The model is in eval mode there, its parameters ask for no gradient, and
    autograd records nothing but inside `gradient`, which gives the gradient of the objective (the loss; its negative
    where targeted), `logits`, which gives the scores alone, or an own block of torch.enable_grad(). `project` moves
    images back after a step. `generator` is a `Streams`: draw from it and nowhere else.
    """

    name: str
    #: The norms that the attack can keep to.
    norms: tuple[str, ...] = ("linf",)
    #: What a value of the input may be.
    low, high = 0.0, 1.0
    #: Whether eps may be infinite: for attacks that look for a small perturbation, not one within a ball.
    unbounded = False
    #: Whether eps bounds the perturbation; False where it is the scale of one, as of Gaussian noise.
    bounded = True
    #: What the attack asks of the model: its "gradient", its "scores" (logits), its "decisions" (classes), or "nothing".
    access = "gradient"
    #: Whether it takes one step only.
    single_step = False
    #: The attributes that a call leaves behind; all other public ones are options.
    results: tuple[str, ...] = ("zero_gradient", "queries")

    def __init__(
        self,
        eps: float | str,
        norm: str = "linf",
        targeted: bool = False,
        adjoint: str | Surrogate | Callable | tuple | None = None,
        seed: int | None = None,
        loss: str | Loss = "ce",
        eot: int = 1,
    ) -> None:
        who = type(self).__name__
        if isinstance(eps, nn.Module):
            raise TypeError(f"{who}: eps is a {type(eps).__name__}; wanted a number of pixels. Give the model to the call: attack(model, images, labels).")
        try:
            self.eps = parse_eps(eps)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from None
        if norm not in NORMS:
            raise ValueError(f"{who}: norm {norm!r} is unknown; wanted one of {', '.join(NORMS)}.{nearest(norm, NORMS)}")
        if norm not in self.norms:
            raise ValueError(f"{who}: norm is {norm!r}; this attack keeps to {' or '.join(self.norms)}.")
        if math.isinf(self.eps) and not self.unbounded:
            raise ValueError(f"{who}: eps is inf; wanted a finite number. eps={self.high - self.low:g} already reaches every image.")
        if norm == "linf" and self.high - self.low < self.eps < math.inf:
            raise ValueError(f"{who}: eps is {self.eps:g}, larger than the range of a pixel; wanted a number in [0, 1]. Divide by 255, for example 8/255.")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
            raise TypeError(f"{who}: seed is {seed!r}; wanted an int of 64 bits, or None for torch's generator.")
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"{who}: loss {loss!r} is unknown; wanted one of {', '.join(LOSSES)}, or a function.{nearest(loss, tuple(LOSSES))}")
        self.norm, self.targeted, self.adjoint, self.seed, self.loss = norm, bool(targeted), adjoint, seed, loss
        self.eot = whole(who, "eot", eot)
        self.approximation()  # an unknown adjoint is told now
        #: What approximations keep during a call: twins, running means; None outside of one.
        self._kept: dict | None = None
        #: [N] bool after a call: where the first gradient was zero everywhere; None where the attack took none.
        self.zero_gradient: Tensor | None = None
        #: [N] int64 after a call: how often the model was asked about each sample; None where that is not known (see `only`).
        self.queries: Tensor | None = None
        self._first, self._nan, self._samples, self._rows, self._warned = False, None, 0, None, False

    @property
    def radius(self) -> float:
        """How far a sample may be moved, in `norm`: eps, or infinity where eps is no bound."""
        return self.eps if self.bounded else math.inf

    @abstractmethod
    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        """Adversarial images, like `images`; `__call__` keeps them in the ball and the range."""

    @final
    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> Tensor:
        """Adversarial images for `model`: detached, like `images` in shape, dtype and layout.

        model: any module from images to logits [N, classes]. It is in eval mode meanwhile; each submodule's mode comes
            back, and no parameter gets a gradient.
        images: [N, ...] float, usually [N, C, H, W], pixels in [0, 1].
        labels: [N] int64, the true classes; where the attack is targeted, the classes to reach, which must be given and be others
            than the model's answers: a ValueError where all are reached at the start, a warning where most are.
        indices: [N] int64, the samples' places in the data set, which key their random numbers; by default 0 ... N-1.

        No sample is moved by more than eps: in linf every pixel lies between `image - eps` and `image + eps`, as these come out
        in the images' arithmetic (so do other libraries' balls); in l2 the norm, evaluated in float64, is at most eps. Pixels
        stay in [0, 1]. Raises FloatingPointError where logits, loss or gradient are NaN. Warns, once, where the model is random at
        inference and each gradient is a single one.
        """
        who = type(self).__name__
        # A captured graph cannot be asked for values; whoever captures has run the call before.
        look = not (isinstance(images, Tensor) and images.is_cuda and torch.cuda.is_current_stream_capturing())
        check_task(who, model, images, labels, indices, self.targeted, (self.low, self.high), look)
        if len(images) == 0:
            return images.detach().clone()
        # Inference tensors cannot be differentiated: copies made outside of inference mode can.
        with torch.inference_mode(False), torch.no_grad():
            clean, labels = images.detach(), labels.detach()
            if clean.is_inference():
                clean, labels = clean.clone(), labels.clone()
            places = torch.arange(len(clean), device=clean.device) if indices is None else indices
            self.zero_gradient, self._nan, self._first, self._rows, self._samples = None, None, look, None, len(clean)
            self.queries = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
            if self.access == "gradient" and self.eot == 1 and not self._warned and is_random(model):
                self._warned = True
                warnings.warn(
                    f"{who}: the model is random at inference, and each gradient is a single one (eot=1): mostly noise, so the model looks more "
                    f"robust than it is. Average some: eot={RANDOM_EOT}, or eot=fastsnn.attacks.default_eot(model).",
                    stacklevel=2,
                )
            self._kept = {}
            try:
                with crafting(model), self._randomness(places, look) as generator:
                    found = self.run(model, clean, labels, generator)
            finally:
                self._kept = None
            if not isinstance(found, Tensor) or found.shape != clean.shape:
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise TypeError(f"{who}: run returned {got}; wanted images of shape {list(clean.shape)}.")
            found = self._inside(found.detach().to(clean.dtype), clean)
            nan = found.isnan().any()
            if look and (nan if self._nan is None else nan | self._nan):
                raise FloatingPointError(
                    f"{who}: the model's logits, its loss or its gradient hold NaN; wanted finite numbers. Look for NaN or infinity in its parameters."
                )
        if found.stride() != images.stride():
            found = torch.empty_like(images).copy_(found)
        return found

    # ---- for run ---------------------------------------------------------------------------------------------------------

    def gradient(self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss | None = None, adjoint=None) -> Gradient:
        """The gradient of the objective with respect to `images`, through the attack's adjoint.

        The objective of a sample is its loss, or minus its loss where targeted; the batch's is the sum, so that a sample's
        gradient does not depend on its batch. loss, adjoint: in place of the attack's own.
        """
        return self.gradients(model, images, labels, (adjoint,), loss)[0]

    def gradients(self, model: nn.Module, images: Tensor, labels: Tensor, adjoints: Sequence, loss: Loss | None = None) -> list[Gradient]:
        """`gradient` through each of `adjoints` (None: the attack's own), from one forward pass: the spikes do not depend on them."""
        loss = loss or chosen(self.loss, self.targeted)
        ways = [self.approximation(choice) for choice in adjoints]
        kept = {} if self._kept is None else self._kept
        totals: list[Gradient] = []
        for turn in range(self.eot):
            run = Pass(kept, self._samples or len(images), self._rows, turn == 0)
            parts: dict[int, Gradient] = {}
            for group in passes(ways):
                found = self._backwards(model, images, labels, [ways[place] for place in group], loss, run, parts)
                parts.update(zip(group, found))
            parts_in_order = [parts[place] for place in range(len(ways))]
            totals = [Gradient(*(a + b for a, b in zip(*pair))) for pair in zip(totals, parts_in_order)] or parts_in_order
        if self.eot > 1:
            totals = [Gradient(*(value / self.eot for value in total)) for total in totals]
        # The sign of NaN is 0: an attack that stands still must not pass for a model that withstands it.
        self._note(torch.stack([value.isnan().any() for total in totals for value in (total.gradient, total.loss)]).any())
        if self.zero_gradient is None:
            self.zero_gradient = (totals[0].gradient.flatten(1) == 0).all(1)
            if self._rows is not None:
                self.zero_gradient = self.zero_gradient.new_zeros(self._samples).index_put((self._rows,), self.zero_gradient)
        return totals

    def _backwards(self, model, images, labels, ways: Sequence[Approximation], loss: Loss, run: Pass, before: dict[int, Gradient]) -> list[Gradient]:
        """One forward pass, and a backward pass for each of `ways`. before: what other passes at these images found."""
        with torch.enable_grad(), ways[0].running(model, run) as module:
            x = images.detach().requires_grad_()
            logits = self._scores(module, x, labels)
            losses = self._losses(logits, labels, loss)
            objective = -losses.sum() if self.targeted else losses.sum()
            if not objective.requires_grad:
                raise ValueError(
                    f"{type(self).__name__}: the model's logits do not depend on its images by a differentiable path; wanted a model without "
                    "detach() or no_grad() in its forward. Use an attack that takes no gradient."
                )
            gradients = []
            for place, way in enumerate(ways, 1):
                with way.backward():
                    gradients += torch.autograd.grad(objective, x, retain_graph=place < len(ways))
        logits, losses = logits.detach(), losses.detach()
        if not ways[0].true:  # attacks choose by what the model says, not by what its twin says
            if before:
                _, logits, losses = next(iter(before.values()))
            else:
                with torch.no_grad():
                    logits = self._scores(model, images, labels)
                    losses = self._losses(logits, labels, loss)
        return [Gradient(gradient, logits, losses) for gradient in gradients]

    def _losses(self, logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
        losses = loss(logits, labels)
        if losses.shape != labels.shape:
            raise ValueError(f"{type(self).__name__}: loss gave shape {list(losses.shape)}; wanted [{len(labels)}], one number for each sample.")
        return losses

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """A block in which `gradient` and `logits` are asked about some samples: a mask, or places, among those of the block around.

        It keeps `queries` right: who asks about another number of samples than there are, outside of such a block, makes it None.

        >>> with self.only(left):
        ...     gradient = self.gradient(model, images[left], labels[left]).gradient
        """
        before = self._rows
        if self._samples:
            self._rows = (torch.arange(self._samples, device=rows.device) if before is None else before)[rows]
        try:
            yield
        finally:
            self._rows = before

    def succeeded(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[N] bool: where the model is fooled: another class than labels, or just that one where targeted."""
        reached = logits.argmax(1) == labels
        return reached if self.targeted else ~reached

    def logits(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The model's scores [N, classes], checked; with gradient where the caller enables it."""
        logits = self._scores(model, images, labels)
        self._note(logits.isnan().any())
        return logits

    def mean_logits(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean of `eot` times `logits`: the answer of a model that is random at inference."""
        passes = [self.logits(model, images, labels) for _ in range(self.eot)]
        return passes[0] if self.eot == 1 else torch.stack(passes).mean(0)

    def approximation(self, choice=None) -> Approximation:
        """The way gradients pass spiking layers: `choice`, or the attack's own adjoint."""
        choice = self.adjoint if choice is None else choice
        return Approximation("as trained") if choice is None else resolve(choice)

    def part(self, attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, streams: Streams, places: Tensor) -> Tensor:
        """What another attack finds for the samples at `places`, within the ball of this one, as a part of this call: what it
        notes on the way (queries, NaN, and from the first part zero gradients) is noted here. images, labels, streams: theirs."""
        attack.zero_gradient, attack._nan, attack._first, attack._rows, attack._samples = None, None, self._first, None, len(images)
        attack.queries, attack._kept = torch.zeros_like(labels), {}
        try:
            found = self._inside(attack.run(model, images, labels, streams).detach().to(images.dtype), images)
        finally:
            attack._kept = None
        self._first = self._first and attack._first
        if self.zero_gradient is None and len(images) == self._samples:
            self.zero_gradient = attack.zero_gradient
        if attack._nan is not None:
            self._note(attack._nan)
        if self.queries is not None:
            self.queries = None if attack.queries is None else self.queries.index_add(0, places, attack.queries)
        return found

    def anew(self) -> None:
        """Let approximations that follow the membrane (ASSG) forget what they saw: for an attack that starts again."""
        if self._kept is not None:
            self._kept.clear()

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """`images` moved into the ball around `clean`, then into the range, in the images' arithmetic as published code does."""
        delta = images - clean
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        elif self.eps < math.inf:
            delta = delta * self._shrink(delta)
        return (clean + delta).clamp(self.low, self.high)

    # ---- the final word ----------------------------------------------------------------------------------------------------

    def _shrink(self, delta: Tensor) -> Tensor:
        """[N, 1, ...] the factor that brings each sample's l2 norm down to eps; 1 where it is inside."""
        size = delta.flatten(1).norm(dim=1).clamp(min=torch.finfo(delta.dtype).tiny)
        return (self.eps / size).clamp(max=1).reshape(-1, *[1] * (delta.dim() - 1))

    def _inside(self, images: Tensor, clean: Tensor) -> Tensor:
        """`images` with the guarantee of `__call__`."""
        images = images.clamp(self.low, self.high)
        if self.radius == math.inf:
            return images
        if self.norm == "linf":
            return torch.minimum(torch.maximum(images, clean - self.eps), clean + self.eps)
        far = clean.double()
        # Scaled in float64 and a little too far, then each pixel rounded towards its image.
        delta = images.double() - far
        outside = delta.flatten(1).norm(dim=1) > self.eps
        delta = delta * (self._shrink(delta) * (1 - 1e-14))
        near = (far + delta).to(clean.dtype)
        near = torch.where((near.double() - far).abs() > delta.abs(), torch.nextafter(near, clean), near)
        return torch.where(outside.reshape(-1, *[1] * (clean.dim() - 1)), near, images)

    def _scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images)
        if self.queries is not None:
            if len(images) != (self._samples if self._rows is None else len(self._rows)):
                self.queries = None
            elif self._rows is None:
                self.queries += 1
            else:
                self.queries[self._rows] += 1
        check_logits(type(self).__name__, logits, images, labels, self.targeted, values=self._first)
        self._first = False  # once in a call: values are read on the host
        return logits

    def _note(self, nan: Tensor) -> None:
        """Remember on the device that NaN was met."""
        self._nan = nan if self._nan is None else self._nan | nan

    @contextmanager
    def _randomness(self, indices: Tensor, look: bool) -> Iterator[Streams]:
        """The streams of a call. With a seed, the model's own random numbers repeat as well, and torch's generator is left as it was."""
        if self.seed is None:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=indices.device)
            yield Streams(seed, indices)
            return
        generator = Streams(self.seed, indices)
        if not look:  # a capture does not allow a change of torch's generator
            yield generator
            return
        own = int(Streams(self.seed, indices[:1] + 2**62).bits(1))
        with torch.random.fork_rng([indices.device] if indices.is_cuda else []):
            torch.default_generator.manual_seed(own)
            if indices.is_cuda:
                with torch.cuda.device(indices.device):
                    torch.cuda.manual_seed(own)
            yield generator

    # ---- description -------------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, object]:
        """The attack's options by name, as JSON can hold them."""
        plain = (str, int, float, bool, type(None))
        values = {key: value for key, value in vars(self).items() if not key.startswith("_") and key not in self.results}
        return {key: value if isinstance(value, plain) else repr(value) for key, value in values.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.options().items())})"


@contextmanager
def crafting(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in eval mode and its parameters ask for no gradient; then all is as it was, module by module.

    Frozen parameters keep layers from saving their inputs, and an attack that calls backward() from leaving gradients.
    """
    modes = [(module, module.training) for module in model.modules()]
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
