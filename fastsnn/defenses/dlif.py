"""DLIF: the membrane's perturbation at the last spiking layer, kept small (Robust Stable Spiking Neural Networks)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adjoints import nearest
from ..attacks import parse_eps
from ..neurons import spiking_layers
from .adversarial import training_attack
from .base import Defense, Run, wide

__all__ = ["DLIF", "perturbation_of"]

#: What disturbs the images, and its size in pixels where none is given; "batch": another part of the sum does.
PERTURBATIONS: dict[str, float] = {"fgsm": 4 / 255, "gaussian": 8 / 255, "batch": 0.0}


def perturbation_of(clean: Tensor, disturbed: Tensor, tau: float = 0.99) -> Tensor:
    """The mean square of `Y[t] = tau*Y[t-1] + (clean[t] - disturbed[t])`, Y[-1] = 0: what a disturbance adds to a membrane, resets left out.

    clean, disturbed: [T, *] input currents, in units of potential. tau: the leak factor per step. Returns a scalar.
    Source: Ding et al., ICML 2024 (membrane potential perturbation dynamics).

    >>> perturbation_of(torch.ones(2, 3), torch.zeros(2, 3), tau=0.5)
    tensor(1.6250)
    """
    y, total = torch.zeros_like(wide(clean[0])), 0.0
    for difference in wide(clean) - wide(disturbed):
        y = tau * y + difference
        total = total + y.square().mean()
    return total / len(clean)


class DLIF(Defense):
    """Robust stable SNN: `CE(x)/2 + CE(x~)/2 + rho * mean of Y^2`, Y the perturbation of the last spiking layer's membrane.

    `Y[t] = tau*Y[t-1] + (I[t](x) - I[t](x~))`, I the current into the last spiking layer that runs, that of x detached
    (`perturbation_of`). Both forwards are the training's: where the network has batch norm, each normalises by its own batch
    and moves the running statistics.

    perturbation: what makes x~. "fgsm": `x + noise*N(0, 1)`, then `+ eps*sign(g)`, g the gradient of the cross-entropy there, in eval
    mode; "gaussian": `x + eps*N(0, 1)`; both clipped to [0, 1]. "batch": x~ are the images of another part of the sum, as in
    `AT() + DLIF(perturbation="batch")`. eps, noise: in pixels; eps by default 4/255 (fgsm) or 8/255 (gaussian).
    tau: of the recursion, 0.99 as the paper's neurons. eot: gradients averaged, for networks that are random.

    The method's neurons learn a gain for each step (neuron "dlif"); the loss takes any spiking layer. Reports
    "membrane-error", the mean of Y^2, unweighted. Source: Ding et al., Robust Stable Spiking Neural Networks, ICML 2024
    (arXiv 2405.20694).

    >>> loss = DLIF(rho=1.0).loss(model, images, labels)
    """

    name = "dlif"

    def __init__(
        self, rho: float = 1.0, perturbation: str = "fgsm", eps: float | str | None = None, noise: float | str = 0.001, tau: float = 0.99, eot: int = 1
    ) -> None:
        if not 0 <= rho < math.inf:
            raise ValueError(f"DLIF: rho is {rho}; wanted a finite number >= 0, such as 1.")
        if perturbation not in PERTURBATIONS:
            known = tuple(PERTURBATIONS)
            raise ValueError(f"DLIF: perturbation {perturbation!r} is unknown; wanted one of {', '.join(known)}.{nearest(perturbation, known)}")
        if not 0 <= tau <= 1:
            raise ValueError(f"DLIF: tau is {tau}; wanted a number in [0, 1], the leak factor per step.")
        try:
            self.eps, self.noise = parse_eps(PERTURBATIONS[perturbation] if eps is None else eps), parse_eps(noise)
        except ValueError as error:
            raise ValueError(f"DLIF: {error}") from None
        self.rho, self.perturbation, self.tau, self.eot = float(rho), perturbation, float(tau), eot
        self._attack = training_attack("DLIF", "fgsm", eps=self.eps, eot=eot)
        self._disturbed: Tensor | None = None
        self._current: Tensor | None = None

    @property
    def crafts(self) -> bool:
        return self.perturbation != "batch"

    def prepare(self, model: nn.Module) -> None:
        if not spiking_layers(model):
            raise ValueError("DLIF: the model has no spiking layer; wanted one that fires, such as neuron='dlif' or 'lif'. Leave the defense out for its ANN twin.")

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        if self.perturbation == "fgsm":
            near = (images + self.noise * torch.randn_like(images)).clamp(0, 1)
            self._disturbed = self._attack(model, near, labels)
        elif self.perturbation == "gaussian":
            self._disturbed = (images + self.eps * torch.randn_like(images)).clamp(0, 1)
        return images

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        hooks = [layer.register_forward_pre_hook(self._see) for layer in spiking_layers(model).values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._current = self._disturbed = None

    def _see(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = layer._unmerged(inputs[0])
        self._current = x.expand(layer.steps, *x.shape[1:]) if len(x) == 1 and layer.steps else x

    def _last(self) -> Tensor:
        """What the last spiking layer of the forward just done was given."""
        if self._current is None:
            raise ValueError("DLIF: no spiking layer ran in the training forward; wanted one whose input it sees. A compiled forward may hide it: leave compile out.")
        current, self._current = self._current, None
        return current

    def objective(self, run: Run) -> Tensor:
        logits, currents = [run.logits], [self._last()]
        if self.perturbation == "batch" and run.images.data_ptr() == run.clean.data_ptr():
            raise ValueError("DLIF: perturbation is 'batch', but no other part changes the images; add one, such as at, or set perturbation='fgsm'.")
        logits.append(run.forward(run.clean if self.perturbation == "batch" else self._disturbed))
        currents.append(self._last())
        clean, disturbed = reversed(currents) if self.perturbation == "batch" else currents
        run.notes[self.name] = perturbation_of(clean.detach(), disturbed, self.tau)
        return sum(F.cross_entropy(wide(each), run.labels, label_smoothing=run.smoothing) for each in logits) / 2

    def penalty(self, run: Run) -> dict[str, Tensor]:
        return {self.name: self.rho * run.notes[self.name]}

    def report(self, run: Run) -> dict[str, Tensor]:
        return {"membrane-error": run.notes[self.name]}
