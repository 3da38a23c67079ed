"""Adversarial training."""

from __future__ import annotations

from torch import Tensor, nn

from ..adjoints import nearest
from ..attacks import ATTACKS, Attack, attack_options, make_attack
from .base import Defense
from .crafting import share, single

__all__ = ["AT", "training_attack"]


def training_attack(who: str, name: str, **options) -> Attack:
    """An attack of ATTACKS to train on, with those of the options that it takes; a ValueError where it asks for no gradient."""
    known = tuple(key for key, attack in ATTACKS.items() if attack.access == "gradient")
    if name not in known:
        why = "is unknown" if name not in ATTACKS else f"asks the model for {ATTACKS[name].access}"
        raise ValueError(f"{who}: attack {name!r} {why}; wanted one that takes a gradient: {', '.join(known)}.{nearest(name, known)}")
    takes = attack_options(name)
    return single(make_attack(name, **{key: value for key, value in options.items() if key in takes}))


class AT(Defense):
    """Adversarial training: the loss on an attack's images in place of the clean ones.

    attack: a name of `fastsnn.attacks.ATTACKS` that takes a gradient: pgd, with its random start; fgsm and rfgsm, one step; ...
    eps, step_size: in pixels; steps: the latter two of attacks that take several steps, and without a meaning for others.
    seed: of the attack's random numbers; None takes torch's generator, so that every batch gets its own.
    warmup: the share of the training in which eps, and step_size with it, rises linearly from 0; 0: it is there from the start.
    eot: the mean of so many gradients, for networks that are random. ValueErrors for values that the attack refuses.

    With `REG` and PGD of 2 steps this is what FEEL and MPD-SGR call RAT; SNN-RAT itself is `MIX() + REG()`.
    Source: Madry et al., ICLR 2018; these defaults are MPD-SGR's. Single steps: Tramer et al., ICLR 2018.

    >>> loss = (AT(eps=2 / 255) + MPDSGR()).loss(model, images, labels)
    """

    name = "at"
    crafts = True

    def __init__(
        self,
        eps: float | str = 2 / 255,
        steps: int = 2,
        step_size: float | str | None = 1 / 255,
        seed: int | None = None,
        attack: str = "pgd",
        warmup: float = 0.0,
        eot: int = 1,
    ) -> None:
        self.attack = training_attack("AT", attack, eps=eps, steps=steps, step_size=step_size, seed=seed, eot=eot)
        self.eps, self.warmup, self.eot = self.attack.eps, share("AT", "warmup", warmup), self.attack.eot
        for name in ("steps", "step_size", "seed"):
            if hasattr(self.attack, name):
                setattr(self, name, getattr(self.attack, name))

    def batch(self, model: nn.Module, images: Tensor, labels: Tensor, progress: float) -> Tensor:
        if progress >= self.warmup:
            return self.attack(model, images, labels)
        if progress == 0:
            return images
        return self._smaller(progress / self.warmup)(model, images, labels)

    def _smaller(self, share: float) -> Attack:
        """The attack with this share of its radius and step."""
        sizes = {name: share * value for name in ("eps", "step_size") if (value := vars(self).get(name)) is not None}
        others = {name: vars(self)[name] for name in ("steps", "seed", "eot") if name in vars(self)}
        return training_attack("AT", self.attack.name, **sizes, **others)

    def options(self) -> dict[str, object]:
        return {"attack": self.attack.name, **super().options()}
