"""REG: weights drawn towards orthogonal rows after each step (SNN-RAT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed import ranks
from ..models.resnet import Combine
from .base import Defense

__all__ = ["REG", "project_simplex"]

#: A linear layer of this many rows or more moves only this share of them, drawn anew in each step.
MANY_ROWS, SHARE = 200, 0.3


class REG(Defense):
    """SNN-RAT's regularisation: after each step `W <- (1 + beta)*W - beta*W W^T W`, which maps singular values s to (1 + beta)*s - beta*s^3.

    It acts on every convolution (as a matrix [C_out, rest]) and linear layer, the classifier included; of a linear layer
    with 200 rows or more on a random 30 %, drawn from torch's generator, on the first of several processes for all.
    The scalars that weigh the two branches of a residual sum (`Combine` of WRN-16-4 and ResNet-20) are projected on the simplex. It stands in place of
    weight decay, which is 0 here.
    beta: 0.001 (VGG), 0.004 (WRN). Source: SNN-RAT, NeurIPS 2022, section 4.2.

    >>> optimiser.step()
    >>> REG(beta=0.001).after_step(model)
    """

    name = "reg"
    weight_decay = 0.0

    def __init__(self, beta: float = 0.001) -> None:
        # At 1/2 and above the iteration leaves its fixed point s = 1.
        if not 0 <= beta < 0.5:
            raise ValueError(f"REG: beta is {beta}; wanted a number in [0, 0.5), such as 0.001.")
        self.beta = float(beta)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and len(layer.weight) >= MANY_ROWS:
                rows = _some_rows(layer.weight)
                layer.weight.index_copy_(0, rows, self._moved(layer.weight[rows]))
            elif isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                layer.weight.copy_(self._moved(layer.weight))
            elif isinstance(layer, Combine):
                layer.weights.copy_(project_simplex(layer.weights))

    def _moved(self, weight: Tensor) -> Tensor:
        w = weight.flatten(1)
        # The same product either way; the smaller square is cheaper.
        cubed = (w @ w.T) @ w if len(w) <= w.shape[1] else w @ (w.T @ w)
        return ((1 + self.beta) * w - self.beta * cubed).reshape(weight.shape)


def _some_rows(weight: Tensor) -> Tensor:
    rows = torch.randperm(len(weight), device=weight.device)[: int(len(weight) * SHARE)]
    if ranks() > 1:  # weights must stay equal on all of them
        torch.distributed.broadcast(rows, src=0)
    return rows


def project_simplex(values: Tensor) -> Tensor:
    """The nearest point to `values` [n] with entries >= 0 and sum 1 (Duchi et al., ICML 2008, figure 1)."""
    ordered = values.flatten().sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(ordered) + 1, device=values.device)
    kept = (ordered > excess).sum()  # a prefix: at least the first
    return (values - excess.gather(0, kept - 1)).clamp(min=0)
