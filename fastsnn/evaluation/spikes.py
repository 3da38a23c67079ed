"""What the spiking layers of a network do on the images of the checks, clean and attacked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..attacks import Attack
from ..runs import seed_of
from . import checks
from .forward import fetch
from .results import Result

__all__ = ["BATCH", "activity_of"]

#: Images in one pass: the spikes of all layers and steps are held. It is no option, so that the size of batches changes nothing.
BATCH = 32


def activity_of(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    results: Mapping[str, Result],
    limit: int,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> dict | None:
    """Spikes, rates and active neurons on `limit` images, in all and for each spiking layer, as JSON can hold them.

    {"images": n, "clean": {"totals", "layers"}, "attacked": {"attack", "totals", "layers", "distance"}}: `totals` and `layers` as in
    `activity.totals` and `activity.LayerActivity`, `distance` as in `activity.LayerDistance`. Attacked images are those of the attack that the
    checks take as the main one, crafted again, where that is PGD: others are dear. None without spiking layers and where limit is 0;
    {"missing": why} for a model whose layers cannot be told apart. seed: of a random model's numbers.
    """
    from .. import activity as spiking

    if limit < 1 or not spiking.spiking_layers(model):
        return None
    places = torch.tensor(checks.chosen(len(x), limit), dtype=torch.int64)
    clean = x[places]

    def measured(images: Tensor) -> dict:
        layers = spiking.activity(model, images, BATCH, device)
        return {"totals": spiking.totals(layers), "layers": [layer.to_dict() for layer in layers]}

    cuda = [value.device for value in model.parameters() if value.is_cuda][:1]
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed_of(seed, "activity"))
        try:
            found = {"images": len(places), "clean": measured(clean)}
        except ValueError as error:  # the figures of the attacks are none the worse
            return {"images": len(places), "missing": str(error)}
        name = checks.main_attack(attacks, results)
        if name is not None and attacks[name].name == "pgd":
            changed = []
            for part in places.split(BATCH):
                images = fetch(model, x, part, device)
                changed.append(attacks[name](model, images, y[part].to(images.device), part.to(images.device)).cpu())
            moved = torch.cat(changed)
            distance = [layer.to_dict() for layer in spiking.spike_distance(model, clean, moved, BATCH, device)]
            found["attacked"] = {"attack": name, **measured(moved), "distance": distance}
    return found
