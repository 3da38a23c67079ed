"""The loss around what a network has learned: over the pixels of images, over its weights, and its gradient by the pixels.

A surface that is flat along the gradient's direction and rises along a random one is a sign of masked gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adjoints import adjoint as backward
from .adjoints import nearest
from .attacks.base import crafting, parse_eps
from .attacks.streams import Streams

__all__ = ["DIRECTIONS", "Landscape", "Sparsity", "input_gradient", "pixels", "sparsity", "weights"]

DIRECTIONS = ("gradient", "random")


@dataclass(frozen=True)
class Landscape:
    """Mean cross-entropy (nats) and accuracy over a grid: loss, accuracy [B, A] at the coordinates b [B] and a [A].

    space: "pixels" or "weights". directions: the kinds of the axes a and b. eps: in pixels, what coordinate 1 is.
    """

    space: str
    directions: tuple[str, str]
    a: np.ndarray
    b: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    eps: float | None = None


def pixels(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float | str,
    directions: Sequence[str] = ("gradient", "random"),
    points: int = 21,
    reach: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    adjoint=None,
) -> Landscape:
    """The loss in a square around images, in units of eps.

        L(a, b) = mean over n of CE(f(clip(x_n + eps*(a*d1_n + b*d2_n), 0, 1)), y_n),  -reach <= a, b <= reach

    directions: of d1 and d2, each "gradient", the sign of the loss's gradient at x_n (FGSM's step), or "random", signs drawn
    for each sample by the seed. images: [N, ...] float in [0, 1], on the model's device; labels: [N] int64. points: along each
    axis. batch_size: images of several points that run together. adjoint: how the gradient passes spiking layers, as `fastsnn.adjoint` takes it.

    The model is in eval mode meanwhile. One that draws random numbers draws the same ones at every point.
    Source: Liu et al., Delving into Transferable Adversarial Examples, ICLR 2017, figure 3 [R: the mean over images].

    >>> surface = fastsnn.landscapes.pixels(model, images, labels, "8/255")
    >>> surface.loss[10, -1]  # FGSM at 8/255: a = 1, b = 0
    """
    who = "landscapes.pixels"
    size = parse_eps(eps)
    _check(who, model, images, labels, directions, points, reach)
    streams = Streams(seed, torch.arange(len(images), device=images.device))
    moves = []
    for kind in directions:
        if kind == "gradient":
            moves.append(input_gradient(model, images, labels, adjoint, batch_size).sign())
        else:
            moves.append(streams.signs(*images.shape[1:], dtype=images.dtype))

    def forward(places: Sequence[tuple[float, float]]) -> Tensor:
        return model(torch.cat([(images + size * (a * moves[0] + b * moves[1])).clamp(0, 1) for a, b in places]))

    with crafting(model), torch.no_grad():
        # Of a model that draws random numbers each point is a batch of its own, so that all get the same ones.
        together = 1 if _is_random(model, images) else max(1, batch_size // len(images))
        return _surface("pixels", directions, points, reach, seed, images, labels, forward, together, size)


def weights(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    directions: Sequence[str] = ("gradient", "random"),
    points: int = 21,
    reach: float = 1.0,
    seed: int = 0,
) -> Landscape:
    """The loss on images in a square around the weights, in units of the norm of each filter.

        L(a, b) = mean over n of CE(f_w(x_n), y_n) at w = w0 + a*d1 + b*d2,  d_i <- d_i * ||w0_i|| / ||d_i|| for each filter i

    directions: of d1 and d2, each "gradient", the gradient of the loss, or "random", normal numbers drawn by the seed; both are
    scaled filter by filter (a row of a linear layer, an output channel of a convolution). Biases, normalisations and neurons
    stay. images, labels, points: as in `pixels`. The weights are not touched.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, section 4.
    """
    who = "landscapes.weights"
    _check(who, model, images, labels, directions, points, reach)
    found = {name: value.detach() for name, value in model.named_parameters() if value.dim() > 1 and "weight" in name.rpartition(".")[2]}
    if not found:
        raise ValueError(f"{who}: {type(model).__name__} has no parameter named weight with two dimensions or more; wanted linear or convolution layers.")
    generator = torch.Generator().manual_seed(seed)
    with crafting(model):
        moves = []
        for kind in directions:
            if kind == "gradient":
                asked = {name: value.clone().requires_grad_() for name, value in found.items()}
                with torch.enable_grad(), _same_draws(seed, images):
                    loss = F.cross_entropy(_floating(torch.func.functional_call(model, asked, (images,))), labels)
                    drawn = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
                drawn = [torch.zeros_like(value) if move is None else move for move, value in zip(drawn, found.values())]
            else:
                drawn = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value) for value in found.values()]
            moves.append([_like_filters(move, value) for move, value in zip(drawn, found.values())])

        def forward(places: Sequence[tuple[float, float]]) -> Tensor:
            ((a, b),) = places
            there = {name: value + a * first + b * second for (name, value), first, second in zip(found.items(), *moves)}
            return torch.func.functional_call(model, there, (images,))

        with torch.no_grad():
            return _surface("weights", directions, points, reach, seed, images, labels, forward)


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, adjoint=None, batch_size: int = 256) -> Tensor:
    """The gradient of each image's cross-entropy by its pixels: like images, in nats per unit of a pixel.

    images: [N, ...] float in [0, 1]; labels: [N] int64. adjoint: as `fastsnn.adjoint` takes it; None: as the model was trained.

    >>> heat = fastsnn.landscapes.input_gradient(model, images, labels).abs().amax(1)  # [N, H, W]
    """
    _check("landscapes.input_gradient", model, images, labels)
    found = []
    with crafting(model), torch.enable_grad(), _through(adjoint):
        for x, y in zip(images.split(batch_size), labels.split(batch_size)):
            x = x.detach().clone().requires_grad_()
            with _same_draws(0, x):
                loss = F.cross_entropy(_floating(model(x)), y, reduction="sum")
            found.append(torch.autograd.grad(loss, x)[0])
    return torch.cat(found)


class Sparsity(NamedTuple):
    """How few pixels a gradient depends on, sample by sample: [N] each.

    zero: the share of entries that are 0. hoyer: (sqrt(n) - ||g||_1 / ||g||_2) / (sqrt(n) - 1), from 0, all of one size, to 1, a
    single entry (Hoyer, JMLR 2004, section 3.1); nan for a gradient of zeros. l1: ||g||_1, the slope of the loss along FGSM's step.
    """

    zero: Tensor
    hoyer: Tensor
    l1: Tensor


def sparsity(gradient: Tensor) -> Sparsity:
    """`Sparsity` of gradients [N, ...], evaluated in float64.

    >>> sparsity(torch.tensor([[0.0, 0.0, 2.0, 0.0]])).hoyer
    tensor([1.], dtype=torch.float64)
    """
    if not isinstance(gradient, Tensor) or gradient.dim() < 2 or gradient[:1].numel() < 2:
        got = list(gradient.shape) if isinstance(gradient, Tensor) else type(gradient).__name__
        raise ValueError(f"landscapes.sparsity: gradient is {got}; wanted a tensor [N, ...] with two entries or more for each sample.")
    flat = gradient.detach().double().flatten(1).abs()
    total, root = flat.sum(1), flat.shape[1] ** 0.5
    return Sparsity((flat == 0).double().mean(1), (root - total / flat.norm(dim=1)) / (root - 1), total)


# ---- parts -------------------------------------------------------------------------------------------------------------------


def _axis(points: int, reach: float) -> np.ndarray:
    """Coordinates whose middle is 0 and whose ends are the reach, to the bit."""
    half = points // 2
    return np.arange(-half, half + 1) / half * reach


def _surface(
    space: str, directions: Sequence[str], points: int, reach: float, seed: int, images: Tensor, labels: Tensor, forward, together: int = 1, eps=None
) -> Landscape:
    """The loss at each point of the grid; `forward` gives the logits of all images at each of some points, `together` at a time."""
    axis = _axis(points, reach)
    places, found = [(float(a), float(b)) for b in axis for a in axis], []
    for start in range(0, len(places), together):
        part = places[start : start + together]
        with _same_draws(seed, images):
            loss, right = _judge(f"landscapes.{space}", forward(part), labels.repeat(len(part)))
        found.append(torch.stack([loss, right]).view(2, len(part), -1).mean(2))
    loss, right = torch.cat(found, 1).view(2, points, points).cpu().numpy()
    return Landscape(space, tuple(directions), axis, axis, loss, right, eps)


def _judge(who: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{who}: the model returned {got} for {len(labels)} images; wanted logits [{len(labels)}, classes].")
    return F.cross_entropy(logits.double(), labels, reduction="none"), (logits.argmax(1) == labels).double()


def _floating(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _like_filters(move: Tensor, value: Tensor) -> Tensor:
    """A direction whose filters have the norms of the weights' own; a filter of zeros stays zero."""
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (value, move)]
    return move * (norms[0] / norms[1].clamp(min=torch.finfo(move.dtype).tiny)).view(-1, *[1] * (move.dim() - 1))


