"""`convert`: checks what it is given, has the thresholds balanced, and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..adjoints import nearest
from ..models import Network
from .balancing import balance, plain_values
from .calibration import mini_batches
from .foreign import convert_module
from .graph import NORMED
from .networks import convert_network
from .report import Layer, Report
from .spending import Spending

METHODS = ("robust", "plain")
RUNNING = ("restart", "calibrate")
READOUTS = ("mean", "sum")
#: What `rho`, `kappa` and the reset are where they are not given.
DEFAULTS = {"robust": (0.997, 0.3, "hard"), "plain": (1.0, 1.0, "soft")}


def convert(
    ann: nn.Module,
    data: Tensor | Iterable | None = None,
    steps: int = 8,
    *,
    method: str = "robust",
    neuron: str = "if",
    neuron_options: dict | None = None,
    rho: float | None = None,
    kappa: float | None = None,
    floor: float = 0.03,
    calibration_steps: int = 100,
    batches: int = 10,
    batch_size: int = 64,
    running: str = "restart",
    readout: str | None = None,
    memory: int = 3 * 2**29,
    progress: Callable[[str], None] | None = None,
) -> tuple[nn.Module, Report]:
    """A spiking network of T steps with the weights of an ANN, and thresholds balanced on data.

    `theta = max(kappa*value, floor)`, one for each layer, where value is the highest over mini-batches of the rho value (of the rank
    `1 + round(rho*(n - 1))` of n numbers, ascending: exact, whatever T_c) of what the layer gets.

    ann: a network of `fastsnn.models` with neuron="relu": a `Network` with a `spec` comes back, saved and loaded like any other. Or any
        `nn.Module` from images to logits made of convolutions, linear layers, batch norm, ReLU, average pooling, flattening, dropout
        and sums: a `Converted` comes back. It is left as it was. A ReLU that is called at several places becomes neurons at each.
    data: images [M, C, H, W], floats with pixels in [0, 1] (for a foreign module what it takes) or uint8, split into mini-batches of
        `batch_size` in the order given; or an iterable of mini-batches: images, or tuples that begin with them, such as a DataLoader.
        The first `batches` are used, fewer where there are no more.
    steps: T of the network that comes back, >= 1.
    method: `robust`, to be fine-tuned. Batch norm keeps weight and bias (tdBN's constant factor goes into the weight), takes its
        statistics over T and batch, and starts its running statistics anew. Layer by layer, with the values of the layers before it for
        thresholds and the statistics of the mini-batch in all norms, a simulation of `calibration_steps` (T_c) gives the rho value of a
        layer's input over [T_c, N, C, *S]; at the end all are multiplied by kappa.
        `plain`, for large T without fine-tuning. Batch norm keeps the ANN's running statistics: in eval mode the fixed affine map that
        others fold into the weights. The rho value is of what the ANN's own ReLU returns. A spike counts theta, a factor that goes
        into the weights that follow; with a soft reset and no leak, theta times the rates approach the ANN's activations like 1/T.
    neuron, neuron_options: `if`, `lif` or `plif` and its options, as in `fastsnn.models` (surrogate, decay, reset: by default hard for
        `robust`, soft for `plain`, ...). The thresholds are parameters.
    rho: a share in (0, 1]; 0.997, for `plain` 1, the maximum. kappa: > 0; 0.3, as published for CIFAR-10 and SVHN (0.1 for CIFAR-100
        and Tiny-ImageNet); for `plain` 1. floor: the least threshold, > 0, in units of potential.
    calibration_steps, batches, batch_size: T_c, and the number and size of mini-batches. With an encoding that differs between steps and
        draws no random numbers, T_c is T.
    running: for `robust`. `restart` leaves running statistics at mean 0 and variance 1, for fine-tuning; `calibrate` sets them to their
        mean over the mini-batches, simulated for T steps.
    readout: of a foreign module's outputs over T, `mean` (default) or `sum`. A network of fastsnn keeps its own.
    memory: bytes for what is kept so that it need not run again: spikes, a bit each, and inputs of norms. What does not fit runs
        again; the values are the same.
    progress: called with a line for each layer.

    Returns (spiking network in eval mode on the device of the ANN, `Report`). Raises TypeError and ValueError: for the first module or
    function that cannot be converted, by its name; for missing images, steps < 1 and unknown words.

    Sources: robust: "Adversarially Robust Spiking Neural Networks Through Conversion", TMLR 2024, section 3; plain: Diehl et al., IJCNN
    2015; Rueckauer et al., 2017. That kappa waits until all layers are balanced is a reading, from the authors' code.

    >>> snn, report = fastsnn.convert(ann, data.x_train[:640], steps=8)
    >>> print(report)
    """
    if not isinstance(ann, nn.Module):
        raise TypeError(f"convert: ann is a {type(ann).__name__}; wanted a torch.nn.Module, for a run: checkpoints.load_run(folder)[0].")
    for name, value in (("steps", steps), ("calibration_steps", calibration_steps), ("batches", batches), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"convert: {name} is {value!r}; wanted an int >= 1.")
    words = [("method", method, METHODS), ("running", running, RUNNING)] + [("readout", readout, READOUTS)] * (readout is not None)
    for name, value, known in words:
        if value not in known:
            raise ValueError(f"convert: {name} {value!r} is unknown; wanted one of {', '.join(known)}.{nearest(str(value), known)}")
    default_rho, default_kappa, reset = DEFAULTS[method]
    rho, kappa = default_rho if rho is None else rho, default_kappa if kappa is None else kappa
    if not 0 < rho <= 1:
        raise ValueError(f"convert: rho is {rho!r}; wanted a share in (0, 1], for example 0.997.")
    for name, value in (("kappa", kappa), ("floor", floor)):
        if not 0 < value < float("inf"):
            raise ValueError(f"convert: {name} is {value!r}; wanted a number > 0.")

    options = {"reset": reset, **(neuron_options or {})}
    if isinstance(ann, Network):
        if readout is not None:
            raise ValueError(f"convert: readout {readout!r} is for modules from elsewhere; {ann.name} has one of its own, {ann.readout!r}. Leave it out.")
        draft = convert_network(ann, steps, neuron, options, plain=method == "plain")
    else:
        draft = convert_module(ann, steps, neuron, options, readout or "mean", plain=method == "plain")
    images = mini_batches(data, batches, batch_size, next(ann.parameters()))
    spending = Spending(images[0].device)
    if method == "robust":
        steps_run, values, neurons = balance(draft, images, calibration_steps, rho, floor, memory, progress)
    else:
        steps_run, values, neurons = plain_values(draft, images, rho, progress)
    seconds = spending.seconds()
    layers, notes = [], list(draft.notes)
    for site, found, count in zip(draft.sites, values, neurons, strict=True):
        value = max(found)
        threshold = max(kappa * value, floor)
        if kappa * value < floor:
            notes.append(f"{site.name}: kappa times its value {value:.4g} is below the floor, and the threshold is {floor:g}.")
        with torch.no_grad():
            site.layer.threshold.fill_(threshold)
        layers.append(Layer(site.name, site.layer.threshold.item(), value, tuple(found), count))
    if method == "plain":
        draft.absorb()
    elif running == "calibrate":
        draft.calibrate(images)
    elif any(isinstance(module, NORMED) for module in draft.network.modules()):
        notes.append("The running statistics of batch norm start anew: fine-tune the network before it is used, or convert with running='calibrate'.")
    report = Report(
        method, steps, float(rho), float(kappa), float(floor), steps_run, sum(len(batch) for batch in images), len(images), spending.seconds(),
        seconds / len(images), spending.peak(), tuple(layers), tuple(draft.converted), tuple(notes),
    )  # fmt: skip
    return draft.network.eval(), report
