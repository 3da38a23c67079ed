"""SR: sparsity regularisation, a small and sparse gradient with respect to the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..attacks.base import crafting
from ..attacks.checks import amount
from ..attacks.expectation import is_random
from .base import Defense, Run, wide

__all__ = ["SR", "gradient_sparsity", "true_share"]


def true_share(logits: Tensor, labels: Tensor, rivals: Tensor | None = None) -> Tensor:
    """The true class's probability against one rival, `p = e^z_y / (e^z_y + e^z_m)`: [N].

    logits z: [N, classes] float; labels y: [N] int64. rivals m: [N] int64; None: the best wrong class.
    """
    logits = wide(logits)
    if rivals is None:
        rivals = best_wrong(logits, labels)
    of = logits.gather(1, torch.stack([labels, rivals], 1))
    return (of[:, 0] - of[:, 1]).sigmoid()


def best_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.detach().scatter(1, labels[:, None], -math.inf).argmax(1)


def gradient_sparsity(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How sparse and how large the gradient g of `true_share` is at each image, for the model as an attacker meets it, in eval mode.

    images: [N, C, H, W], pixels in [0, 1]; labels: [N] int64. Returns [N] sparseness, `(sqrt(n) - |g|_1/|g|_2)/(sqrt(n) - 1)` for n pixels: from
    0, where all entries are equally large, to 1, where one entry is left, or none; and [N] the l1 norm |g|_1, in units of 1/pixel.
    Source: the l1 norm, SR, ICML 2024; the sparseness, Hoyer, JMLR 2004, since the number of entries other than 0
    (the paper's l0 norm) is mostly that of all pixels.

    >>> sparseness, l1 = gradient_sparsity(model, images, labels)
    """
    with crafting(model), torch.enable_grad():
        x = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(true_share(model(x), labels).sum(), x)
    return sparsity(gradient)


def sparsity(gradient: Tensor) -> tuple[Tensor, Tensor]:
    flat = wide(gradient.flatten(1))
    l1, l2, root = flat.abs().sum(1), flat.norm(dim=1), flat.shape[1] ** 0.5
    return torch.where(l2 == 0, 1.0, (root - l1 / l2) / (root - 1)), l1


class SR(Defense):
    """Sparsity regularisation: `loss + weight * mean ((p(x + h*d) - p(x))/h)^2`, `d = sign grad_x p(x)` a constant.

    p is the true class's probability against the best wrong class m on x (`true_share`), and m is kept at x + h*d, so that to
    first order the difference quotient is the l1 norm of p's gradient (where images meet in batch norm: the mean of all quotients
    is the mean of the norms). No second derivative is taken: there is one gradient with respect to the images, then a second
    forward, and the loss is differentiated through both forwards.
    weight: lambda; 0.001 is a reading, the paper tunes it. h: in pixels; x + h*d may leave [0, 1].

    Both forwards run in train mode, each normalised by its own batch. With `at`, x is the adversarial image (the paper: PGD with 7
    steps). Reports "gradient_sparsity" and "gradient_l1", means over the batch as in `gradient_sparsity`, but in train mode.
    A ValueError in `prepare` for a network that is random in training: the quotient would be that of its noise. Dropout draws anew in
    the second forward. Source: Liu et al., Enhancing Adversarial Robustness in SNNs with Sparse Gradients, ICML 2024 (arXiv 2405.20355).

    >>> loss = (SR(weight=0.001) + AT(steps=7)).loss(model, images, labels)
    """

    name = "sr"
    input_gradient = True

    def __init__(self, weight: float = 0.001, h: float = 0.01) -> None:
        self.weight, self.h = amount("SR", "weight", weight), amount("SR", "h", h)
        if self.h == 0:
            raise ValueError("SR: h is 0; wanted the step of a difference quotient, a number > 0, such as 0.01.")

    def prepare(self, model: nn.Module) -> None:
        noisy = any(getattr(layer, "fire", None) == "gaussian" and layer.seed is None for layer in model.modules())
        if noisy or is_random(model):
            raise ValueError(
                "SR: the network is random, and the difference of two of its answers is mostly noise; "
                "wanted neurons and an encoding that draw nothing, for example neuron='if' and encoding='direct'."
            )

    def penalty(self, run: Run) -> dict[str, Tensor]:
        rivals = best_wrong(run.logits, run.labels)
        here = true_share(run.logits, run.labels, rivals)
        (gradient,) = torch.autograd.grad(here.sum(), run.images, retain_graph=True)
        there = true_share(run.forward((run.images + self.h * gradient.sign()).detach()), run.labels, rivals)
        run.notes["gradient_sparsity"], run.notes["gradient_l1"] = (values.mean() for values in sparsity(gradient))
        return {self.name: self.weight * ((there - here) / self.h).square().mean()}

    def report(self, run: Run) -> dict[str, Tensor]:
        return {name: run.notes[name] for name in ("gradient_sparsity", "gradient_l1")}
