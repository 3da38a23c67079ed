"""Attacks on classifiers: `attack(model, images, labels)` returns adversarial images.

To add one: a class with `name` and `run` (see `Attack`), and its row in ATTACKS.
"""

from __future__ import annotations

import inspect

from ..adjoints import nearest
from .approximations import APPROXIMATIONS, ASSG, ENSEMBLE, EXTENDED, PDSG
from .apgd import APGD, APGDCE, APGDDLR, TAPGD, TAPGDCE, TAPGDDLR
from .autoattack import AutoAttack
from .base import LOSSES, Attack, Gradient, parse_eps
from .cw import CW
from .decision import RayS
from .ensemble import Ensemble
from .expectation import default_eot
from .fab import FAB
from .gradient import BIM, FGSM, MIFGSM, MTPGD, PGD, RFGSM
from .noise import GaussianNoise, UniformNoise
from .sapgd import SAPGD
from .square import Square
from .streams import Streams
from .transfer import Transfer

__all__ = [
    "APPROXIMATIONS",
    "ASSG",
    "APGD",
    "APGDCE",
    "APGDDLR",
    "ATTACKS",
    "BIM",
    "CW",
    "ENSEMBLE",
    "EXTENDED",
    "Ensemble",
    "FAB",
    "FGSM",
    "LOSSES",
    "MIFGSM",
    "MTPGD",
    "PGD",
    "PDSG",
    "RFGSM",
    "RayS",
    "SAPGD",
    "Square",
    "TAPGD",
    "TAPGDCE",
    "TAPGDDLR",
    "Attack",
    "AutoAttack",
    "GaussianNoise",
    "Gradient",
    "Streams",
    "Transfer",
    "UniformNoise",
    "default_eot",
    "make_attack",
    "parse_eps",
]

#: Every attack by its name on the command line.
ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        FGSM,
        RFGSM,
        PGD,
        BIM,
        MIFGSM,
        MTPGD,
        GaussianNoise,
        UniformNoise,
        APGDCE,
        APGDDLR,
        TAPGDCE,
        TAPGDDLR,
        SAPGD,
        CW,
        FAB,
        Square,
        RayS,
        AutoAttack,
        Ensemble,
    )
}


def attack_options(name: str, base: str | None = None) -> tuple[str, ...]:
    """The names of the options that an attack takes. base: of an ensemble, whose further options are those of its base."""
    names: dict[str, None] = {}
    for cls in _known(name).__mro__:
        if "__init__" in vars(cls) and issubclass(cls, Attack):
            names.update(dict.fromkeys(key for key, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD))
    names.pop("self", None)
    if name == Ensemble.name:
        names.update(dict.fromkeys(attack_options(base if isinstance(base, str) and base != name else "fgsm")))
    return tuple(names)


def make_attack(name: str, **options) -> Attack:
    """The attack of that name in ATTACKS, with its options; unknown names are answered with the nearest known one.

    >>> make_attack("pgd", eps="8/255", steps=20)
    """
    known = attack_options(name, options.get("base"))
    for key in options:
        if key not in known:
            raise ValueError(f"attack {name}: option {key!r} is unknown; wanted one of {', '.join(known)}.{nearest(key, known)}")
    if "eps" in known and "eps" not in options and not ATTACKS[name].unbounded:
        raise ValueError(f"attack {name}: eps is missing; wanted a number of pixels, for example eps='8/255'.")
    return ATTACKS[name](**options)


def _known(name: str) -> type[Attack]:
    if name not in ATTACKS:
        raise ValueError(f"attack {name!r} is unknown; wanted one of {', '.join(ATTACKS)}.{nearest(name, tuple(ATTACKS))}")
    return ATTACKS[name]
