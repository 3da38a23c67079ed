"""Dropout for sequences: one mask for all steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["StepDropout", "make_dropout"]


class StepDropout(nn.Module):
    """Dropout whose mask is the same at every step: `y[t] = x[t] * m / (1 - p)`, each entry of m 1 with probability 1 - p.

    x: [T, N, *] float. Returns the same shape; x itself in eval mode. A silenced neuron is silent for the whole sequence, as in
    HIRE-SNN (ICCV 2021); `nn.Dropout` silences others at each step. For sequences that are run in parts: while `held` is True
    the mask of the first part, `mask` [1, N, *], is kept for those that follow.

    >>> StepDropout(0.2)(torch.ones(4, 2, 8))
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"StepDropout: p is {p!r}; wanted a number in [0, 1), the share of neurons that are silenced.")
        self.p, self.held = float(p), False
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = self.mask if self.held else None
        if mask is None:
            mask = F.dropout(torch.ones_like(x[:1], requires_grad=False), self.p)
        self.mask = mask if self.held else None
        return x * mask

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


def make_dropout(p: float, over_steps: bool) -> nn.Module:
    """Dropout with one mask for all steps (`StepDropout`), or, over_steps False, with one for each (`nn.Dropout`)."""
    return StepDropout(p) if over_steps else nn.Dropout(p)
