"""What a training run is made of, each derived from its settings: seeds, device, network, optimiser, learning rate."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from .recipes import Config, by_name, canonical

__all__ = [
    "arithmetic",
    "autocast",
    "build_model",
    "build_optimizer",
    "check_same",
    "choose_device",
    "choose_normalisation",
    "current",
    "determinism",
    "learning_rate",
    "optimizer_tensors",
    "restore_optimizer",
    "seed_of",
]

#: With which cuBLAS repeats its results; it has to be set before the first product.
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def seed_of(*words: object) -> int:
    """A seed in [0, 2**63) made of numbers and names: different words, unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little") >> 1


def learning_rate(config: Config, epoch: int, batch: int, batches: int) -> float:
    """The rate at one step: `lr * (1 + cos(pi*e/E))/2`, constant within an epoch as in the papers, after a linear warm-up.

    e, E: epoch and number of epochs after the warm-up, in whose step i of n the rate is `lr*(i + 1)/n`.
    """
    if epoch < config.warmup:
        return config.lr * (epoch * batches + batch + 1) / (config.warmup * batches)
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * (epoch - config.warmup) / (config.epochs - config.warmup)))


def choose_device(config: Config) -> torch.device:
    """The device of a run, or an error that says why it cannot be used."""
    name = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train: device {name!r} is unknown; wanted auto, cpu, cuda or cuda:NUMBER.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"train: device is {name}, but PyTorch sees no GPU ({torch.__version__}). Use --device cpu, or install PyTorch for CUDA.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"train: device is {name}; PyTorch sees {torch.cuda.device_count()} GPUs, cuda:0 to cuda:{torch.cuda.device_count() - 1}.")
    if config.cuda_graphs and device.type != "cuda":
        raise ValueError(f"train: cuda_graphs works on a GPU; the device is {name}. Leave --cuda-graphs out, or use --device cuda.")
    if config.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"train: precision tf32 is arithmetic of GPUs; the device is {name}. Use --precision float32, or --device cuda.")
    return device


def build_model(config: Config, classes: int, image: tuple[int, ...], normalise: object) -> nn.Module:
    """The network that a config describes, with weights drawn from its seed."""
    from . import models

    neuron_options = dict(config.neuron_options)
    if config.surrogate != "auto":
        neuron_options["surrogate"] = config.surrogate
    torch.manual_seed(seed_of(config.seed, "weights"))
    return models.build(
        config.model,
        classes=classes,
        image=tuple(image),
        steps=config.steps,
        norm=config.norm,
        norm_options=config.norm_options or None,
        encoding=config.encoding,
        encoding_options=config.encoding_options or None,
        neuron=config.neuron,
        neuron_options=neuron_options or None,
        normalise=normalise,
        readout=config.readout,
        **config.model_options,
    )


def build_optimizer(config: Config, model: nn.Module, groups: Sequence[Mapping] = ()) -> torch.optim.Optimizer:
    """The optimiser that a config describes, over all parameters of a network.

    groups: parameters to treat apart, as `Defense.groups` returns them; "own_rate" tells those whose learning rate the schedule leaves alone.
    """
    apart = {id(parameter) for group in groups for parameter in group["params"]}
    rest = {"params": [parameter for parameter in model.parameters() if id(parameter) not in apart], "own_rate": False}
    chosen = [rest, *({**group, "own_rate": "lr" in group} for group in groups)]
    decay = config.number("weight_decay")
    if config.optimizer == "adamw":
        allowed = ("params", "own_rate", "lr", "weight_decay")  # momentum is not a word of AdamW's
        return torch.optim.AdamW([{key: value for key, value in group.items() if key in allowed} for group in chosen], lr=config.lr, weight_decay=decay)
    return torch.optim.SGD(chosen, lr=config.lr, momentum=config.momentum, weight_decay=decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as tensors by name `INDEX.KEY`."""
    states = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, state in states.items() for key, value in state.items() if isinstance(value, Tensor)}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back."""
    states: dict[int, dict] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, state in optimizer.state.items():  # in the memory format of the parameter, as a fresh run has them
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                state[key] = torch.empty_like(parameter).copy_(value)


@contextmanager
def current(device: torch.device):
    """A block in which a GPU is the current one, on which streams are made; before and after it, the one of before."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.current_device()
    torch.cuda.set_device(before if device.index is None else device.index)
    try:
        yield
    finally:
        torch.cuda.set_device(before)


@contextmanager
def arithmetic(precision: str, device: torch.device):
    """A block in which a GPU rounds the products of float32 to TF32 where precision is tf32, and else keeps them whole.

    PyTorch's own default is TF32 in convolutions. Put back at the end.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def determinism(config: Config, device: torch.device):
    """On a GPU: algorithms that repeat, or the fastest; put back at the end."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warned, workspace = torch.is_deterministic_algorithms_warn_only_enabled(), os.environ.get(WORKSPACE[0])
    if config.deterministic:
        os.environ.setdefault(*WORKSPACE)
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not config.deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warned)
        torch.backends.cudnn.benchmark = before[1]
        if workspace is None:
            os.environ.pop(WORKSPACE[0], None)


def autocast(config: Config, device: torch.device):
    """The block in which forward passes run."""
    return torch.autocast(device.type, torch.bfloat16) if config.precision == "bfloat16" else nullcontext()


def check_same(saved: dict, config: Config, folder: Path) -> None:
    """ValueError where a resumed run's settings differ from those it was started with, but for those that may."""
    fields, saved, given = by_name(), canonical(saved), canonical(config.to_dict())
    differ = [name for name, item in fields.items() if not item.metadata["resume"] and given[name] != saved.get(name, given[name])]
    if differ:
        changes = ", ".join(f"{name} {saved[name]!r} to {given[name]!r}" for name in differ)
        free = ", ".join(name for name, item in fields.items() if item.metadata["resume"])
        raise ValueError(
            f"train: resuming {folder} cannot change {changes}; a resumed run may change {free} only. "
            "Leave the others out (they are read from the run), or start a new run with another --out."
        )


def choose_normalisation(config: Config, name: str, images: Tensor) -> object:
    """What `models.build` takes as normalise: the name of a data set's values, or (mean, deviation) of the training images.

    images: [N, C, H, W] uint8.
    """
    from .encodings import make_encoding
    from .models import NORMALISATIONS

    if config.normalise != "auto":
        return config.normalise
    if name in NORMALISATIONS:
        return name
    if make_encoding(config.encoding, config.steps, **config.encoding_options).normalises is False:  # it takes pixels
        return None
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([torch.bincount(channel.reshape(-1), minlength=256) for channel in images.unbind(1)]).double() / images[:, 0].numel()
    mean = (shares * levels).sum(1)
    deviation = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return [round(value, 6) for value in mean.tolist()], [round(value, 6) for value in deviation.tolist()]
