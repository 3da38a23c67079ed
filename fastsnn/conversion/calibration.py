"""The mini-batches that thresholds are balanced on, and the value of a rank among numbers that come in parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor


def mini_batches(data: Tensor | Iterable | None, batches: int, size: int, like: Tensor) -> list[Tensor]:
    """The first mini-batches of data as floats, in the dtype and on the device of `like`."""
    cure = "Pass images of the training set, for example convert(ann, data.x_train[:640], ...)."
    if data is None:
        raise ValueError(f"convert: data is missing; thresholds are balanced on images [M, C, H, W] or mini-batches of them. {cure}")
    if isinstance(data, Tensor):
        if data.dim() < 2:
            raise ValueError(f"convert: data has shape {list(data.shape)}; wanted images [M, C, H, W]. {cure}")
        parts: Iterable = data.split(size)
    else:
        try:
            parts = iter(data)
        except TypeError:
            raise TypeError(f"convert: data is a {type(data).__name__}; wanted a tensor of images or an iterable of mini-batches. {cure}") from None
    found = []
    for part in itertools.islice(parts, batches):
        images = part[0] if isinstance(part, (tuple, list)) else part
        if not isinstance(images, Tensor):
            raise TypeError(f"convert: a mini-batch is a {type(images).__name__}; wanted a tensor of images, or a tuple that begins with one.")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"convert: data is {str(images.dtype).removeprefix('torch.')}; wanted floats, pixels in [0, 1], or uint8.")
        if len(images):
            images = images.to(like.device)
            found.append(images.to(like.dtype) / 255 if images.dtype == torch.uint8 else images.to(like.dtype))
    if not found:
        raise ValueError(f"convert: data holds no image; wanted at least one. {cure}")
    return found


class Ranked:
    """The value of rank `1 + round(rho*(n - 1))`, ascending, of n numbers that come in parts: exact, and only the numbers above it are kept.

    count: n, of all parts together. rho: a share in (0, 1].
    """

    def __init__(self, count: int, rho: float) -> None:
        self.kept = count - round(rho * (count - 1))  # from the top, with the value itself
        self._highest: Tensor | None = None
        self._least = -math.inf

    def add(self, part: Tensor, times: int = 1) -> None:
        """Numbers of any shape. times: how often each of them is there, the same for all parts."""
        kept = -(-self.kept // times)
        numbers = part.reshape(-1)
        if self._highest is not None:
            numbers = torch.cat([self._highest, numbers[~(numbers <= self._least)]])  # NaN is not <=, and stays
        if len(numbers) > kept:
            numbers = numbers.topk(kept, sorted=False).values
        self._highest = numbers
        if len(numbers) == kept:
            self._least = numbers.min()

    def value(self) -> float:
        """NaN where a number was."""
        if self._highest.isnan().any():
            return math.nan
        return self._highest.min().item()
