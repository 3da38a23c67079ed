"""Suites: which attacks an evaluation runs, at which sizes, and which of them only look for what the others have left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..adjoints import nearest
from ..attacks import ATTACKS, PGD, Attack, Transfer, parse_eps
from .results import size_text

__all__ = ["SUITES", "Options", "Suite", "make_suite"]


class Suite(dict[str, Attack]):
    """Attacks by the name to report. skips: names of those that leave out samples which earlier ones have fooled; curve: attacks that only give points of a curve."""

    def __init__(self, attacks: Mapping[str, Attack] = {}, skips: Sequence[str] = (), curve: Mapping[str, Attack] = {}) -> None:
        super().__init__(attacks)
        self.skips, self.curve = set(skips), dict(curve)


@dataclass(frozen=True)
class Options:
    """What all attacks of a suite share, and what changes the suite's own choice: None leaves it."""

    seed: int | None = 0
    eot: int = 1
    norm: str = "linf"
    steps: int | None = None
    restarts: int | None = None
    classes: int | None = None

    def make(self, name: str, eps: float, **own) -> Attack | None:
        """An attack of ATTACKS; None where it does not keep to the norm or needs more classes."""
        known = ATTACKS[name]
        if self.norm not in known.norms or (self.classes or 10) < CLASSES.get(name, 2):
            return None
        if name in BUDGETS:
            own = {"budget": BUDGETS[name]} | own
        return known(eps, norm=self.norm, seed=self.seed, eot=self.eot, **own)

    def many(self, name: str, eps: float, steps: int, **own) -> tuple[str, Attack | None]:
        """An attack in many steps, named with their number."""
        count = self.steps or steps
        if self.restarts and name in RESTARTED:
            own = {"restarts": self.restarts} | own
        return f"{name}{count}", self.make(name, eps, steps=count, **own)


#: Attacks whose loss needs more than two classes.
CLASSES = {"apgd-dlr": 3, "tapgd-dlr": 4}
#: Queries of the attacks that take no gradient, for each sample.
BUDGETS = {"square": 5000, "rays": 2000}
#: Attacks that `restarts` is for.
RESTARTED = ("pgd", "mtpgd", "apgd-ce", "apgd-dlr", "tapgd-ce", "tapgd-dlr", "sa-pgd", "fab")

#: One entry of a suite: (name without the size, attack or None, whether it skips what is fooled already).
Entry = tuple[str, Attack | None, bool]


def _plain(eps: float, make: Options) -> list[Entry]:
    return [("fgsm", make.make("fgsm", eps), False), (*make.many("pgd", eps, 7), False)]


def quick(eps: float, make: Options) -> list[Entry]:
    """FGSM and PGD with 7 steps of 2.5*eps/7."""
    return _plain(eps, make)


def paper(eps: float, make: Options) -> list[Entry]:
    """What the papers on spiking networks report, each on every sample: noise, FGSM, RFGSM, BIM-7, PGD-7, PGD-20, APGD on both losses; then MT-PGD."""
    entries = [(name, make.make(name, eps), False) for name in ("uniform", "gaussian", "fgsm", "rfgsm")]
    entries += [(*make.many("bim", eps, 7), False), (*make.many("pgd", eps, 7), False)]
    if make.steps is None:
        entries.append((*make.many("pgd", eps, 20), False))
    entries += [(*make.many("apgd-ce", eps, 20), False), (*make.many("apgd-dlr", eps, 20), False)]
    return [*entries, (*make.many("mtpgd", eps, 7), True)]


def ensemble(eps: float, make: Options) -> list[Entry]:
    """FGSM and PGD-7 through the surrogate of training, on every sample; FGSM through all gradient approximations; then PGD-7 through all of them."""
    return [*_plain(eps, make), ("ensemble-fgsm", make.make("ensemble", eps, base="fgsm", members="extended"), False), *_ensemble_pgd(eps, make)]


def _ensemble_pgd(eps: float, make: Options) -> list[Entry]:
    steps, restarts = make.steps or 7, {"restarts": make.restarts} if make.restarts else {}
    return [(f"ensemble-pgd{steps}", make.make("ensemble", eps, base="pgd", steps=steps, members="extended", **restarts), True)]


def autoattack(eps: float, make: Options) -> list[Entry]:
    """AutoAttack's members, one after the other: APGD-CE, T-APGD-DLR, FAB-T and Square; APGD-CE and APGD-DLR where gradients are averaged (rand)."""
    if make.eot > 1:
        names = ("apgd-ce", "apgd-dlr")
    else:
        names = ("apgd-ce", "tapgd-dlr" if (make.classes or 10) >= CLASSES["tapgd-dlr"] else "tapgd-ce", "fab")
    entries = [(*make.many(name, eps, 100), True) for name in names]
    return entries if make.eot > 1 else [*entries, ("square", make.make("square", eps), True)]


