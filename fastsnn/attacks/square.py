"""Square: random search by squares, from the scores alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import LOSSES, Attack, Loss, whole
from .streams import Streams

__all__ = ["Square"]

#: Of a budget of 10,000 queries, those after which the share of pixels in a square is halved once more.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Square(Attack):
    """Square attack: changes of squares at random places, kept where they raise the loss; no gradient is taken.

    linf: from vertical stripes of +-eps, sets a square to `x +- eps`, one sign for each channel.
    l2: from tiles of opposed bumps, moves the norm of one window into bumps in another one.
    The share of pixels in a square begins at `p` and is halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000
    of 10,000 queries, scaled to the budget. Samples leave when they are fooled.

    budget: queries for each sample and restart, the one of the clean image apart. loss: as in `Attack`; by default the margin
    `max_{i != y} z_i - z_y`. restarts: samples still standing begin anew. Images of two or three dimensions have one channel.
    Further options as in `Attack`. Source: Andriushchenko et al., ECCV 2020, algorithms 1 to 3.

    >>> adversarial = Square(eps=8 / 255, budget=1000, seed=0)(model, images, labels)
    """

    name = "square"
    norms = ("linf", "l2")
    access = "scores"

    def __init__(self, eps: float | str, budget: int = 5000, p: float = 0.8, restarts: int = 1, loss: str | Loss = "margin", **options) -> None:
        super().__init__(eps, loss=loss, **options)
        self.budget, self.restarts = whole("Square", "budget", budget), whole("Square", "restarts", restarts)
        if not 0 < p <= 1:
            raise ValueError(f"Square: p is {p!r}; wanted the share of pixels in the first square, in (0, 1].")
        self.p = float(p)

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        shape = images.shape
        planes = (len(images), *[1] * (4 - images.dim()), *shape[1:]) if images.dim() < 4 else (len(images), -1, *shape[-2:])
        found = images.reshape(planes).clone()
        fooled = self.succeeded(self.mean_logits(model, images, labels), labels)
        highest = torch.full_like(labels, -math.inf, dtype=torch.float64)
        left = (~fooled).nonzero()[:, 0]
        streams = generator[left]
        for _ in range(self.restarts):
            if len(left) == 0:
                break
            clean, y = images.reshape(planes)[left], labels[left]
            x, value = clean, torch.full_like(highest[left], -math.inf)
            for query in range(self.budget):
                new = self._start(clean, streams) if query == 0 else self._proposal(x, clean, self.side(query, clean), streams)
                with self.only(left):
                    logits = self.mean_logits(model, new.reshape(-1, *shape[1:]), y)
                level, fooled = self._objective(logits, y), self.succeeded(logits, y)
                better = (level > value) | fooled
                x = torch.where(better[:, None, None, None], new, x)
                value = torch.where(better, level, value)
                if fooled.any():
                    found[left[fooled]] = x[fooled]
                    stay = ~fooled
                    left, clean, y, x, value, streams = (part[stay] for part in (left, clean, y, x, value, streams))
                    if len(left) == 0:
                        break
            better = value > highest[left]
            found[left[better]], highest[left[better]] = x[better], value[better]
        return found.reshape(shape)

    def side(self, query: int, images: Tensor) -> tuple[int, int]:
        """Height and width of the square of a query, in pixels."""
        place = query * 10000 // self.budget
        share = self.p / 2 ** sum(place > after for after in HALVINGS)
        high, wide = images.shape[-2:]
        side = max(round(math.sqrt(share * high * wide)), 1 if self.norm == "linf" else 3)
        if self.norm == "l2":
            side += 1 - side % 2
        return min(side, high), min(side, wide)

    # ---- proposals ---------------------------------------------------------------------------------------------------------

    def _start(self, clean: Tensor, streams: Streams) -> Tensor:
        channels, high, wide = clean.shape[1:]
        if self.norm == "linf":
            return (clean + self.eps * streams.signs(channels, 1, wide, dtype=clean.dtype)).clamp(self.low, self.high)
        side = max(min(high, wide) // 5, 1)
        rows, columns = high // side, wide // side
        signs = streams.signs(channels, rows, columns, dtype=clean.dtype)
        turned = streams.signs(1, rows, columns) > 0
        signs, turned = (part.repeat_interleave(side, -2).repeat_interleave(side, -1) for part in (signs, turned))
        tile = bumps(side, side, clean)
        tiles = torch.where(turned, tile.T.repeat(rows, columns), tile.repeat(rows, columns)) * signs
        delta = torch.zeros_like(clean)
        top, first = (high - rows * side) // 2, (wide - columns * side) // 2
        delta[:, :, top : top + rows * side, first : first + columns * side] = tiles
        return self._on_the_sphere(delta, clean)

    def _proposal(self, x: Tensor, clean: Tensor, side: tuple[int, int], streams: Streams) -> Tensor:
        channels = x.shape[1]
        here = self._window(x, side, streams)
        if self.norm == "linf":
            flat, before, original = x.flatten(2), x.flatten(2).gather(2, here), clean.flatten(2).gather(2, here)
            change = self.eps * streams.signs(channels, 1, dtype=x.dtype)
            after = (original + change).clamp(self.low, self.high)
            # What changes nothing is a query lost: the opposite signs then.
            same = (after == before).flatten(1).all(1)[:, None, None]
            after = torch.where(same, (original - change).clamp(self.low, self.high), after)
            return flat.scatter(2, here, after).reshape(x.shape)
        there = self._window(x, side, streams)
        delta = (x - clean).flatten(2)
        rest = delta.scatter(2, here, 0.0).scatter(2, there, 0.0)
        unused = (self.eps**2 - delta.square().sum((1, 2), keepdim=True)).clamp(min=0) / channels
        size = (unused + (delta - rest).square().sum(2, keepdim=True)).sqrt()
        bump = bumps(*side, x)
        shape = bump.flatten()
        if side[0] == side[1]:
            shape = torch.where(streams.signs(1, 1) > 0, bump.T.flatten(), shape)
        new = unit(shape * streams.signs(channels, 1, dtype=x.dtype) + unit(delta.gather(2, here))) * size
        return self._on_the_sphere(rest.scatter(2, here, new).reshape(x.shape), clean)

    def _window(self, x: Tensor, side: tuple[int, int], streams: Streams) -> Tensor:
        """[N, C, h*w] the places, in the flattened plane, of a window at random for each sample."""
        high, wide = x.shape[-2:]
        top, first = streams.integers(high - side[0] + 1, 1), streams.integers(wide - side[1] + 1, 1)
        rows, columns = (start + torch.arange(count, device=x.device) for start, count in ((top, side[0]), (first, side[1])))
        places = rows[:, :, None] * wide + columns[:, None, :]
        return places.flatten(1)[:, None].expand(-1, x.shape[1], -1)

    def _on_the_sphere(self, delta: Tensor, clean: Tensor) -> Tensor:
        return (clean + self.eps * unit(delta.flatten(1)).reshape(clean.shape)).clamp(self.low, self.high)

    def _objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = (LOSSES[self.loss] if isinstance(self.loss, str) else self.loss)(logits, labels).double()
        return -loss if self.targeted else loss


def unit(values: Tensor) -> Tensor:
    """`values / |values|_2` over the last dimension; 0 where all are 0."""
    return values / values.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def bumps(high: int, wide: int, like: Tensor) -> Tensor:
    """[high, wide] of norm 1: a pyramid in the upper half, its negative in the lower one.

    At distance d (the larger of those in rows and columns) from its middle, a pyramid is `sum_{k=d}^{K} 1/(k + 1)^2`, K the
    largest distance. Source: Andriushchenko et al., equation 2.
    """
    upper, lower = high // 2, high - high // 2

    def pyramid(rows: int) -> Tensor:
        row, column = (torch.arange(count) - count // 2 for count in (rows, wide))
        distance = torch.maximum(row.abs()[:, None], column.abs()[None])
        terms = 1 / torch.arange(1.0, max(rows, wide) // 2 + 2, dtype=torch.float64).square()
        values = terms.flip(0).cumsum(0).flip(0)[distance]
        return values / values.norm()

    halves = ([pyramid(upper)] if upper else []) + [-pyramid(lower)]
    values = torch.cat(halves)
    return (values / values.norm()).to(like)
