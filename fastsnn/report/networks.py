"""A run's trained network on test images: its membranes, and what an attack does to it; or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import checkpoints
from ..pictures import Layer
from .attacked import Attacked, attack
from .folders import Run
from .membranes import measure

__all__ = ["Looked", "look"]

#: What can be wrong with a checkpoint, its data, or a package that reads them: the report comes without these pictures.
EXPECTED = (OSError, ValueError, ImportError, RuntimeError, FloatingPointError)


@dataclass(frozen=True)
class Looked:
    """What was found of one run: its layers' membranes (none without spikes), and what an attack does to it."""

    layers: Sequence[Layer] = ()
    attacked: Attacked | None = None


def look(
    run: Run, data: str | None, device: str | torch.device, images: int, attacked: int, eps: float, sets: dict, gamma: float
) -> tuple[Looked, list[str]]:
    """The weights of a run on test images, and sentences that say what is missing; `sets` keeps data between runs."""
    what = "there are no pictures of membranes and of attacked images"
    try:
        try:
            model, _ = checkpoints.load_run(run.path, which="best", device=device)
        except FileNotFoundError:
            model, _ = checkpoints.load_run(run.path, which="last", device=device)
    except EXPECTED as error:
        why = f"{run.name}: {what}, since the weights cannot be loaded ({_first(error)})."
        return Looked(), [f"{why} `fastsnn train --resume --out {run.path}` writes them."]
    spec = data or run.config["data"]
    kind = next(model.parameters()).dtype
    try:
        if spec not in sets:
            from ..data import load

            sets[spec] = load(spec)
        test = sets[spec].limited(test=min(images, len(sets[spec].y_test)))
        layers = measure(model, test.x_test.to(device).to(kind) / 255, gamma)
    except EXPECTED as error:
        why = f"{run.name}: {what}, since the test images cannot be used ({_first(error)})."
        return Looked(), [f"{why} `fastsnn report {run.path} --data PATH` takes them from PATH."]
    wanted = run.document.get("data", {}).get("fingerprint")
    notes = [f"{run.name}: the pictures are of other images than the run's own ({spec})."] if wanted and sets[spec].fingerprint() != wanted else []
    if not attacked:
        return Looked(layers), notes
    try:
        few = sets[spec].limited(test=min(attacked, len(sets[spec].y_test)))
        return Looked(layers, attack(model, few.x_test.to(device).to(kind) / 255, few.y_test.to(device), eps)), notes
    except EXPECTED as error:
        why = f"{run.name}: there are no pictures of attacked images, since the attack fails ({_first(error)})."
        return Looked(layers), [*notes, f"{why} `fastsnn report --attacked 0` leaves them out."]


def _first(error: BaseException) -> str:
    """An error's first line, without the stop: it goes into a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".").replace("`", "'")
