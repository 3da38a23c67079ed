"""An attack through many gradient approximations: what any of them fools counts as fooled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..adjoints import nearest
from .adaptive import spiking
from .approximations import ENSEMBLE, Approximation, members_of
from .base import Attack, Gradient
from .losses import LOSSES
from .streams import Streams

__all__ = ["Ensemble"]


class Ensemble(Attack):
    """One attack after another, each through its own gradient approximation; a sample is fooled if any of them fools it.

    base: the attack, a name of ATTACKS or a class; it gets eps and all further options (steps, norm, eot, ...). members: what
    `members_of` takes: "ensemble" (the 19 of robust conversion, the default), "extended", or approximations in a list.
    adjoint: short for one member.

    With an iterative base, samples that are fooled leave between members. With a single step every member attacks all of them.
    Forward passes are shared where members stand at the same images: a single step takes one for all members, and gives the
    images of so many separate attacks, bit for bit; of iterative attacks the second and all later members share that of their
    first step. Every member begins at the same random start. Success is judged by the model itself, on the final images (by the
    mean logits of `eot` passes); the approximations `cba`, `pdsg` and `assg` take passes of their own.

    A sample's image is that of the first member that fools it; where none does, the one of highest loss, of equals the first.
    After a call, `fooled` [members, N] int8 says for each member and sample: 1 fooled, 0 stood, -1 not tried; `members` names
    the rows. Without spiking layers of fastsnn all members are the same: a UserWarning, and only the first one runs.

    Source: robust conversion of spiking networks, appendix A.4.

    >>> attack = Ensemble(eps="8/255", base="pgd", steps=20)
    >>> adversarial = attack(model, images, labels)
    >>> dict(zip(attack.members, (attack.fooled == 1).sum(1).tolist()))
    """

    name = "ensemble"
    norms = ("linf", "l2")
    results = (*Attack.results, "fooled")

    def __init__(self, eps: float | str, base: str | type[Attack] = "fgsm", members: str | Iterable = ENSEMBLE, seed: int | None = None, **options) -> None:
        if options.get("adjoint") is not None:
            if members is not ENSEMBLE:
                raise ValueError("Ensemble: members and adjoint are both set; wanted one of them. adjoint is short for members=[adjoint].")
            members = [options["adjoint"]]
        options.pop("adjoint", None)
        try:
            ways = members_of(members)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Ensemble: {error}") from None
        make = _base(base)
        if make.access != "gradient" or issubclass(make, Ensemble):
            raise ValueError(f"Ensemble: base {make.name!r} takes no gradient of its own; wanted an attack that approximations can change, such as 'pgd'.")
        self.members: tuple[str, ...] = tuple(way.name for way in ways)
        #: What runs, in order: the member's place, its approximation (a search has several), the attack.
        self._plan = [(place, way, make(eps, adjoint=way, **options)) for place, member in enumerate(ways) for way in member.attempts or (member,)]
        first = self._plan[0][2]
        self.single_step, self.unbounded, self.bounded = first.single_step, first.unbounded, first.bounded
        super().__init__(eps, first.norm, first.targeted, seed=seed, eot=first.eot)
        self.base, self.loss = first.name, first.loss
        self._told = False
        #: [members, N] int8 after a call: 1 fooled, 0 stood, -1 not tried.
        self.fooled: Tensor | None = None

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        plan = self._plan
        if len(plan) > 1 and not spiking(model):
            if not self._told:
                self._told = True
                warnings.warn(
                    f"Ensemble: {type(model).__name__} holds no spiking layer of fastsnn, so all {len(self.members)} members are the same attack; only the first runs. "
                    "Use the base attack alone, or bring the model's neurons over to fastsnn.",
                    stacklevel=3,
                )
            plan = plan[:1]
        self.fooled = torch.full((len(self.members), len(images)), -1, dtype=torch.int8, device=images.device)
        ahead = _Ahead([way for _, way, _ in plan], self.single_step)
        found, best = images.clone(), torch.full(labels.shape, -math.inf, dtype=torch.float64, device=labels.device)
        standing = torch.ones_like(labels, dtype=torch.bool)
        for turn, (place, _, attack) in enumerate(plan):
            flags = self.fooled[place]
            left = flags != 1 if self.single_step else standing & (flags != 1)
            rows = left.nonzero()[:, 0]
            if len(rows) == 0:
                continue
            clean, wanted = (images, labels) if len(rows) == len(images) else (images[rows], labels[rows])
            attack.gradients = partial(ahead.gradients, attack, turn, rows)
            try:
                moved = self.part(attack, model, clean, wanted, generator[rows], rows)
            finally:
                del attack.gradients
            hit, loss = self._judge(model, moved, wanted, rows)
            flags[rows] = hit.to(torch.int8)
            better = standing[rows] & (hit | (loss > best[rows]))
            if (places := rows[better]).numel():
                found[places], best[places] = moved[better], loss[better]
            standing[rows[hit]] = False
        return found

    def _judge(self, model: nn.Module, images: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(fooled [n] bool, objective [n] float64) by the model itself."""
        with self.only(rows):
            logits = sum(self.logits(model, images, labels) for _ in range(self.eot)) / self.eot
        loss = (LOSSES.get(self.loss, LOSSES["ce"]) if isinstance(self.loss, str) else self.loss)(logits, labels).double()
        return self.succeeded(logits, labels), -loss if self.targeted else loss

    def options(self) -> dict[str, object]:
        own = {**self._plan[0][2].options(), **super().options(), "members": list(self.members)}
        return {key: value for key, value in own.items() if key not in ("adjoint", "single_step", "unbounded", "bounded")}


