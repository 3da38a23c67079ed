"""How accurate a classifier is, clean and under attack, and what its membranes look like."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor, nn

from .adjoints import nearest
from .attacks import FGSM, PGD, Attack, parse_eps
from .defenses.base import named_statistics
from .defenses.mpd_sgr import omega
from .extras import need

__all__ = ["SUITES", "Evaluation", "LayerDiagnosis", "ResumeError", "Result", "accuracy", "default_eot", "diagnose", "evaluate", "make_suite", "wilson"]

#: Seconds between two writes of a file to resume from.
WRITE_EVERY = 10.0
#: Gradients averaged against networks that are random at inference (Ding et al. 2024, StoG).
RANDOM_EOT = 10


class ResumeError(ValueError):
    """A file to resume from does not fit the evaluation that is asked for, or cannot be read."""


def wilson(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of `correct` out of `total`, as (low, high) in [0, 1].

        (p + z^2/2n -+ z*sqrt(p*(1-p)/n + z^2/4n^2)) / (1 + z^2/n),  p = correct/n, z the normal quantile of (1 + level)/2

    Source: Wilson 1927; Newcombe 1998, method 3. A ValueError for 0 samples.

    >>> wilson(81, 263)  # 0.2553 to 0.3662
    """
    if not 0 < total or not 0 <= correct <= total:
        raise ValueError(f"wilson: got {correct} correct of {total}; wanted 0 <= correct <= total and total >= 1.")
    if not 0 < level < 1:
        raise ValueError(f"wilson: level is {level}; wanted a number between 0 and 1, such as 0.95.")
    z, p = NormalDist().inv_cdf((1 + level) / 2), correct / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the bound is 0 or 1 exactly; rounding would miss it.
    return 0.0 if correct == 0 else (middle - half) / scale, 1.0 if correct == total else (middle + half) / scale