@contextmanager
def _same_draws(seed: int, images: Tensor) -> Iterator[None]:
    """Within this block torch draws the numbers of the seed; its generators are left as they were."""
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        yield


def _is_random(model: nn.Module, images: Tensor) -> bool:
    outputs = []
    for seed in (0, 1):
        with _same_draws(seed, images):
            outputs.append(model(images))
    return not torch.equal(*outputs)


def _through(adjoint):
    if adjoint is None:
        return nullcontext()
    return backward(*adjoint) if isinstance(adjoint, tuple) else backward(adjoint)


def _check(who: str, model, images, labels, directions: Sequence[str] | None = None, points: int = 3, reach: float = 1.0) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is a {type(model).__name__}; wanted a torch.nn.Module from images to logits.")
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2 or len(images) == 0:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{who}: images is {got}; wanted float [N, C, H, W] with pixels in [0, 1], one image or more. For bytes: images.float() / 255.")
    low, high = images.min().item(), images.max().item()
    if not (0 <= low and high <= 1):
        raise ValueError(f"{who}: images holds values from {low:g} to {high:g}; wanted [0, 1]. Pass unnormalised pixels; normalisation belongs in the model.")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{who}: labels is {got}; wanted int64 [{len(images)}], one class number for each image.")
    if directions is None:
        return
    if isinstance(directions, str) or len(directions) != 2:
        raise ValueError(f"{who}: directions is {directions!r}; wanted two of {', '.join(DIRECTIONS)}, such as ('gradient', 'random').")
    for kind in directions:
        if kind not in DIRECTIONS:
            raise ValueError(f"{who}: direction {kind!r} is unknown; wanted one of {', '.join(DIRECTIONS)}.{nearest(kind, DIRECTIONS)}")
    if tuple(directions) == ("gradient", "gradient"):
        raise ValueError(f"{who}: directions is {tuple(directions)!r}, one and the same; wanted at most one gradient, such as ('gradient', 'random').")
    if isinstance(points, bool) or not isinstance(points, int) or points < 3 or points % 2 == 0:
        raise ValueError(f"{who}: points is {points!r}; wanted an odd int >= 3, so that the middle is a point.")
    if not 0 < reach < float("inf"):
        raise ValueError(f"{who}: reach is {reach!r}; wanted a number > 0.")
