"""AutoAttack: four attacks without a parameter to tune, each on the samples that still stand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adjoints import nearest
from .apgd import APGDCE, APGDDLR, TAPGDDLR
from .base import Attack, whole
from .fab import FAB
from .square import Square
from .streams import Streams

__all__ = ["AutoAttack"]

#: The attacks of each version.
VERSIONS = {"standard": ("apgd-ce", "tapgd-dlr", "fab", "square"), "rand": ("apgd-ce", "apgd-dlr")}
#: Classes that the losses of a version need.
CLASSES = {"standard": 4, "rand": 3}
#: Gradients averaged against random models.
RAND_EOT = 20


class AutoAttack(Attack):
    """The ensemble of RobustBench: a sample is fooled if any member fools it; members see the samples that still stand.

    version: "standard", for models whose outputs repeat: APGD-CE, T-APGD-DLR towards 9 classes, FAB-T and Square; for four
    classes or more. "rand", for models that are random at inference: APGD-CE and APGD-DLR, each gradient and each verdict
    the mean of `eot` passes; for three classes or more.
    steps: of each member with gradients. budget: queries of Square. eot: default 1 for "standard", 20 for "rand". norm, adjoint,
    seed: as in `Attack`. labels are the true classes, and the members have losses of their own.
    After a call `members` are the members' names, and `fooled` [members, N] int8 says what each did to each sample: 1
    fooled, 0 withstood, -1 not tried. A sample that stands comes back as the last member left it.
    Source: Croce and Hein, ICML 2020, section 6.

    >>> adversarial = AutoAttack(eps=8 / 255)(model, images, labels)
    """

    name = "autoattack"
    norms = ("linf", "l2")

    def __init__(self, eps: float | str, version: str = "standard", steps: int = 100, budget: int = 5000, eot: int | None = None, **options) -> None:
        if version not in VERSIONS:
            raise ValueError(f"AutoAttack: version {version!r} is unknown; wanted one of {', '.join(VERSIONS)}.{nearest(version, tuple(VERSIONS))}")
        if options.get("targeted"):
            raise ValueError(
                "AutoAttack: targeted is True; wanted the true classes as labels, for its members choose their targets. Use APGD(targeted=True)."
            )
        if options.get("loss", "ce") != "ce":
            raise ValueError(f"AutoAttack: loss is {options['loss']!r}; its members have losses of their own. Drop it, or use APGD(loss=...).")
        super().__init__(eps, eot=eot if eot is not None else RAND_EOT if version == "rand" else 1, **options)
        self.version, self.steps, self.budget = version, whole("AutoAttack", "steps", steps), whole("AutoAttack", "budget", budget)
        self._members = self._make()
        self._fooled: Tensor | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names, in the order in which they attack."""
        return VERSIONS[self.version]

    @property
    def fooled(self) -> Tensor | None:
        """[members, N] int8 after a call: 1 fooled, 0 withstood, -1 not tried."""
        return self._fooled

    def _make(self) -> tuple[Attack, ...]:
        shared = {"eps": self.eps, "norm": self.norm}
        steps = {**shared, "steps": self.steps, "adjoint": self.adjoint, "eot": self.eot}
        if self.version == "rand":  # one lucky draw does not fool a random model: no sample leaves early
            return APGDCE(**steps, early_stop=False), APGDDLR(**steps, early_stop=False)
        return APGDCE(**steps), TAPGDDLR(**steps), FAB(**steps), Square(**shared, budget=self.budget)

    def run(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Streams) -> Tensor:
        classes = self.logits(model, images, labels).shape[1]
        if classes < CLASSES[self.version]:
            raise ValueError(
                f"AutoAttack: the model has {classes} classes; wanted {CLASSES[self.version]} or more, for its DLR loss. "
                "Use 'apgd-ce', 'tapgd-ce' and 'square' instead."
            )
        found, places = images.clone(), torch.arange(len(images), device=images.device)
        flags = torch.full((len(self._members), len(images)), -1, dtype=torch.int8, device=images.device)
        for number, member in enumerate(self._members):
            streams = generator.fork()[places]
            clean, true = images[places], labels[places]
            reached = self.part(member, model, clean, true, streams, places)
            with self.only(places):
                fooled = self.succeeded(self.mean_logits(model, reached, true), true)
            found[places], flags[number, places] = reached, fooled.to(torch.int8)
            places = places[~fooled]
            if not len(places):
                break
        self._fooled = flags
        return found
