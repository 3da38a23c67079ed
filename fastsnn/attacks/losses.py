"""What attacks raise, sample by sample: functions of the logits z [N, classes] and the labels y [N]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LOSSES",
    "TARGETED_LOSSES",
    "chosen",
    "cross_entropy",
    "dlr",
    "dlr_of_target",
    "margin",
    "targeted_cross_entropy",
    "targeted_dlr",
    "targeted_margin",
]

#: (logits [N, classes], labels [N]) -> [N]: what an attack raises (lowers, where targeted), sample by sample.
Loss = Callable[[Tensor, Tensor], Tensor]
#: (logits [N, classes], labels [N], targets [N]) -> [N]: what an attack towards other classes raises.
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Keeps DLR finite where logits are equal, as in AutoAttack's code.
TINY = 1e-12


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log softmax(z)[y]` for each sample: [N]; float32 at least."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`max_{i != y} z_i - z_y` for each sample: [N]; above 0 just where another class wins."""
    logits = _wide(logits)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - _of(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio: `-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))`, z_(k) the k-th largest logit: [N].

    Neither a shift nor a scale of the logits changes it. A ValueError for less than three classes.
    Source: Croce and Hein, ICML 2020, equation 6; 1e-12 is added to the divisor, as in the authors' code.
    """
    ordered, places = _sorted(logits, 3, "dlr", "the largest and the third largest")
    rival = torch.where(places[:, -1] == labels, ordered[:, -2], ordered[:, -1])
    return -(_of(_wide(logits), labels) - rival) / (ordered[:, -1] - ordered[:, -3] + TINY)


def targeted_cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(z)[t]` for each sample, whatever its label: [N]."""
    return -cross_entropy(logits, targets)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """`z_t - z_y` for each sample: [N] (Gowal et al. 2019, MultiTargeted)."""
    logits = _wide(logits)
    return _of(logits, targets) - _of(logits, labels)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """`-(z_y - z_t) / (z_(1) - (z_(3) + z_(4))/2)`, z_(k) the k-th largest logit: [N].

    A ValueError for less than four classes.
    Source: Croce and Hein, ICML 2020, equation 7; 1e-12 is added to the divisor, as in the authors' code.
    """
    ordered, _ = _sorted(logits, 4, "targeted dlr", "the largest, the third and the fourth largest")
    logits = _wide(logits)
    return -(_of(logits, labels) - _of(logits, targets)) / (ordered[:, -1] - 0.5 * ordered[:, -3] - 0.5 * ordered[:, -4] + TINY)


def dlr_of_target(logits: Tensor, targets: Tensor) -> Tensor:
    """`(max_{i != t} z_i - z_t) / (z_(1) - (z_(3) + z_(4))/2)`: [N], what an attack towards t lowers; `dlr` is flat where t is third.

    The targeted DLR whose label is the likeliest class other than t. A ValueError for less than four classes.
    """
    rivals = logits.detach().scatter(1, targets[:, None], -torch.inf).argmax(1)
    return -targeted_dlr(logits, rivals, targets)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": margin}
#: The losses of attacks that go towards one class after the other, by the names of LOSSES.
TARGETED_LOSSES: dict[str, TargetedLoss] = {"ce": targeted_cross_entropy, "dlr": targeted_dlr, "margin": targeted_margin}


def chosen(loss: str | Loss, targeted: bool) -> Loss:
    """The function of an attack's option `loss`, in the form that a targeted attack lowers or another one raises."""
    if not isinstance(loss, str):
        return loss
    return dlr_of_target if targeted and loss == "dlr" else LOSSES[loss]


def _wide(logits: Tensor) -> Tensor:
    """float32 at least: differences of logits lose too many digits in half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def _sorted(logits: Tensor, least: int, who: str, uses: str) -> tuple[Tensor, Tensor]:
    if logits.shape[1] < least:
        raise ValueError(
            f"{who}: the model has {logits.shape[1]} classes; wanted {least} or more, for the loss takes {uses} logit. Use loss='ce' or 'margin'."
        )
    return _wide(logits).sort(dim=1)