class _Ahead:
    """The first gradients of all members that share a forward pass, taken together as soon as that saves anything.

    A single step: all at the first member's turn. Else: the first member alone, which may leave few samples standing, and the
    others at the second's. They serve whoever asks for the gradient at those very images.
    """

    def __init__(self, ways: Sequence[Approximation], single_step: bool) -> None:
        self._ways, self._at = list(ways), 0 if single_step else 1
        self._all = single_step
        self._found: dict[int, Gradient] = {}
        self._rows = self._images = self._labels = None

    def gradients(self, attack: Attack, turn: int, rows: Tensor, model, images: Tensor, labels: Tensor, adjoints: Sequence, loss=None) -> list[Gradient]:
        """In place of `attack.gradients`, for the member at its turn."""
        plain = partial(Attack.gradients, attack, model, images, labels)
        if tuple(adjoints) != (None,) or loss is not None or len(images) != len(rows):
            return plain(adjoints, loss)
        if self._rows is None and turn >= self._at:
            together = [place for place in range(turn, len(self._ways)) if self._all or self._ways[place].shares]
            if turn in together and len(together) > 1:
                taken = plain([self._ways[place] for place in together])
                self._rows, self._images, self._labels = rows, images.clone(), labels
                self._found = dict(zip(together, taken))
        if turn in self._found:
            taken = self._found.pop(turn)  # only for its first step
            places = torch.searchsorted(self._rows, rows)
            if torch.equal(self._images[places], images) and torch.equal(self._labels[places], labels):
                taken = Gradient(*(value[places] for value in taken)) if len(places) < len(self._rows) else taken
                if attack.zero_gradient is None:
                    attack.zero_gradient = (taken.gradient.flatten(1) == 0).all(1)
                return [taken]
        return plain(adjoints)


def _base(base: str | type[Attack]) -> type[Attack]:
    from . import ATTACKS

    if isinstance(base, str):
        if base not in ATTACKS:
            known = tuple(name for name in ATTACKS if name != Ensemble.name)
            raise ValueError(f"Ensemble: base {base!r} is unknown; wanted one of {', '.join(known)}, or a class.{nearest(base, known)}")
        return ATTACKS[base]
    if isinstance(base, type) and issubclass(base, Attack):
        return base
    raise TypeError(f"Ensemble: base is {base!r}; wanted a name of ATTACKS or a class of attacks. Its options go to Ensemble, for example base='pgd', steps=20.")