def everything(eps: float, make: Options) -> list[Entry]:
    """Every attack there is: FGSM and PGD-7 on every sample, then the others, the cheap ones first, on what is left."""
    entries = [*_plain(eps, make), ("uniform", make.make("uniform", eps), False), ("gaussian", make.make("gaussian", eps), False)]
    entries += [(name, make.make(name, eps), True) for name in ("rfgsm",)]
    entries += [(*make.many(name, eps, steps), True) for name, steps in (("bim", 7), ("mifgsm", 10))]
    entries += [("ensemble-fgsm", make.make("ensemble", eps, base="fgsm", members="extended"), True), *_ensemble_pgd(eps, make)]
    label, attack = make.many("apgd-ce", eps, 100, adjoint="assg")  # the strongest single attack on spiking networks: it leaves the others least to do
    entries.append((label.replace("ce", "ce-assg"), attack, True))
    entries += [(*make.many(name, eps, 100), True) for name in ("apgd-ce", "apgd-dlr")]
    entries.append((*make.many("sa-pgd", eps, 100, adjoint="assg"), True))
    entries += [(*make.many("mtpgd", eps, 20), True)]
    entries += [(*make.many(name, eps, 100), True) for name in ("tapgd-ce", "tapgd-dlr")]
    entries += [(*make.many(name, eps, steps), True) for name, steps in (("cw", 100), ("fab", 100))]
    return [*entries, *((name, make.make(name, eps), True) for name in ("square", "rays"))]


#: Every suite by its name on the command line: (size in pixels, what attacks share) -> entries in their order.
SUITES: dict[str, Callable[[float, Options], list[Entry]]] = {suite.__name__: suite for suite in (quick, paper, ensemble, autoattack, everything)}


def make_suite(
    name: str,
    eps: Sequence[float | str] | float | str = ("2/255", "4/255", "8/255"),
    seed: int | None = 0,
    eot: int = 1,
    norm: str = "linf",
    steps: int | None = None,
    restarts: int | None = None,
    classes: int | None = None,
    transfer: Mapping[str, nn.Module] = {},
    curve_steps: Sequence[int] = (),
) -> Suite:
    """The attacks of a suite at each size eps, in ascending order, by the name to report, for `evaluate`.

    quick: FGSM and PGD-7. paper: what the papers report. ensemble: also through all gradient approximations. autoattack: its
    members one by one. everything: all of these and the rest. Rows that count in the worst case only are in `skips` of what is returned.

    eot: gradients averaged at each step, each with fresh random numbers of the network; `default_eot(model)` says how
    many a network needs. norm: "linf" or "l2"; attacks that cannot keep to it are left out. steps, restarts: in place of the suite's own.
    classes: how many the model tells apart: attacks whose loss needs more are left out. transfer: networks by name: PGD-20 crafted on
    each of them is tried on the model. curve_steps: PGD at the largest size with each of these numbers of steps, for the curve alone.

    >>> list(make_suite("quick", ["8/255"]))
    ['fgsm-8/255', 'pgd7-8/255']
    """
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is unknown; wanted one of {', '.join(SUITES)}.{nearest(name, tuple(SUITES))}")
    sizes = sorted({parse_eps(value) for value in ([eps] if isinstance(eps, (str, float, int)) else eps)})
    if not sizes:
        raise ValueError(f"suite {name}: eps is empty; wanted one size or more, such as 8/255.")
    for what, value in (("steps", steps), ("restarts", restarts), *(("curve_steps", value) for value in curve_steps)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"suite {name}: {what} is {value!r}; wanted an int >= 1.")
    make, found = Options(seed, eot, norm, steps, restarts, classes), Suite()
    for size in sizes:
        entries = SUITES[name](size, make)
        carried = [(f"transfer-{label}", Transfer(model, make.many("pgd", size, 20)[1], label=label), False) for label, model in transfer.items()]
        for label, attack, skips in [*(entry for entry in entries if not entry[2]), *carried, *(entry for entry in entries if entry[2])]:
            if attack is not None:
                found[f"{label}-{size_text(size)}"] = attack
                if skips:
                    found.skips.add(f"{label}-{size_text(size)}")
    if name == "paper":
        found["cw"] = ATTACKS["cw"](seed=seed, eot=eot, c=0.5, steps=10)
    for count in dict.fromkeys(curve_steps):
        found.curve[f"steps{count}-{size_text(sizes[-1])}"] = PGD(sizes[-1], steps=count, norm=norm, seed=seed, eot=eot)
    if not found:
        raise ValueError(f"suite {name}: none of its attacks keeps to norm {norm!r}.")
    return found
