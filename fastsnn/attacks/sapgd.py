"""SA-PGD: ascent with normalised momentum and a step of its own for each pixel, for the noisy gradients of spiking networks."""

from __future__ import annotations

import torch
from torch import Tensor

from .ascent import Ascent, Walk, checkpoints

__all__ = ["SAPGD"]


class SAPGD(Ascent):
    """Stable adaptive PGD: momentum over a running root mean square, clipped to the step size.

        m[k] = 0.5*m[k-1] + g/mean|g|,  v[k] = 0.8*v[k-1] + g^2/mean(g^2),  m[0] = v[0] = 0
        x[k+1] = P(x[k] + clamp(step * m[k]/sqrt(v[k]), -step, step))

    Means are over a sample. P clips to the ball of eps, then to [0, 1]. The step begins at eps and is halved at each of
    `checkpoints(steps)`, for all samples. The start is uniform, scaled to the distance eps.

    steps, restarts, early_stop: as in `Ascent`. loss: "ce", "dlr", "margin", or a function. Further options as in
    `Attack`. The paper takes its gradients through ASSG: `adjoint="assg"`.
    Source: Wang et al., "Towards Reliable Evaluation of Adversarial Robustness for Spiking Neural Networks", arXiv
    2512.22522, section 4.2; the first step, the start and the halving as in the authors' code.

    >>> adversarial = SAPGD(eps=8 / 255, steps=100)(model, images, labels)
    """

    name = "sa-pgd"
    first_step = 1.0

    def __init__(self, eps: float | str, steps: int = 100, restarts: int = 1, early_stop: bool = True, **options) -> None:
        super().__init__(eps, steps, restarts, early_stop, **options)
        self._checkpoints = checkpoints(steps)

    def begin(self, walk: Walk) -> None:
        walk.momentum, walk.square = torch.zeros_like(walk.x), torch.zeros_like(walk.x)

    def move(self, walk: Walk, number: int) -> Tensor:
        pixels, tiny = tuple(range(1, walk.x.dim())), torch.finfo(walk.x.dtype).tiny
        # Squares of small gradients underflow: of g/mean|g| they do not, and their ratio to their mean is the same.
        scaled = walk.gradient / walk.gradient.abs().mean(pixels, keepdim=True).clamp(min=tiny)
        square = scaled**2
        walk.momentum = 0.5 * walk.momentum + scaled
        walk.square = 0.8 * walk.square + square / square.mean(pixels, keepdim=True).clamp(min=tiny)
        step = (walk.momentum / (walk.square.sqrt() + 1e-12) * walk.step).clamp(-walk.step, walk.step)
        low, high = (walk.clean - self.eps).clamp(min=self.low), (walk.clean + self.eps).clamp(max=self.high)
        return (walk.x + step).clamp(low, high)

    def review(self, walk: Walk, number: int, loss: Tensor) -> None:
        if number in self._checkpoints:
            walk.step = walk.step / 2
