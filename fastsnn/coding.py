"""What a spiking network spends and what it gets for it: spikes per image, active neurons, accuracy against the number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .activity import _plain, _quiet, _Spikes, spiking_layers
from .evaluation.forward import accuracy, batches, check
from .models import Network, build

__all__ = ["accuracy_by_steps", "coding", "measure", "pictures", "text_table", "with_steps"]

#: Numbers of spikes that have a column of their own.
SHOWN = 8


def with_steps(model: Network, steps: int) -> Network:
    """A copy of a network that runs T = `steps` steps: parameters and running statistics as they are, dtype, device and modes too.

    Raises TypeError for what is no network of fastsnn.models with a spec, ValueError for steps < 1 and where weights differ between steps
    (norms `tebn` and `bntt`), so that other steps have none.

    >>> with_steps(model, 32).steps
    32
    """
    if not isinstance(model, Network) or model.spec is None:
        what = "it has no spec" if isinstance(model, Network) else "wanted a network of fastsnn.models"
        raise TypeError(f"with_steps: model is a {type(model).__name__}; {what}. A network made of names and numbers only can be made anew.")
    if steps != model.steps and model.spec["norm"] in ("tebn", "bntt"):
        raise ValueError(f"with_steps: norm {model.spec['norm']} has weights for each of {model.steps} steps; wanted steps={model.steps}, or a network of norm bn or tdbn.")
    made = build(**{**model.spec, "steps": steps})
    weight = next(model.parameters())
    made.to(weight.device, weight.dtype).load_state_dict(model.state_dict())
    return made.train(model.training)


def accuracy_by_steps(model: Network, x: Tensor, y: Tensor, steps: Sequence[int], batch_size: int = 256, device: str | torch.device | None = None) -> dict[int, float]:
    """Accuracy of the network with each number of steps T, the same weights and thresholds: {T: share of images that are right}, in eval mode.

    x: [N, C, H, W] uint8, or float with pixels in [0, 1]. y: [N] int64. An ANN has one step: the same value for each T. Errors as in `with_steps`.

    >>> accuracy_by_steps(snn, images, labels, (1, 2, 4, 8, 16))
    """
    check("accuracy_by_steps", x, y, batch_size)
    return {count: accuracy(with_steps(model, count), x, y, batch_size, device) for count in steps}


def coding(model: nn.Module, x: Tensor, batch_size: int = 64, device: str | torch.device | None = None) -> dict:
    """Coding efficiency in eval mode, over all spiking layers together.

    {"images": N, "neurons", "steps": T, "spikes": of all neurons over all steps, the mean over images, "per_neuron": spikes/neurons,
    "rate": per_neuron/T, "active": the share of neurons that fire at least once for an image, the mean over images, "histogram": [T + 1],
    the share of (neuron, image) pairs with k = 0 ... T spikes}. So active = 1 - histogram[0], per_neuron = sum of k*histogram[k].

    Arguments and errors as in `activity`. Source: Ozdenizci and Legenstein, "Adversarially Robust Spiking Neural Networks Through Conversion",
    on coding efficiency; a reading, the paper draws it without a formula.

    >>> coding(model, images)["spikes"]
    """
    check("coding", x, None, batch_size)
    model = _plain(model)
    spiking, neurons, counts = _Spikes("coding", model), 0, torch.zeros(0, dtype=torch.int64)
    with _quiet(model), spiking.watched():
        for images, _ in batches(model, x, None, batch_size, device):
            model(images)
            neurons = 0
            for spikes in spiking.take().values():
                found = torch.bincount(spikes.sum(0).flatten(), minlength=len(spikes) + 1).cpu()
                counts = torch.nn.functional.pad(counts, (0, max(0, len(found) - len(counts))))
                counts[: len(found)] += found
                neurons += spikes[0, 0].numel()
    shares, steps = counts.double() / counts.sum(), len(counts) - 1
    per_neuron = float((shares * torch.arange(steps + 1)).sum())
    return {
        "images": len(x),
        "neurons": neurons,
        "steps": steps,
        "spikes": per_neuron * neurons,
        "per_neuron": per_neuron,
        "rate": per_neuron / steps,
        "active": 1 - float(shares[0]),
        "histogram": shares.tolist(),
    }


def measure(
    model: nn.Module, x: Tensor, y: Tensor, steps: Sequence[int] = (), images: int = 512, batch_size: int = 256, device: str | torch.device | None = None
) -> dict:
    """Everything of one network, as JSON can hold it.

    {"steps": T, "total": N, "accuracy": with its own T, "by_steps": [[T, accuracy], ...] for each of `steps`, "coding": as `coding` returns, on the
    first `images` images; None for an ANN}. x, y, batch_size, device, errors: as in `accuracy_by_steps`.
    """
    check("measure", x, y, batch_size)
    own, spiking = getattr(model, "steps", None), bool(spiking_layers(model))
    counts = sorted({*steps, own}) if steps and spiking else []
    found = accuracy_by_steps(model, x, y, counts, batch_size, device)
    return {
        "steps": own,
        "total": len(x),
        "accuracy": found[own] if own in found else accuracy(model, x, y, batch_size, device),
        "by_steps": [[count, value] for count, value in found.items()],
        "coding": coding(model, x[:images], device=device) if spiking else None,
    }


def text_table(found: Mapping[str, dict]) -> str:
    """What `measure` returned for each of some networks, as lines: accuracies, spikes, and the histogram of spikes.

    The last column of the histogram counts all neurons with so many spikes or more.
    """
    from .evaluation import wilson

    wide = max(map(len, (*found, "network")))
    head = ("T", "accuracy", "95 % interval", "spikes/image", "per neuron", "rate", "active")
    lines = [f"{'network':{wide}}  {head[0]:>3}  {head[1]:>8}  {head[2]:>17}  {head[3]:>12}  {head[4]:>10}  {head[5]:>7}  {head[6]:>7}"]
    for name, row in found.items():
        low, high = wilson(round(row["accuracy"] * row["total"]), row["total"])
        line = f"{name:{wide}}  {row['steps']:>3}  {row['accuracy']:8.2%}  {low:7.2%} - {high:7.2%}"
        if (spent := row["coding"]) is not None:
            line += f"  {spent['spikes']:12,.1f}  {spent['per_neuron']:10.4f}  {spent['rate']:7.2%}  {spent['active']:7.2%}"
        lines.append(line)
    steps = list(dict.fromkeys(count for row in found.values() for count, _ in row["by_steps"]))
    if steps:
        lines += ["", f"{'accuracy, T =':{wide}}  " + "  ".join(f"{count:7}" for count in sorted(steps))]
        for name, row in found.items():
            known = dict(map(tuple, row["by_steps"]))
            if known:
                lines.append(f"{name:{wide}}  " + "  ".join(f"{known[count]:7.2%}" if count in known else " " * 7 for count in sorted(steps)))
    spikes = {name: _folded(row["coding"]["histogram"]) for name, row in found.items() if row["coding"] is not None}
    if spikes:
        most = max(map(len, spikes.values()))
        heads = [f"{count}{'+' * (count == SHOWN)}" for count in range(most)]
        lines += ["", f"{'spikes':{wide}}  " + "  ".join(f"{head:>7}" for head in heads)]
        lines += [f"{name:{wide}}  " + "  ".join(f"{share:7.2%}" for share in shares) for name, shares in spikes.items()]
    return "\n".join(lines)


def _folded(histogram: Sequence[float]) -> list[float]:
    return [*histogram[:SHOWN], sum(histogram[SHOWN:])] if len(histogram) > SHOWN else list(histogram)


def pictures(found: Mapping[str, dict], chance: float | None = None, dark: bool = False) -> dict[str, bytes]:
    """PNG pictures by file name, of what `measure` returned for each of some networks: steps.png, accuracy against T, where it is known; an ANN
    is a level line; spikes.png, the histogram of spikes of a neuron for an image, where a network spikes.

    chance: the accuracy of guessing, drawn as a line.
    """
    from .evaluation import wilson
    from .pictures import Curve, Panel, against_steps, curves

    drawn, numbers = {}, [count for row in found.values() for count, _ in row["by_steps"]]
    if numbers:
        lines = []
        for row in found.values():
            points = row["by_steps"] or [[count, row["accuracy"]] for count in (min(numbers), max(numbers))]
            ends = [wilson(round(value * row["total"]), row["total"]) for _, value in points]
            lines.append(Curve("", [count for count, _ in points], [value for _, value in points], [low for low, _ in ends], [high for _, high in ends]))
        drawn["steps.png"] = against_steps({"accuracy against the number of steps T": lines}, list(found), chance, dark)
    spiking = {name: row["coding"]["histogram"] for name, row in found.items() if row["coding"] is not None}
    if spiking:
        lines = [Curve(name, range(len(shares)), shares) for name, shares in spiking.items()]
        drawn["spikes.png"] = curves([Panel("how often neurons fire", "share of neurons", lines, share=True)], "spikes of a neuron for an image", dark)
    return drawn
