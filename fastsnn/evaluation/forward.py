"""Forward passes over many images: batches, eval mode, checked logits, predictions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["accuracy", "batches", "check", "evaluating", "fetch", "logits_of", "right_answers"]


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 256, device: str | torch.device | None = None) -> float:
    """The share of images that the model classifies right, in eval mode; the model's modes come back.

    x: [N, C, H, W] uint8, or float with pixels in [0, 1]. y: [N] int64. device: where to run, the model is moved there; None: where it is.
    """
    check("accuracy", x, y, batch_size)
    right = 0
    with evaluating(model):
        for images, labels in batches(model, x, y, batch_size, device):
            right += (logits_of("accuracy", model, images).argmax(1) == labels).sum()
    return int(right) / len(x)


class evaluating:
    """Within this block: eval mode, no gradient recorded; then each module's mode as before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.grad = torch.is_grad_enabled()
        self.model.eval()
        torch.set_grad_enabled(False)

    def __exit__(self, *_) -> None:
        torch.set_grad_enabled(self.grad)
        for module, training in self.modes:
            module.training = training


def check(who: str, x: Tensor, y: Tensor | None, batch_size: int) -> None:
    """TypeError or ValueError where images, labels or the size of batches cannot be used."""
    if not isinstance(x, Tensor) or not (x.dtype == torch.uint8 or x.is_floating_point()):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who}: x is {got}; wanted uint8, or float with pixels in [0, 1].")
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(f"{who}: x has shape {list(x.shape)}; wanted [N, C, H, W] with one image or more.")
    if y is not None and (not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]):
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{who}: y is {got}; wanted int64 [{len(x)}], one class number for each image.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{who}: batch_size is {batch_size!r}; wanted an int >= 1.")


def fetch(model: nn.Module, x: Tensor, places: Tensor | slice, device) -> Tensor:
    """Some of the images on the device (None: the model's); bytes become the model's floating-point type in [0, 1]."""
    weight = next((value for value in model.parameters() if value.is_floating_point()), None)
    if device is None and weight is not None:
        device = weight.device
    images = x[places].to(device)
    if images.dtype == torch.uint8:
        images = images.to(torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32) / 255
    return images


def batches(model: nn.Module, x: Tensor, y: Tensor | None, batch_size: int, device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(images, labels) of all samples, on the device, where the model is moved too."""
    if device is not None:
        model.to(device)
    for begin in range(0, len(x), batch_size):
        part = slice(begin, begin + batch_size)
        images = fetch(model, x, part, device)
        yield images, None if y is None else y[part].to(images.device)


def logits_of(who: str, model: nn.Module, images: Tensor) -> Tensor:
    """[N, classes], checked to be finite numbers for each image."""
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{who}: the model returned {got} for {len(images)} images; wanted logits [{len(images)}, classes].")
    if not logits.isfinite().all():
        raise FloatingPointError(f"{who}: the model's logits hold NaN or infinity; wanted finite logits. Look for NaN in its parameters.")
    return logits


def right_answers(model: nn.Module, images: Tensor, labels: Tensor, passes: int, seed: int) -> Tensor:
    """[N] bool: whether the class of the largest mean logit over `passes` forward passes is the label.

    A random model draws its numbers from `seed`; torch's own generator is left as it was.
    """
    with evaluating(model), torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        total = logits_of("evaluate", model, images)
        for _ in range(passes - 1):
            total = total + logits_of("evaluate", model, images)
        return total.argmax(1) == labels