@dataclass(frozen=True)
class Result:
    """One row of an evaluation. correct: for each sample, whether the model was right. interval: Wilson's, 95 %.

    attack: its options, None for clean images. zero_gradient: the share of samples whose first gradient was zero
    everywhere, None where none was taken. largest: the largest perturbation found, in the attack's norm. seconds: spent.
    """

    correct: tuple[bool, ...]
    attack: dict | None = None
    zero_gradient: float | None = None
    largest: float = 0.0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(sum(self.correct), len(self.correct))

    def to_dict(self) -> dict:
        """As JSON holds it; `correct` as a string of 0 and 1."""
        return {**asdict(self), "correct": _flags(self.correct), "accuracy": self.accuracy, "interval": list(self.interval), "total": len(self.correct)}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: a `Result` by name, "clean" first. warnings: what makes the figures doubtful, in words."""

    results: dict[str, Result]
    warnings: list[str] = field(default_factory=list)

    def worst(self) -> Result:
        """Per sample over all rows: right only where the model was right on the clean image and under every attack."""
        return Result(tuple(all(flags) for flags in zip(*(result.correct for result in self.results.values()))))

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return {"results": {name: result.to_dict() for name, result in self.results.items()}, "worst": self.worst().to_dict(), "warnings": list(self.warnings)}


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 256, device: str | torch.device | None = None) -> float:
    """The share of images that the model classifies right, in eval mode; the model's modes come back.

    x: [N, C, H, W] uint8, or float with pixels in [0, 1]. y: [N] int64. device: where to run, the model is moved there; None: where it is.
    """
    _check("accuracy", x, y, batch_size)
    right = 0
    with _evaluating(model):
        for images, labels, _ in _batches(model, x, y, batch_size, device):
            right += (_logits("accuracy", model, images).argmax(1) == labels).sum()
    return int(right) / len(x)


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, Attack],
    batch_size: int = 256,
    device: str | torch.device | None = None,
    progress: bool = False,
    resume: str | Path | None = None,
) -> Evaluation:
    """Accuracy on clean images and under each attack, sample by sample.

    model: any module from images to logits. x, y, batch_size, device: as in `accuracy`. attacks: by the name to report;
    `make_suite` makes usual ones. Every sample is attacked, those that are classified wrong anyway too, as the papers do.
    progress: show a bar. resume: a file that is written on the way; a later call with the same model, images and
    attacks goes on from it, whatever its batch size, and leaves it complete; a ResumeError where the file does not fit.

    Random numbers of an attack with a seed belong to the sample, not to the batch, so results do not depend on
    batch_size (but for the rounding of the model itself, and for models that draw random numbers). Perturbations are
    measured on the final images; a RuntimeError where one is larger than its attack allows or leaves [0, 1].

    >>> result = evaluate(model, x, y, make_suite("quick", ["8/255"]))
    >>> result.results["pgd7-8/255"].accuracy
    """
    _check("evaluate", x, y, batch_size)
    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise TypeError(f"evaluate: attack {name!r} is a {type(attack).__name__}; wanted an instance from fastsnn.attacks.")
        if attack.targeted:
            raise ValueError(f"evaluate: attack {name!r} is targeted, but labels here are the true ones; wanted targeted=False.")
        if name == "clean":
            raise ValueError("evaluate: 'clean' is the row without an attack; wanted another name for the attack.")
    if device is not None:
        model.to(device)
    rows: dict[str, Attack | None] = {"clean": None, **attacks}
    store = _Store(resume, lambda: _key(model, x, y, rows))
    bar = need("tqdm", "train").tqdm(total=len(x) * len(rows), unit="image", leave=False) if progress else None
    try:
        _fill(model, x, y, rows, batch_size, device, store, bar)
    finally:
        store.write(now=True)  # what was found so far, where it ends early
        if bar is not None:
            bar.close()
    results = {
        name: Result(
            tuple(flag == "1" for flag in store.rows[name]["correct"]),
            None if attack is None else {"name": attack.name, **attack.options()},
            store.rows[name]["zero"] / store.rows[name]["known"] if store.rows[name]["known"] else None,
            store.rows[name]["largest"],
            store.rows[name]["seconds"],
        )
        for name, attack in rows.items()
    }
    return Evaluation(results, _warnings(model, x, y, batch_size, device, results))


def _fill(model: nn.Module, x: Tensor, y: Tensor, rows: Mapping[str, Attack | None], batch_size: int, device, store: _Store, bar) -> None:
    """Attack what the store does not hold yet, batch by batch."""
    for name, attack in rows.items():
        part = store.rows.setdefault(name, {"correct": "", "zero": 0, "known": 0, "largest": 0.0, "seconds": 0.0})
        if bar is not None:
            bar.set_description(name)
            bar.update(len(part["correct"]))
        for images, labels, places in _batches(model, x, y, batch_size, device, start=len(part["correct"])):
            began = time.perf_counter()
            found = images if attack is None else attack(model, images, labels, places)
            with _evaluating(model):
                right = _logits("evaluate", model, found).argmax(1) == labels
            zero = None if attack is None else attack.zero_gradient
            part |= {  # at once: what is interrupted in between counts as a whole or not at all
                "correct": part["correct"] + _flags(right.tolist()),
                "largest": part["largest"] if attack is None else max(part["largest"], _measure(name, attack, found, images)),
                "zero": part["zero"] + (0 if zero is None else int(zero.sum())),
                "known": part["known"] + (0 if zero is None else len(images)),
                "seconds": part["seconds"] + time.perf_counter() - began,
            }
            store.write()
            if bar is not None:
                bar.update(len(images))


# ---- suites ------------------------------------------------------------------------------------------------------------------


def quick(sizes: Sequence[float], seed: int | None, eot: int) -> dict[str, Attack]:
    """FGSM and PGD with 7 steps of 2.5*eps/7, at each size."""
    attacks: dict[str, Attack] = {}
    for eps in sizes:
        attacks[f"fgsm-{size_text(eps)}"] = FGSM(eps, seed=seed, eot=eot)
        attacks[f"pgd7-{size_text(eps)}"] = PGD(eps, steps=7, seed=seed, eot=eot)
    return attacks


#: Every suite by its name on the command line: (sizes in pixels, seed, gradients averaged) -> attacks by name.
SUITES: dict[str, Callable[[Sequence[float], int | None, int], dict[str, Attack]]] = {"quick": quick}


def make_suite(name: str, eps: Sequence[float | str] = ("2/255", "4/255", "8/255"), seed: int | None = 0, eot: int = 1) -> dict[str, Attack]:
    """The attacks of a suite at each size eps, by the name to report, for `evaluate`.

    eot: gradients averaged at each step, each with fresh random numbers of the network; `default_eot(model)` says how
    many a network needs.

    >>> list(make_suite("quick", ["8/255"]))
    ['fgsm-8/255', 'pgd7-8/255']
    """
    if name not in SUITES:
        raise ValueError(f"suite {name!r} is unknown; wanted one of {', '.join(SUITES)}.{nearest(name, tuple(SUITES))}")
    sizes = list(dict.fromkeys(parse_eps(value) for value in ([eps] if isinstance(eps, (str, float, int)) else eps)))
    if not sizes:
        raise ValueError(f"suite {name}: eps is empty; wanted one size or more, such as 8/255.")
    return SUITES[name](sizes, seed, eot)


def default_eot(model: nn.Module) -> int:
    """How many gradients an attack on a network averages: 10 where it is random at inference, else 1.

    Random are encodings that draw numbers (Poisson, RSC) and neurons that fire by chance (`fire="gaussian"`), unless a
    seed makes them repeat. One gradient of such a network is mostly noise, and the network looks more robust than it is
    (Athalye et al., ICML 2018, section 4.2).

    >>> attacks = make_suite("quick", ["8/255"], eot=default_eot(model))
    """
    draws = any(
        (getattr(module, "random", False) is True or getattr(module, "fire", None) == "gaussian") and getattr(module, "seed", None) is None
        for module in model.modules()
    )
    return RANDOM_EOT if draws else 1


def size_text(eps: float) -> str:
    """A size as papers write it: 8/255 where it is one, else the number."""
    parts = round(eps * 255)
    return f"{parts}/255" if math.isclose(eps * 255, parts, abs_tol=1e-9) else f"{eps:g}"


# ---- membranes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerDiagnosis:
    """One spiking layer. omega: the mean over steps and channels of Omega; mean, deviation: of z = h - threshold over
    steps, samples and neurons, channel by channel and step by step, then averaged; rate: spikes per neuron and step."""

    name: str
    omega: float
    mean: float
    deviation: float
    rate: float

    def to_dict(self) -> dict:
        """As JSON holds it."""
        return asdict(self)


def diagnose(
    model: nn.Module, x: Tensor, gamma: float = 1.0, batch_size: int = 256, device: str | torch.device | None = None
) -> list[LayerDiagnosis]:
    """Omega, mean and deviation of the membrane and firing rate of each spiking layer, over all of x, in eval mode.

    x: as in `accuracy`. gamma: half the window of Omega, in units of potential. Batches are pooled exactly: the result
    does not depend on batch_size but for rounding. A ValueError for a model without a spiking layer.

    >>> diagnose(model, x)[0].omega
    """
    _check("diagnose", x, None, batch_size)
    pools: list[tuple[str, _Pool]] = []
    with _evaluating(model):
        for images, _, _ in _batches(model, x, None, batch_size, device):
            _, entries = named_statistics(model, images, ("mean", "var", "rate"))
            if not entries:
                raise ValueError(f"diagnose: {type(model).__name__} ran no spiking layer; wanted a model with fastsnn.LIF or a relative in it.")
            pools = pools or [(name, _Pool()) for name, _ in entries]
            for (_, pool), (_, entry) in zip(pools, entries, strict=True):
                pool.add(entry, len(images))
    return [
        LayerDiagnosis(
            name, omega(pool.mean, pool.var, gamma).mean().item(), pool.mean.mean().item(), pool.var.sqrt().mean().item(), pool.rate.mean().item()
        )
        for name, pool in pools
    ]


class _Pool:
    """Mean, biased variance and rate [T, C] over batches, in float64 (Chan, Golub and LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.var, self.rate = 0, 0.0, 0.0, 0.0

    def add(self, entry, count: int) -> None:
        self.count += count
        share = count / self.count
        ahead = entry.mean.double() - self.mean
        self.var = self.var + share * (entry.var.double() - self.var) + share * (1 - share) * ahead**2
        self.mean = self.mean + share * ahead
        self.rate = self.rate + share * (entry.rate.double() - self.rate)


# ---- parts -------------------------------------------------------------------------------------------------------------------


class _evaluating:
    """Within this block: eval mode, no gradient recorded; then each module's mode as before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.grad = torch.is_grad_enabled()
        self.model.eval()
        torch.set_grad_enabled(False)

    def __exit__(self, *_) -> None:
        torch.set_grad_enabled(self.grad)
        for module, training in self.modes:
            module.training = training


def _check(who: str, x: Tensor, y: Tensor | None, batch_size: int) -> None:
    if not isinstance(x, Tensor) or not (x.dtype == torch.uint8 or x.is_floating_point()):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{who}: x is {got}; wanted uint8, or float with pixels in [0, 1].")
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(f"{who}: x has shape {list(x.shape)}; wanted [N, C, H, W] with one image or more.")
    if y is not None and (not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]):
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"{who}: y is {got}; wanted int64 [{len(x)}], one class number for each image.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{who}: batch_size is {batch_size!r}; wanted an int >= 1.")


def _batches(model: nn.Module, x: Tensor, y: Tensor | None, batch_size: int, device, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images, labels, places in x), on the device; bytes become the model's floating-point type in [0, 1]."""
    weight = next((value for value in model.parameters() if value.is_floating_point()), None)
    if device is not None:
        model.to(device)
    elif weight is not None:
        device = weight.device
    for begin in range(start, len(x), batch_size):
        images = x[begin : begin + batch_size].to(device)
        if images.dtype == torch.uint8:
            images = images.to(torch.float64 if weight is not None and weight.dtype == torch.float64 else torch.float32) / 255
        places = torch.arange(begin, begin + len(images), device=images.device)
        yield images, places if y is None else y[begin : begin + batch_size].to(images.device), places


def _logits(who: str, model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{who}: the model returned {got} for {len(images)} images; wanted logits [{len(images)}, classes].")
    if not logits.isfinite().all():
        raise FloatingPointError(f"{who}: the model's logits hold NaN or infinity; wanted finite logits. Look for NaN in its parameters.")
    return logits


def _measure(name: str, attack: Attack, found: Tensor, images: Tensor) -> float:
    """The largest perturbation of a batch, after checking it against what the attack allows."""
    moved = (found.double() - images.double()).flatten(1)
    size = moved.abs().amax(1) if attack.norm == "linf" else moved.norm(dim=1)
    if attack.norm == "linf":  # the ball of `Attack`: its bounds in the images' arithmetic
        inside = ((found >= images - attack.eps) & (found <= images + attack.eps)).all()
    else:  # a norm is a long sum, whose order is not the attack's own
        inside = (size <= attack.eps * (1 + 1e-12)).all()
    largest, low, high, inside = torch.stack([size.max(), found.min().double(), found.max().double(), inside.double()]).tolist()
    if not (inside and attack.low <= low and high <= attack.high):
        raise RuntimeError(
            f"evaluate: attack {name!r} moved an image by {largest!r} into [{low:g}, {high:g}]; it promised {attack.eps!r} within "
            f"[{attack.low:g}, {attack.high:g}]. This is a defect of the attack: do not use its figures."
        )
    return largest


def _warnings(model: nn.Module, x: Tensor, y: Tensor, batch_size: int, device, results: dict[str, Result]) -> list[str]:
    """Signs that an evaluation shows more robustness than there is (Carlini et al. 2019; AutoAttack's checks)."""
    found = []
    images, _, _ = next(_batches(model, x, y, batch_size, device))
    with _evaluating(model):
        if not torch.equal(model(images), model(images)):
            one = [name for name, result in results.items() if result.attack is not None and result.attack["eot"] == 1]
            found.append("The model's outputs are random: its accuracy varies between runs." + (f" {', '.join(one)}: wanted eot > 1." if one else ""))
    for name, result in results.items():
        if result.zero_gradient:
            found.append(f"{name}: the gradient is zero for {result.zero_gradient:.1%} of the samples; an attack without gradients may find more.")
    attacked = {name: result for name, result in results.items() if result.attack is not None}
    for name, result in attacked.items():
        if result.accuracy > results["clean"].accuracy:
            found.append(f"{name} is less harmful than no attack at all.")
        for other, rival in attacked.items():
            options, theirs = result.attack, rival.attack
            if options["name"] == "pgd" and theirs["name"] == "fgsm" and options["eps"] == theirs["eps"] and result.accuracy > rival.accuracy:
                found.append(f"{name} finds less than {other}: many steps should find at least as much as one.")
            if options["eps"] > theirs["eps"] and {**options, "eps": 0, "step_size": 0} == {**theirs, "eps": 0, "step_size": 0} and result.accuracy > rival.accuracy:
                found.append(f"{name} finds less than {other}: a larger eps should find at least as much.")
    return found


def _flags(correct: Sequence[bool]) -> str:
    return "".join("01"[flag] for flag in correct)


def _key(model: nn.Module, x: Tensor, y: Tensor, rows: Mapping[str, Attack | None]) -> str:
    """A hash of all that an evaluation depends on."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, value in [*model.state_dict().items(), ("x", x), ("y", y)]:
        if not isinstance(value, Tensor):
            continue
        hashed.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    hashed.update(repr(model).encode())
    hashed.update(json.dumps([[name, None if attack is None else [attack.name, attack.options()]] for name, attack in rows.items()]).encode())
    return hashed.hexdigest()


class _Store:
    """What an evaluation has found so far, in a file where one is wanted."""

    def __init__(self, path: str | Path | None, key: Callable[[], str]) -> None:
        self.path = None if path is None else Path(path)
        self.rows: dict[str, dict] = {}
        self.written = time.monotonic()
        if self.path is None:
            return
        self.key = key()
        if not self.path.exists():
            return
        try:
            state = json.loads(self.path.read_text())
            self.rows, before = state["rows"], state["key"]
        except (ValueError, KeyError, TypeError):
            raise ResumeError(f"evaluate: {self.path} is not a file of evaluate(resume=...); wanted one, or a new path. Delete it to begin anew.") from None
        if before != self.key:
            raise ResumeError(
                f"evaluate: {self.path} is of another model, other images or other attacks; wanted the same ones to go on. "
                "Delete it to begin anew, or choose another path."
            )

    def write(self, now: bool = False) -> None:
        if self.path is None or not (now or time.monotonic() - self.written > WRITE_EVERY):
            return
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            with open(part, "w") as file:
                json.dump({"key": self.key, "rows": self.rows}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        self.written = time.monotonic()
