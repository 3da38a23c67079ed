"""Black box by transfer: crafted on one network, meant for another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..checkpoints import fingerprint_of
from .base import Attack
from .streams import Streams

__all__ = ["Transfer"]


class Transfer(Attack):
    """Images that `attack` crafts on `source`; the model of the call is not asked: whoever evaluates judges them on it.

    `x_adv = attack(source, x, y)`. Sources in the papers: the same training with another seed, an undefended network of the same
    architecture, an ANN (`models.twin` makes one of the same weights, `fastsnn train --neuron relu` one of its own).

    source: any module from images to logits, on the device of the images; its floating-point type may differ from theirs. It is in eval
        mode meanwhile, and is left as it was.
    attack: any instance of an attack; its eps, norm, seed and further options are those of this one.
    label: what reports call the source, for example the folder of its run; by default the network's name.

    After a call `zero_gradient` is about the source, `queries` is 0: of the model under attack. It has no row in ATTACKS, for it needs
    a network. Source: Papernot et al., 2016; SNN-RAT, NeurIPS 2022.

    >>> attack = Transfer(undefended, PGD(eps="8/255", steps=20, seed=0), label="runs/vanilla")
    >>> adversarial = attack(model, images, labels)
    """

    name = "transfer"
    norms = ("linf", "l2")
    access = "transfer"

    def __init__(self, source: nn.Module, attack: Attack, label: str | None = None) -> None:
        if not isinstance(source, nn.Module):
            raise TypeError(
                f"Transfer: source is a {type(source).__name__}; wanted a torch.nn.Module from images to logits. "
                "For a run: checkpoints.load_run(folder)[0]."
            )
        if not isinstance(attack, Attack):
            raise TypeError(f"Transfer: attack is {attack!r}; wanted an instance from fastsnn.attacks, such as PGD(eps='8/255').")
        if attack.access == "transfer":
            raise TypeError("Transfer: attack is a transfer itself; wanted the attack to run on source.")
        self.single_step, self.unbounded, self.bounded = attack.single_step, attack.unbounded, attack.bounded
        super().__init__(attack.eps, norm=attack.norm, targeted=attack.targeted, seed=attack.seed)
        self.source, self.attack = source, attack
        self.label = str(label) if label is not None else getattr(source, "name", type(source).__name__)
        self._places: Tensor | None = None

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        weight = next((value for value in self.source.parameters() if value.is_floating_point()), images)
        if weight.device != images.device:
            raise ValueError(
                f"Transfer: the source {self.label} is on {weight.device}, images on {images.device}; wanted one device. "
                f"Move it: source.to('{images.device}')."
            )
        found = self.attack(self.source, images.to(weight.dtype), labels, self._places)
        self.zero_gradient = self.attack.zero_gradient
        return found

    @contextmanager
    def _randomness(self, indices: Tensor, look: bool) -> Iterator[Streams]:
        """The attack draws its own numbers, from its seed and the samples' places."""
        self._places = indices
        try:
            yield Streams(0, indices)
        finally:
            self._places = None

    def options(self) -> dict[str, object]:
        """The options of the attack, its name as `attack`, and the source: its label and the fingerprint of its weights."""
        return {**self.attack.options(), "attack": self.attack.name, "source": self.label, "source_weights": fingerprint_of(self.source)}

    def __repr__(self) -> str:
        return f"Transfer({self.label}, {self.attack!r})"
