"""MIX: one of several single-step attacks for each batch (SNN-RAT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..distributed import ranks
from .adversarial import training_attack
from .base import Defense

__all__ = ["MIX"]


class MIX(Defense):
    """SNN-RAT's adversarial training: the loss on the images of one attack, drawn for each batch from all pairs of attack and gradient.

    attacks: names of `fastsnn.attacks.ATTACKS`; gradients: how they differentiate the network, names of
    `fastsnn.attacks.APPROXIMATIONS` or `fastsnn.adjoint`; each a sequence, or text with commas. Pairs are equally likely, and drawn
    from torch's generator, on the first of several processes for all. The weights are trained through time (bptt) whichever is drawn,
    on adversarial images only. eps: in pixels. eot: the mean of so many gradients, for networks that are random.
    A ValueError for unknown names, a RuntimeError while a CUDA graph is captured, which would repeat one draw for ever.

    Three things go by the name RAT: SNN-RAT is `MIX() + REG()`; its authors' older script is `MIX(gradients="bptr") + REG()`; and
    what FEEL and MPD-SGR compare with is `AT() + REG()`, PGD of 2 steps. Source: SNN-RAT, NeurIPS 2022, section 4.

    >>> loss = (MIX(eps=2 / 255) + REG(beta=0.004)).loss(model, images, labels)
    """

    name = "mix"
    crafts = True

    def __init__(
        self,
        attacks: str | Sequence[str] = ("fgsm", "rfgsm"),
        gradients: str | Sequence[str] = ("bptt", "bptr"),
        eps: float | str = 2 / 255,
        eot: int = 1,
    ) -> None:
        self.attacks, self.gradients = _names("attacks", attacks), _names("gradients", gradients)
        #: Every pair of attack and gradient, equally likely.
        self.members = tuple(
            training_attack("MIX", attack, eps=eps, adjoint=gradient, eot=eot) for attack in self.attacks for gradient in self.gradients
        )
        self.eps, self.eot = self.members[0].eps, self.members[0].eot

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("MIX: a captured CUDA graph would repeat the attack that was drawn at its capture; wanted a draw for each batch.")
        place = torch.randint(len(self.members), (1,))
        if ranks() > 1:
            place = place.to(images.device)
            torch.distributed.broadcast(place, src=0)
        return self.members[int(place)](model, images, labels)

    def options(self) -> dict[str, object]:
        return {"attacks": list(self.attacks), "gradients": list(self.gradients), **super().options()}


def _names(what: str, given: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in given.split(",")) if isinstance(given, str) else tuple(given)
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"MIX: {what} is {given!r}; wanted one or more different names, for example 'fgsm,rfgsm'.")
    return names
