"""Attacks on classifiers: `attack(model, images, labels)` returns adversarial images.

To add one: a class with `name` and `run` (see `Attack`), and its row in ATTACKS.
"""

from __future__ import annotations

import inspect

from ..adjoints import nearest
from .base import LOSSES, Attack, Gradient, parse_eps
from .gradient import FGSM, PGD
from .streams import Streams

__all__ = ["ATTACKS", "FGSM", "LOSSES", "PGD", "Attack", "Gradient", "Streams", "make_attack", "parse_eps"]

#: Every attack by its name on the command line.
ATTACKS: dict[str, type[Attack]] = {attack.name: attack for attack in (FGSM, PGD)}


def attack_options(name: str) -> tuple[str, ...]:
    """The names of the options that an attack takes."""
    names: dict[str, None] = {}
    for cls in _known(name).__mro__:
        if "__init__" in vars(cls) and issubclass(cls, Attack):
            names.update(dict.fromkeys(key for key, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD))
    names.pop("self", None)
    return tuple(names)


def make_attack(name: str, **options) -> Attack:
    """The attack of that name in ATTACKS, with its options; unknown names are answered with the nearest known one.

    >>> make_attack("pgd", eps="8/255", steps=20)
    """
    known = attack_options(name)
    for key in options:
        if key not in known:
            raise ValueError(f"attack {name}: option {key!r} is unknown; wanted one of {', '.join(known)}.{nearest(key, known)}")
    if "eps" in known and "eps" not in options:
        raise ValueError(f"attack {name}: eps is missing; wanted a number of pixels, for example eps='8/255'.")
    return ATTACKS[name](**options)


def _known(name: str) -> type[Attack]:
    if name not in ATTACKS:
        raise ValueError(f"attack {name!r} is unknown; wanted one of {', '.join(ATTACKS)}.{nearest(name, tuple(ATTACKS))}")
    return ATTACKS[name]
