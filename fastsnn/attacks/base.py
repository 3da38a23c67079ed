"""What every attack shares: one final call that owns the checks, the model's modes and the ball; `run` is the attack."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adjoints import adjoint, nearest
from ..surrogates import Surrogate
from .streams import Streams

__all__ = ["LOSSES", "Attack", "Gradient", "parse_eps"]

#: (logits [N, classes], labels [N]) -> [N]: what an attack raises (lowers, where targeted), sample by sample.
Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log softmax(logits)[label]` for each sample: [N]; float32 at least."""
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="none")


LOSSES: dict[str, Loss] = {"ce": cross_entropy}

NORMS = ("linf", "l2")


class Gradient(NamedTuple):
    """What `Attack.gradient` returns."""

    gradient: Tensor  # like images: of the objective, which the attack ascends
    logits: Tensor  # [N, classes]
    loss: Tensor  # [N]


def parse_eps(value: str | float) -> float:
    """A size of perturbation in pixels from "8/255", "0.03" or a number.

    >>> parse_eps("8/255")
    0.03137254901960784
    """
    top, slash, bottom = str(value).partition("/")
    try:
        eps = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"eps is {value!r}; wanted a number of pixels in [0, 1], such as 8/255 or 0.03.") from None
    if not eps >= 0:
        raise ValueError(f"eps is {value!r}; wanted a number >= 0, such as 8/255.")
    return eps


