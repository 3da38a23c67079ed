"""What an attack answers to bad options, bad images and labels, and models that return something other than logits."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

__all__ = ["amount", "check_logits", "check_task", "parse_eps", "whole"]


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


def whole(who: str, what: str, value: object, least: int = 1) -> int:
    """`value`, if it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{who}: {what} is {value!r}; wanted an int >= {least}.")
    return value


def amount(who: str, what: str, value: object) -> float:
    """`value`, if it is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{who}: {what} is {value!r}; wanted a finite number >= 0, such as 0.9.")
    return float(value)


def check_task(who: str, model, images, labels, indices, targeted: bool, pixels: tuple[float, float], values: bool) -> None:
    """An error where an attack cannot work on these arguments. pixels: their range. values: look at these too."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is a {type(model).__name__}; wanted a torch.nn.Module from images to logits. Wrap a function in one.")
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{who}: images is {got}; wanted a floating-point tensor with pixels in [0, 1]. For bytes: images.float() / 255.")
    if images.dim() < 2:
        raise ValueError(f"{who}: images has shape {list(images.shape)}; wanted [N, C, H, W]. Add the batch dimension: images[None].")
    if labels is None and targeted:
        wanted = f"wanted the classes to reach as labels, int64 [{len(images)}], for example (y + 1) % classes"
        raise ValueError(f"{who}: targeted, but without targets; {wanted}.")
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
    if not values or len(images) == 0:
        return
    low, high, label = torch.stack([images.min().double(), images.max().double(), labels.min().double()]).tolist()
    if not (pixels[0] <= low and high <= pixels[1]):  # false for NaN too
        raise ValueError(
            f"{who}: images holds values from {low:g} to {high:g}; wanted [{pixels[0]:g}, {pixels[1]:g}]. "
            + ("Find where NaN comes from." if math.isnan(low) else "Pass unnormalised pixels; normalisation belongs in the model.")
        )
    if label < 0:
        raise ValueError(f"{who}: labels holds {int(label)}; wanted class numbers from 0.")


def check_logits(who: str, logits, images: Tensor, labels: Tensor, targeted: bool, values: bool) -> None:
    """An error where the model returned something other than logits for `images`. values: look at these too, on the host."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2 or not logits.is_floating_point():
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{who}: the model returned {got} for {len(images)} images; wanted float logits [{len(images)}, classes], two classes or more.")
    if not values:
        return
    seen = logits.detach().double()
    told = [labels.max(), seen.min(), (seen.sum(1) - 1).abs().max(), ((seen > 0) & (seen < 1)).any(), (seen.argmax(1) == labels).sum()]
    top, bottom, worst, between, reached = torch.stack([value.double() for value in told]).tolist()
    if top >= logits.shape[1]:
        raise ValueError(f"{who}: labels holds {int(top)}, but the model has {logits.shape[1]} classes; wanted class numbers below that.")
    if bottom >= 0 and worst < 1e-3 and between:  # rows of 0 and 1 alone may be counts of spikes
        raise ValueError(
            f"{who}: the model returned probabilities (each row is >= 0 and sums to 1); wanted logits, whose gradient does not vanish. "
            "Take the softmax out of the model."
        )
    if targeted and 2 * reached > len(labels):
        text = (
            f"{who}: targeted, but {int(reached)} of {len(labels)} labels are what the model answers already; wanted the classes to reach. "
            "Are they the true classes? Take others, for example (y + 1) % classes, or targeted=False."
        )
        if reached == len(labels) > 1:
            raise ValueError(text)
        warnings.warn(text, stacklevel=3)
