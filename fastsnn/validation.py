"""What is measured on the held-out images during training: loss, accuracy, and the membranes of each spiking layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batches
from .distributed import pooled
from .models import Network
from .recipes import Config
from .runs import autocast

__all__ = ["Validation"]

#: Of each spiking layer, averaged over steps and channels, each of which is measured over all images.
COLUMNS = ("omega", "mean", "deviation", "rate")


class Validation:
    """One pass over held-out images in eval mode, over all processes together.

    Neither batches nor processes change the result but for rounding. The network comes back in training mode. gamma of the
    settings is the half width of Omega's window.
    """

    def __init__(self, model: Network, batches: Batches, config: Config, dtype: torch.dtype, group=None) -> None:
        self.model, self.batches, self.config, self.dtype, self.group = model, batches, config, dtype, group
        self.layers = [name for name, _ in model.spiking_layers()]

    def __call__(self) -> dict:
        """loss, accuracy, and of a spiking network omega and rate (means over layers) and `layers`, a list for each of COLUMNS."""
        return self._record(*self._measure(len(self.batches), self.group))

    def first_batch(self) -> dict:
        """The same of the first batch, on this process alone."""
        return self._record(*self._measure(1, None))

    @torch.no_grad()
    def _measure(self, number: int, group) -> tuple[Tensor, list[Tensor]]:
        """Sums over images [3], float64 (images, losses, right answers); of each spiking layer mean, variance and rate [3, T, C]."""
        total = torch.zeros(3, dtype=torch.float64, device=self.batches.device)
        moments, images = _Moments(), None
        self.model.eval()
        for _, (images, labels, _) in zip(range(number), self.batches.epoch(0)):
            if len(labels):  # the last batch may be smaller than the number of processes
                logits, statistics = self._forward(images)
                logits = logits.double()
                total += torch.stack([logits.new_tensor(len(labels)), F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()])
                moments.add(statistics, len(labels))
        if group is not None:
            if not moments.count:  # a process without images takes part with the shapes of the others, and no weight
                moments.add(self._forward(images.new_zeros(1, *images.shape[1:]))[1], 0)
            torch.distributed.all_reduce(total, group=group)
            moments.join(group)
        self.model.train()
        return total, moments.layers()

    def _forward(self, images: Tensor) -> tuple[Tensor, list]:
        with autocast(self.config, images.device):
            images = images.to(self.dtype)
            return self.model(images, statistics=("mean", "var", "rate")) if self.layers else (self.model(images), [])

    def _record(self, total: Tensor, layers: list[Tensor]) -> dict:
        from .defenses import omega

        count, loss, right = total.tolist()
        record: dict = {"loss": loss / count, "accuracy": right / count} if count else {"loss": math.nan, "accuracy": math.nan}
        if layers:
            rows = [torch.stack([omega(mean, var, self.config.gamma).mean(), mean.mean(), var.sqrt().mean(), rate.mean()]) for mean, var, rate in layers]
            columns = dict(zip(COLUMNS, torch.stack(rows).T.tolist()))
            record |= {name: sum(columns[name]) / len(self.layers) for name in ("omega", "rate")}
            record["layers"] = {"name": self.layers, **columns}
        return record


class _Moments:
    """Mean and biased variance of the membrane, and firing rate, over images that come in batches, in float64.

    Chan, Golub and LeVeque 1983. All layers lie in one row, so that one step of arithmetic and one collective serve all.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.var, self.shapes = 0, torch.zeros(()), torch.zeros(()), []

    def add(self, statistics: list, count: int) -> None:
        """statistics: of a batch of `count` images, or of any batch for its shapes where count is 0."""
        if not statistics:
            return
        self.shapes = [entry.mean.shape for entry in statistics]
        # The rate is a mean too; what its variance would be is not asked for.
        mean = torch.cat([getattr(entry, name).double().flatten() for name in ("mean", "rate") for entry in statistics])
        var = torch.cat([entry.var.double().flatten() for entry in statistics])
        var = torch.cat([var, torch.zeros_like(var)])
        self.count += count
        share = count / self.count if self.count else 1.0
        ahead = mean - self.mean
        self.var = self.var + share * (var - self.var) + share * (1 - share) * ahead**2
        self.mean = self.mean + share * ahead

    def join(self, group) -> None:
        """The same over all processes of a group."""
        if self.shapes:
            self.mean, self.var, _ = pooled(self.mean, self.var, group, self.count)

    def layers(self) -> list[Tensor]:
        """[3, *shape] of each layer: mean, variance, rate."""
        if not self.shapes:
            return []
        mean, rate = self.mean.chunk(2)
        parts = torch.stack([mean, self.var.chunk(2)[0], rate]).split([shape.numel() for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)]
