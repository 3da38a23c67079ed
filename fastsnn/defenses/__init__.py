"""Defenses: ways to train a robust model. They compose: `MPDSGR(eta=0.05) + REG(beta=0.001)`.

To add one: a class with `name` and the methods it is about (see `Defense`), and its row in DEFENSES.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import reduce
from operator import add

from ..adjoints import nearest
from .adversarial import AT
from .base import Defense, Outcome, Run, Sum, forward_with_statistics
from .crafting import divergence
from .dlif import DLIF, perturbation_of
from .hire import HIRE
from .mart import MART, boosted
from .mix import MIX
from .mpd_sgr import MPDSGR, mean_omega, omega
from .networks import BNTT, FEEL, RSC, Poisson
from .reg import REG, project_simplex
from .robust_tuning import RobustTuning
from .sr import SR, gradient_sparsity
from .stog import StoG
from .tgo import TGO
from .trades import TRADES

__all__ = [
    "AT",
    "BNTT",
    "DEFENSES",
    "DLIF",
    "Defense",
    "FEEL",
    "HIRE",
    "MART",
    "MIX",
    "MPDSGR",
    "Outcome",
    "Poisson",
    "REG",
    "RSC",
    "RobustTuning",
    "Run",
    "SR",
    "StoG",
    "Sum",
    "TGO",
    "TRADES",
    "Vanilla",
    "boosted",
    "divergence",
    "forward_with_statistics",
    "gradient_sparsity",
    "make_defense",
    "mean_omega",
    "omega",
    "perturbation_of",
    "project_simplex",
]


class Vanilla(Defense):
    """No defense: cross-entropy on the clean batch."""

    name = "vanilla"


#: Every defense by its name on the command line.
DEFENSES: dict[str, type[Defense]] = {
    defense.name: defense
    for defense in (
        Vanilla, AT, MPDSGR, REG, TGO, MIX, TRADES, MART, SR, RobustTuning, DLIF, HIRE, StoG, FEEL, Poisson, RSC, BNTT,
    )
}  # fmt: skip


def defense_options(name: str) -> tuple[str, ...]:
    """The names of the options that a defense takes."""
    if name not in DEFENSES:
        raise ValueError(f"defense {name!r} is unknown; wanted one of {', '.join(DEFENSES)}, or several joined by '+'.{nearest(name, tuple(DEFENSES))}")
    init = DEFENSES[name].__init__
    return () if init is object.__init__ else tuple(inspect.signature(init).parameters)[1:]


def make_defense(names: str, options: Mapping[str, Mapping[str, object]] | None = None) -> Defense:
    """The defense of that name in DEFENSES, or the sum of several, with options for each.

    >>> make_defense("mpd-sgr+at", {"mpd-sgr": {"eta": 0.1}})
    MPDSGR(eta=0.1, gamma=1.0, average='layers') + AT(attack='pgd', eps=0.00784313725490196, warmup=0.0, eot=1, steps=2, step_size=0.00392156862745098)
    """
    parts = [name.strip() for name in names.split("+")]
    options = options or {}
    for name in options:
        if name not in parts:
            raise ValueError(f"defense {names}: options are given for {name!r}, which is not in it.{nearest(name, tuple(parts))}")
    made = []
    for name in parts:
        known, own = defense_options(name), options.get(name, {})
        for key in own:
            if key not in known:
                raise ValueError(f"defense {name}: option {key!r} is unknown; wanted one of {', '.join(known) or 'none'}.{nearest(key, known)}")
        made.append(DEFENSES[name](**own))
    return reduce(add, made)
