"""What is measured on the held-out images during training: loss, accuracy, and the membranes of each spiking layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batches
from .models import Network
from .recipes import Config
from .runs import autocast

__all__ = ["Validation"]

#: Of each spiking layer, averaged over steps, channels and batches.
COLUMNS = ("omega", "mean", "deviation", "rate")


class Validation:
    """One pass over held-out images in eval mode, over all processes together.

    The network comes back in training mode. gamma of the settings is the half width of Omega's window.
    """

    def __init__(self, model: Network, batches: Batches, config: Config, dtype: torch.dtype, group=None) -> None:
        self.model, self.batches, self.config, self.dtype, self.group = model, batches, config, dtype, group
        self.layers = [name for name, _ in model.spiking_layers()]

    def __call__(self) -> dict:
        """loss, accuracy, and of a spiking network omega and rate (means over layers) and `layers`, a list for each of COLUMNS."""
        total = self._sum(len(self.batches))
        if self.group is not None:
            torch.distributed.all_reduce(total, group=self.group)
        return self._record(total)

    def first_batch(self) -> dict:
        """The same of the first batch, on this process alone."""
        return self._record(self._sum(1))

    @torch.no_grad()
    def _sum(self, number: int) -> Tensor:
        """Sums over images [3 + 4*L], float64: images, losses, right answers, and COLUMNS of each of L spiking layers."""
        total = torch.zeros(3 + len(COLUMNS) * len(self.layers), dtype=torch.float64, device=self.batches.device)
        self.model.eval()
        for _, (images, labels, _) in zip(range(number), self.batches.epoch(0)):
            if len(labels):  # the last batch may be smaller than the number of processes
                total += torch.stack(self._measure(images.to(self.dtype), labels)) * len(labels)
        self.model.train()
        return total

    def _measure(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        from .defenses import omega

        with autocast(self.config, images.device):
            logits, statistics = self.model(images, statistics=("mean", "var", "rate")) if self.layers else (self.model(images), [])
        logits = logits.double()
        values = [logits.new_ones(()), F.cross_entropy(logits, labels), (logits.argmax(1) == labels).double().mean()]
        for layer in statistics:
            values += [omega(layer.mean, layer.var, self.config.gamma).mean(), layer.mean.mean(), layer.var.sqrt().mean(), layer.rate.mean()]
        return [value.double() for value in values]

    def _record(self, total: Tensor) -> dict:
        count, *sums = total.tolist()
        loss, accuracy, *rest = (value / count if count else math.nan for value in sums)
        record: dict = {"loss": loss, "accuracy": accuracy}
        if self.layers:
            columns = {name: rest[place :: len(COLUMNS)] for place, name in enumerate(COLUMNS)}
            record |= {name: sum(columns[name]) / len(self.layers) for name in ("omega", "rate")}
            record["layers"] = {"name": self.layers, **columns}
        return record