class Attack(ABC):
    """An attack on a classifier: `attack(model, images, labels)` returns adversarial images.

    eps: the largest perturbation of a sample, in pixels of [0, 1], in `norm`: "linf" (the largest pixel) or "l2" (the
        root of the sum of squares). targeted: labels are the classes to reach, not the true ones.
    adjoint: how gradients pass spiking layers, as `fastsnn.adjoint` takes it (a name, a surrogate, a callable, or a
        tuple (name, surrogate)); None: as the model was trained.
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
    #: What the attack asks of the model: its "gradient", its "scores" (logits), its "decisions" (classes), or "nothing".
    access = "gradient"
    #: Whether it takes one step only.
    single_step = False

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
        with self.backward_choice():  # an unknown adjoint is told now
            pass
        #: [N] bool after a call: where the first gradient was zero everywhere; None where the attack took none.
        self.zero_gradient: Tensor | None = None
        self._first, self._nan = False, None

    @abstractmethod
    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        """Adversarial images, like `images`; `__call__` keeps them in the ball and the range."""

    @final
    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> Tensor:
        """Adversarial images for `model`: detached, like `images` in shape, dtype and layout.

        model: any module from images to logits [N, classes]. It is in eval mode meanwhile; each submodule's mode comes
            back, and no parameter gets a gradient.
        images: [N, ...] float, usually [N, C, H, W], pixels in [0, 1]. labels: [N] int64.
        indices: [N] int64, the samples' places in the data set, which key their random numbers; by default 0 ... N-1.

        No sample is moved by more than eps: in linf every pixel lies between `image - eps` and `image + eps`, as these come out
        in the images' arithmetic (so do other libraries' balls); in l2 the norm, evaluated in float64, is at most eps. Pixels
        stay in [0, 1]. Raises FloatingPointError where the loss or its gradient is NaN.
        """
        who = type(self).__name__
        # A captured graph cannot be asked for values; whoever captures has run the call before.
        look = not (isinstance(images, Tensor) and images.is_cuda and torch.cuda.is_current_stream_capturing())
        self._check(model, images, labels, indices, look)
        if len(images) == 0:
            return images.detach().clone()
        # Inference tensors cannot be differentiated: copies made outside of inference mode can.
        with torch.inference_mode(False), torch.no_grad():
            clean, labels = images.detach(), labels.detach()
            if clean.is_inference():
                clean, labels = clean.clone(), labels.clone()
            places = torch.arange(len(clean), device=clean.device) if indices is None else indices
            self.zero_gradient, self._nan, self._first = None, None, look
            with crafting(model), self._randomness(places, look) as generator:
                found = self.run(model, clean, labels, generator)
            if not isinstance(found, Tensor) or found.shape != clean.shape:
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise TypeError(f"{who}: run returned {got}; wanted images of shape {list(clean.shape)}.")
            found = self._inside(found.detach().to(clean.dtype), clean)
            nan = found.isnan().any()
            if look and (nan if self._nan is None else nan | self._nan):
                raise FloatingPointError(
                    f"{who}: the model's loss or its gradient holds NaN; wanted finite numbers. Look for NaN or infinity in its parameters and logits."
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
        loss = loss or (LOSSES[self.loss] if isinstance(self.loss, str) else self.loss)
        totals: list[Gradient] = []
        for _ in range(self.eot):
            with torch.enable_grad():
                x = images.detach().requires_grad_()
                logits = self._scores(model, x, labels)
                losses = loss(logits, labels)
                if losses.shape != labels.shape:
                    raise ValueError(f"{type(self).__name__}: loss gave shape {list(losses.shape)}; wanted [{len(labels)}], one number for each sample.")
                objective = -losses.sum() if self.targeted else losses.sum()
                if not objective.requires_grad:
                    raise ValueError(
                        f"{type(self).__name__}: the model's logits do not depend on its images by a differentiable path; wanted a model without "
                        "detach() or no_grad() in its forward. Use an attack that takes no gradient."
                    )
                parts = []
                for place, choice in enumerate(adjoints, 1):
                    with self.backward_choice(choice):
                        (part,) = torch.autograd.grad(objective, x, retain_graph=place < len(adjoints))
                    parts.append(Gradient(part, logits.detach(), losses.detach()))
            totals = [Gradient(*(a + b for a, b in zip(*pair))) for pair in zip(totals, parts)] or parts
        if self.eot > 1:
            totals = [Gradient(*(value / self.eot for value in total)) for total in totals]
        # The sign of NaN is 0: an attack that stands still must not pass for a model that withstands it.
        nan = torch.stack([value.isnan().any() for total in totals for value in (total.gradient, total.loss)]).any()
        self._nan = nan if self._nan is None else self._nan | nan
        if self.zero_gradient is None:
            self.zero_gradient = (totals[0].gradient.flatten(1) == 0).all(1)
        return totals

    def succeeded(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[N] bool: where the model is fooled: another class than labels, or just that one where targeted."""
        reached = logits.argmax(1) == labels
        return reached if self.targeted else ~reached

    def logits(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The model's scores [N, classes], checked; with gradient where the caller enables it."""
        return self._scores(model, images, labels)

    def backward_choice(self, choice=None):
        """A block whose backward passes use the attack's adjoint, or `choice`."""
        choice = self.adjoint if choice is None else choice
        if choice is None:
            return nullcontext()
        return adjoint(*choice) if isinstance(choice, tuple) else adjoint(choice)

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
        if self.norm == "linf":
            return torch.minimum(torch.maximum(images, clean - self.eps), clean + self.eps)
        if self.eps == math.inf:
            return images
        far = clean.double()
        # Scaled in float64 and a little too far, then each pixel rounded towards its image.
        delta = images.double() - far
        outside = delta.flatten(1).norm(dim=1) > self.eps
        delta = delta * (self._shrink(delta) * (1 - 1e-14))
        near = (far + delta).to(clean.dtype)
        near = torch.where((near.double() - far).abs() > delta.abs(), torch.nextafter(near, clean), near)
        return torch.where(outside.reshape(-1, *[1] * (clean.dim() - 1)), near, images)

    # ---- checks ------------------------------------------------------------------------------------------------------------

    def _check(self, model, images, labels, indices, look: bool) -> None:
        who = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{who}: model is a {type(model).__name__}; wanted a torch.nn.Module from images to logits. Wrap a function in one.")
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{who}: images is {got}; wanted a floating-point tensor with pixels in [0, 1]. For bytes: images.float() / 255.")
        if images.dim() < 2:
            raise ValueError(f"{who}: images has shape {list(images.shape)}; wanted [N, C, H, W]. Add the batch dimension: images[None].")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"{who}: labels is {got}; wanted an int64 tensor of class numbers. Cast it: labels.long().")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{who}: labels has shape {list(labels.shape)}; wanted [{len(images)}], one class for each image.")
        if labels.device != images.device:
            raise ValueError(f"{who}: labels is on {labels.device}, images on {images.device}; wanted one device. Move it: labels.to(images.device).")
        if indices is not None and (not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.shape != labels.shape):
            got = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"{who}: indices is {got}; wanted int64 [{len(images)}], the samples' places in the data set.")
        if not look or len(images) == 0:
            return
        low, high, label = torch.stack([images.min().double(), images.max().double(), labels.min().double()]).tolist()
        if not (self.low <= low and high <= self.high):  # false for NaN too
            raise ValueError(
                f"{who}: images holds values from {low:g} to {high:g}; wanted [{self.low:g}, {self.high:g}]. "
                + ("Find where NaN comes from." if math.isnan(low) else "Pass unnormalised pixels; normalisation belongs in the model.")
            )
        if label < 0:
            raise ValueError(f"{who}: labels holds {int(label)}; wanted class numbers from 0.")

    def _scores(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        who = type(self).__name__
        logits = model(images)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2 or not logits.is_floating_point():
            got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"{who}: the model returned {got} for {len(images)} images; wanted float logits [{len(images)}, classes], two classes or more.")
        if self._first:  # once in a call: values are read on the host
            self._first = False
            seen = logits.detach().double()
            values = [labels.max(), seen.min(), (seen.sum(1) - 1).abs().max(), ((seen > 0) & (seen < 1)).any()]
            top, bottom, worst, between = torch.stack([value.double() for value in values]).tolist()
            if top >= logits.shape[1]:
                raise ValueError(f"{who}: labels holds {int(top)}, but the model has {logits.shape[1]} classes; wanted class numbers below that.")
            if bottom >= 0 and worst < 1e-3 and between:  # rows of 0 and 1 alone may be counts of spikes
                raise ValueError(
                    f"{who}: the model returned probabilities (each row is >= 0 and sums to 1); wanted logits, whose gradient does not vanish. "
                    "Take the softmax out of the model."
                )
        return logits

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
        values = {key: value for key, value in vars(self).items() if not key.startswith("_") and key != "zero_gradient"}
        return {key: value if isinstance(value, plain) else repr(value) for key, value in values.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.options().items())})"


def whole(who: str, what: str, value: object, least: int = 1) -> int:
    """`value`, if it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{who}: {what} is {value!r}; wanted an int >= {least}.")
    return value


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
